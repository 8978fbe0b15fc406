"""LocalCopies: keeps records that came from a remote tier in the store on this machine, in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tierkv.background.work_queue import WriteBehind
from tierkv.errors import StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import parse_record

__all__ = ["LocalCopies"]

_log = logging.getLogger(__name__)

_QUEUE_BYTES = 256 << 20
_PARENTLESS_BYTES = 64 << 20
_QUEUE_JOBS = 4096
_BATCH = 8


@dataclass(frozen=True, slots=True)
class _Copy:
    """One record. position: of its block in the prompt; parents have lower ones. count: raises a counter."""

    record: Bytes
    position: int
    count: Callable[[str], None]


class LocalCopies:
    """A bounded queue of records and the thread that stores them. What finds no room is dropped and counted.

    The store takes no record without its parent, and several threads read blocks in no order. So a record waits for its
    parent, in bounded memory.
    """

    def __init__(self, store: ColdStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._parentless: list[_Copy] = []  # the oldest first
        self._queue: WriteBehind[_Copy] = WriteBehind(
            self._write, capacity=_QUEUE_JOBS, batch_size=_BATCH, name="tierkv-remote-keep"
        )

    def keep(self, record: Bytes, *, position: int, count: Callable[[str], None]) -> None:
        """Queue a checked record. Returns at once.

        count: called once for each record, perhaps on another thread: "kept_stored", or "kept_" and why it was not.
        """
        copy = _Copy(record, position, count)
        with self._lock:
            has_room = self._num_bytes + record.size <= _QUEUE_BYTES
            self._num_bytes += record.size if has_room else 0
        if not has_room or not self._queue.try_put(copy):
            count("kept_queue_full")
            if has_room:
                self._free([copy])

    def flush(self, *, stall_s: float) -> bool:
        """Wait until all queued records are stored, dropped, or wait for a parent. Return False if that takes too long.

        stall_s: for one batch.
        """
        return self._queue.flush(stall_s=stall_s)

    def close(self, *, stall_s: float) -> bool:
        """Store what is queued and stop. Return whether the thread has ended."""
        left = self._queue.close(stall_s=stall_s)
        for copy in left:
            copy.count("kept_stalled")
        if not self._queue.is_running:
            _count(self._parentless, PutOutcome.NO_PARENT)
            self._parentless = []
        return not self._queue.is_running

    def _write(self, copies: list[_Copy]) -> None:
        """Store records, parents first, and those whose parent has come with them."""
        waiting = self._put([*self._parentless, *copies])
        kept_bytes = 0
        for number, copy in enumerate(reversed(waiting)):
            kept_bytes += copy.record.size
            if kept_bytes > _PARENTLESS_BYTES:
                dropped = waiting[: len(waiting) - number]
                _count(dropped, PutOutcome.NO_PARENT)
                self._free(dropped)
                waiting = waiting[len(dropped) :]
                break
        self._parentless = waiting

    def _put(self, copies: list[_Copy]) -> list[_Copy]:
        """Store records and return those without a parent, in their order."""
        in_order = sorted(copies, key=lambda each: each.position)
        try:
            outcomes = self._store.put([parse_record(each.record) for each in in_order])
        except StoreError as exc:
            _log.warning("%d records of a remote tier were not stored: %s", len(copies), exc)
            outcomes = [PutOutcome.IO_ERROR] * len(copies)
        done = []
        for copy, outcome in zip(in_order, outcomes, strict=True):
            if outcome is not PutOutcome.NO_PARENT:
                _count([copy], outcome)
                done.append(copy)
        self._free(done)
        ended = {id(copy) for copy in done}
        return [copy for copy in copies if id(copy) not in ended]

    def _free(self, copies: Iterable[_Copy]) -> None:
        with self._lock:
            self._num_bytes -= sum(copy.record.size for copy in copies)


def _count(copies: Iterable[_Copy], outcome: PutOutcome) -> None:
    for copy in copies:
        copy.count(f"kept_{outcome.value}")
