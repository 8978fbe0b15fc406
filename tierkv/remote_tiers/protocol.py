"""RemoteClient: what tierkv needs of an engine beyond this machine. One class per engine satisfies it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

from tierkv.errors import RemoteError
from tierkv.storage.codec import Bytes
from tierkv.storage.record import RECORD_VERSION
from tierkv.values.block import BlockHash

__all__ = [
    "DESCRIPTION_FILE",
    "FORMAT_FOLDER",
    "MOST_NAMESPACES",
    "CallTime",
    "Deadline",
    "RemoteClient",
    "RemoteDamageError",
    "RemoteKey",
    "WriteOutcome",
    "namespace_folder",
]


MOST_NAMESPACES = 1000


class RemoteKey(NamedTuple):
    """The name of one record: a reader finds only records of its own format, model and tokens."""

    namespace: BlockHash
    block_hash: BlockHash

    def text(self) -> str:
        """Return the key for engines with flat names."""
        return f"tkv{RECORD_VERSION}:{self.namespace.hex()}:{self.block_hash.hex()}"

    def path(self) -> str:
        """Return the key for engines with folders; 256 folders a namespace keep each of them short."""
        name = self.block_hash.hex()
        return f"{namespace_folder(self.namespace)}/{name[:2]}/{name}"


FORMAT_FOLDER = f"tkv{RECORD_VERSION}"
"""The folder of all records of this format, for engines with folders."""
DESCRIPTION_FILE = "namespace.json"
"""The description of a namespace, in its folder."""


def namespace_folder(namespace: BlockHash) -> str:
    """Return the folder of a namespace's records, for engines with folders."""
    return f"{FORMAT_FOLDER}/{namespace.hex()}"


class RemoteDamageError(RemoteError):
    """A value that cannot be the record: longer than any record, or of another type. The remote tier itself is up."""


class WriteOutcome(Enum):
    """The outcome of writing one record."""

    STORED = "stored"
    EXISTS = "exists"
    NO_PARENT = "no_parent"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTime:
    """How long a call may take: `base_s` for the connection or the first answer, and what its bytes need."""

    base_s: float = 0.3
    bytes_per_s: float = 50e6


class Deadline:
    """The end of one call. A call that learns how long a value is allows itself the time for so many bytes."""

    def __init__(self, times: CallTime, *, num_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._times = times
        self._clock = clock
        self._ends_at = clock() + times.base_s + num_bytes / times.bytes_per_s

    def allow_bytes(self, num_bytes: int) -> None:
        """Move the end back by the time that so many bytes take."""
        self._ends_at += num_bytes / self._times.bytes_per_s

    def part(self, count: int) -> Deadline:
        """Return a deadline that ends after a `count`th of the time left. Raises RemoteError where there is none."""
        times = replace(self._times, base_s=self.left_s() / count)
        return Deadline(times, clock=self._clock)

    def left_s(self) -> float:
        """Return the seconds left. Raises RemoteError where there are none."""
        left = self._ends_at - self._clock()
        if left <= 0:
            raise RemoteError("the remote tier did not answer in time")
        return left


class RemoteClient(Protocol):
    """One connection, or several, to an engine that keeps records. Thread-safe.

    Each call ends before its deadline, at most a few ms later. Each raises RemoteError where the engine cannot be
    reached or does not answer in time, and RemoteRefusedError where it refuses. No message has a password.
    """

    def ping(self, deadline: Deadline) -> None:
        """Return once the engine answers a small question."""

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Return how many leading keys have a value."""

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Return a value in memory of its own, or None where there is none.

        Takes no memory before the value's length was compared with `most_bytes`. Raises RemoteDamageError.
        """

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        """Create a value. Return False where there is one already, and change nothing then, unless `replace`."""

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Record a use of values, so that the engine keeps them longer."""

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Keep the description of a namespace beside its records, where the engine has room for one."""

    def descriptions(self, deadline: Deadline) -> list[bytes]:
        """Return the descriptions of namespaces, MOST_NAMESPACES at most; none where the engine keeps none."""

    def close(self) -> None:
        """Close all connections. May be called twice."""
