"""EvictionLog: a numbered log of evictions on demand, so that every engine can drop its own copies.

A small file keeps the log, so that the next daemon continues its numbers. The log is bounded: an engine that has missed
more drops all its copies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections import deque
from pathlib import Path

import msgspec

from tierkv.daemon.answers import AnswerCheck, WrongAnswerError
from tierkv.daemon.eviction_messages import Eviction, Evictions, EvictionsSince
from tierkv.errors import StoreError
from tierkv.values.block import HASH_BYTES
from tierkv.values.files import open_regular

__all__ = ["LOG_NAME", "EvictionLog"]

_log = logging.getLogger(__name__)

LOG_NAME = "daemon.evictions"
"""In the directory of a daemon's store."""

_MAX_EVICTIONS = 64
_MAX_HASHES = 4096  # of one eviction; with more, all blocks of the namespace count as evicted
_MAX_TOKEN_BYTES = 4 << 20
_MAX_KEPT_BYTES = 8 << 20  # of all evictions: they are sent in one message
_MAX_FILE_BYTES = 64 << 20


class _Kept(msgspec.Struct, array_like=True):
    """The content of the file."""

    log: int
    number: int
    evictions: list[Eviction]


class EvictionLog:
    """The newest evictions of one store, or of one socket without a store. path: of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.log: int
        self.number: int
        self.log, self.number = secrets.randbits(62) | 1, 0
        self._evictions: deque[Eviction] = deque(maxlen=_MAX_EVICTIONS)
        with contextlib.suppress(FileNotFoundError):
            self._read()

    def add(self, eviction: Eviction) -> None:
        """Add an eviction and set its number. `save` keeps it for the next daemon."""
        self.number += 1
        eviction.number = self.number
        if len(eviction.block_hashes or b"") > _MAX_HASHES * HASH_BYTES:
            eviction.block_hashes = None
        if len(eviction.tokens) > _MAX_TOKEN_BYTES:
            eviction.tokens = b""
        self._evictions.append(eviction)
        self._forget_oldest()

    def since(self, log: int, number: int) -> Evictions:
        """Return the evictions after a number of a log; none for a client that knows no log yet."""
        if not log:
            return Evictions(self.log, self.number, True, [])
        newer = [each for each in self._evictions if each.number > number]
        is_complete = log == self.log and len(newer) == self.number - number
        return Evictions(self.log, self.number, is_complete, newer if is_complete else [])

    def save(self) -> None:
        """Replace the file atomically. A failure is logged: then the next daemon starts another log."""
        kept = msgspec.msgpack.encode(_Kept(self.log, self.number, list(self._evictions)))
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        try:
            fd = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, follow_links=False, own=True)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(kept)
                os.replace(temporary, self._path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except (OSError, StoreError) as exc:
            _log.warning(
                "the log of evictions %s cannot be written: %s", self._path, getattr(exc, "strerror", None) or exc
            )
            with contextlib.suppress(OSError):
                self._path.unlink()  # an old file would repeat numbers

    def _forget_oldest(self) -> None:
        kept = sum(len(each.tokens) + len(each.block_hashes or b"") for each in self._evictions)
        while kept > _MAX_KEPT_BYTES:
            oldest = self._evictions.popleft()
            kept -= len(oldest.tokens) + len(oldest.block_hashes or b"")

    def _read(self) -> None:
        try:
            fd = open_regular(self._path, follow_links=False, own=True)
            with os.fdopen(fd, "rb") as file:
                kept = msgspec.msgpack.decode(file.read(_MAX_FILE_BYTES), type=_Kept)
            answer = Evictions(kept.log, kept.number, True, kept.evictions)
            AnswerCheck().check(EvictionsSince(0, 0), answer)  # else clients would reject the answer
        except FileNotFoundError:
            raise
        except (OSError, StoreError, WrongAnswerError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            _log.warning("the log of evictions %s cannot be read, a new one is started: %s", self._path, reason)
            return
        self.log, self.number = kept.log, kept.number
        self._evictions.extend(kept.evictions)
        self._forget_oldest()
