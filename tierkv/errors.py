"""Every error that tierkv raises on purpose.

TierKVError
├── ConfigError (ValueError)     an invalid option or argument
├── ShapeError (ValueError)      a tensor or buffer of the wrong shape, dtype or device
├── CapacityError                a tier has no room and nothing may be evicted
│   └── QueueFullError           an engine has as many waiting requests as it may have
├── ClosedError                  the cache has been closed, or is being closed
├── UnsupportedModelError        a model whose K and V cannot be reused by prefix
├── StoreError                   the cold store or a state file cannot be used
│   ├── FormatVersionError       written by another version of the format
│   ├── NamespaceMismatchError   written for another model, dtype, layout or salt
│   ├── CorruptBlockError        bytes that do not match their checksum or header
│   ├── StoreBusyError           another process has held the store's write lock for too long
│   └── RemoteError              a remote tier cannot be reached, does not answer in time, or refuses
│       └── RemoteRefusedError   a remote tier answered, and refuses: no rights, no room, read only
├── TransferCancelledError       the transfer was cancelled before its end
├── RankError                    the ranks of a model cannot agree
└── DaemonError                  the daemon refused a request, or cannot be started
    └── DaemonGoneError          the daemon cannot be reached, does not answer, or has died
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CorruptBlockError",
    "DaemonError",
    "DaemonGoneError",
    "FormatVersionError",
    "NamespaceMismatchError",
    "QueueFullError",
    "RankError",
    "RemoteError",
    "RemoteRefusedError",
    "ShapeError",
    "StoreBusyError",
    "StoreError",
    "TierKVError",
    "TransferCancelledError",
    "UnsupportedModelError",
]


class TierKVError(Exception):
    """Root of the tree. hint: what the reader can do, part of the message.

    >>> try:
    ...     CacheConfig(block_size=0)
    ... except TierKVError as error:
    ...     print(type(error).__name__)
    ConfigError
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.hint = hint
        super().__init__(f"{message} ({hint})" if hint else message)


class ConfigError(TierKVError, ValueError):
    """An invalid option or argument."""


class ShapeError(TierKVError, ValueError):
    """A tensor or buffer of the wrong shape, dtype or device."""


class CapacityError(TierKVError):
    """A tier has no room and nothing in it may be evicted."""


class QueueFullError(CapacityError):
    """An engine has as many waiting requests as it may have: try again later."""


class ClosedError(TierKVError):
    """The cache is closed, or is being closed."""


class UnsupportedModelError(TierKVError):
    """A model whose keys and values cannot be reused by prefix; the message says why."""


class StoreError(TierKVError):
    """The cold store or a state file cannot be used."""


class FormatVersionError(StoreError):
    """Bytes written by another version of the format."""


class NamespaceMismatchError(StoreError):
    """Bytes written for another model, dtype, layout, block size or salt."""


class CorruptBlockError(StoreError):
    """Bytes that do not match their checksum, header or length."""


class StoreBusyError(StoreError):
    """Another process, perhaps a stopped one, holds the store's write lock. Nothing was written."""


class RemoteError(StoreError):
    """A remote tier cannot be reached, does not answer in time, or does not speak its protocol."""


class RemoteRefusedError(RemoteError):
    """A remote tier answered, and refuses: no rights, no room, read only. code: the first word of its answer."""

    def __init__(self, message: str, *, code: str = "refused", hint: str | None = None) -> None:
        self.code = code
        super().__init__(message, hint=hint)


class TransferCancelledError(TierKVError):
    """A transfer was cancelled before all of it was copied; its target must not be used."""


class RankError(TierKVError):
    """The ranks of a model differ in their steps or settings, or cannot reach each other."""


class DaemonError(TierKVError):
    """The daemon refused the request, or cannot be started."""


class DaemonGoneError(DaemonError):
    """The daemon cannot be reached, does not answer in time, or has died."""
