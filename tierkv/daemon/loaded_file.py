"""LoadedFile: a state file that clients of the daemon have loaded, read beside everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any, TypeVar

from tierkv.daemon.side_threads import SideThreads
from tierkv.errors import StoreError
from tierkv.storage.state_file import StateFile
from tierkv.storage.state_format import StateEntry
from tierkv.values.block import BlockHash

__all__ = ["LoadedFile"]

_NUM_THREADS = 2
_LOOKUP_S = 0.5  # the loop waits so long for the token ids of a block

Result = TypeVar("Result")


class LoadedFile:
    """An open state file with threads of its own: a file that hangs hinders the reads of no other. A `BlockSource`.

    While one of its reads is overdue the file has nothing: no further thread is spent on it.
    """

    def __init__(self, state: StateFile) -> None:
        self.identity = state.identity
        self.path = state.path
        self._state = state
        self._threads = SideThreads(_NUM_THREADS, name="tierkv-state-file")
        self._lock = threading.Lock()
        self._num_users = 1  # the one that opened the file; each read in work is a further one
        self._overdue: Future[Any] | None = None

    def __len__(self) -> int:
        return len(self._state)

    @property
    def is_hanging(self) -> bool:
        """Whether a read that took too long has still not returned."""
        return self._overdue is not None and not self._overdue.done()

    @property
    def num_pending(self) -> int:
        """Reads that are queued or have not returned."""
        return self._threads.num_pending

    def submit(self, read: Callable[[StateFile], Result]) -> Future[Result]:
        """Have a thread of this file read something. The file stays open until it has returned."""
        self._use()
        try:
            reading = self._threads.submit(read, self._state)
        except BaseException:
            self._end_use()
            raise
        reading.add_done_callback(lambda _: self._end_use())
        return reading

    def note_overdue(self, reading: Future[Any]) -> None:
        """Have nothing until this read returns."""
        self._overdue = reading

    @contextmanager
    def held(self) -> Iterator[StateFile]:
        """Keep the file open for a thread that is not of this file."""
        self._use()
        try:
            yield self._state
        finally:
            self._end_use()

    def close(self) -> None:
        """Close the file once its last read has returned. Waits for nothing."""
        self._threads.shutdown()
        self._end_use()

    def lookup(self, block_hash: BlockHash) -> StateEntry | None:
        """Return a block's small record, which is in memory, or None."""
        return None if self.is_hanging else self._state.lookup(block_hash)

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids; None if they cannot be read soon."""
        return self._read_soon(lambda state: state.read_tokens(block_hash))

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return the block that shares most leading tokens, as `StateFile` does; None if that cannot be read soon."""
        if self.is_hanging or not self._state.children(parent):  # which is in memory
            return None
        return self._read_soon(lambda state: state.find_longest_run(parent, token_bytes))

    def _read_soon(self, read: Callable[[StateFile], Result]) -> Result | None:
        if self.is_hanging:
            return None
        reading = self.submit(read)
        try:
            return reading.result(_LOOKUP_S)
        except (FutureTimeout, TimeoutError):
            if not reading.cancel():
                self.note_overdue(reading)
            return None
        except StoreError:
            return None

    def _use(self) -> None:
        with self._lock:
            self._num_users += 1

    def _end_use(self) -> None:
        with self._lock:
            self._num_users -= 1
            is_last = not self._num_users
        if is_last:
            self._state.close()
