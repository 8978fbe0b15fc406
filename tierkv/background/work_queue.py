"""A bounded queue of work by priority class, and a pool of threads that take the most urgent job."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

from tierkv.errors import CapacityError, ClosedError, ConfigError
from tierkv.values.locks import OwnedCondition

__all__ = ["PATIENCE", "Priority", "PriorityThreadPool", "QueueEntry", "WorkQueue"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_JOBS = 4096
PATIENCE = 32
"""After so many more urgent items, one of a less urgent priority class is next."""


class Priority(IntEnum):
    """Priority classes of work, the most urgent first: a waiting request, a prefetch, a copy to a lower tier."""

    REQUEST = 0
    PREFETCH = 1
    DEMOTION = 2


@dataclass(frozen=True, slots=True, eq=False)
class QueueEntry(Generic[Item]):
    """One item in a queue; equal only to itself."""

    item: Item
    priority: Priority
    num_bytes: int


class WorkQueue(Generic[Item]):
    """One queue for each priority class: the most urgent class first, first in, first out within a class. Thread-safe.

    max_entries, max_bytes: bounds of each class, so that a queue full of demotions refuses no request. An item larger
    than `max_bytes` may be queued alone. Callers that wait for room get it in their order.
    patience: how often a class with items may be passed over before it is next.
    """

    def __init__(self, *, max_entries: int, max_bytes: int | None = None, patience: float = math.inf) -> None:
        if max_entries < 1 or (max_bytes is not None and max_bytes < 1):
            raise ConfigError(f"a queue of {max_entries} entries and {max_bytes} bytes holds nothing")
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._queues: dict[Priority, OrderedDict[QueueEntry[Item], None]] = {each: OrderedDict() for each in Priority}
        self._patience = patience
        self._bytes = dict.fromkeys(Priority, 0)
        self._passed_over = dict.fromkeys(Priority, 0)
        self._waiters: dict[Priority, deque[QueueEntry[Item]]] = {each: deque() for each in Priority}
        self._returned: set[QueueEntry[Item]] = set()
        self._is_closed = False
        self._changed = OwnedCondition()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(
        self, item: Item, priority: Priority, *, num_bytes: int = 0, timeout_s: float | None = None
    ) -> QueueEntry[Item]:
        """Queue an item. Wait for room at most `timeout_s` seconds; 0 does not wait, None waits without limit.

        Raises CapacityError if there was no room in time, and ClosedError if the queue is closed.
        """
        counted = num_bytes if self._max_bytes is None else min(num_bytes, self._max_bytes)
        entry = QueueEntry(item, priority, counted)
        with self._changed:
            has_room = self._wait_for_room(entry, timeout_s)
            if self._is_closed:
                raise ClosedError("the queue is closed")
            if not has_room:
                waiting = f"{len(self._queues[priority])} entries, {self._bytes[priority]} bytes"
                raise CapacityError(f"no room for more {priority.name.lower()} work: {waiting} are queued")
            self._queues[priority][entry] = None
            self._bytes[priority] += counted
            self._changed.notify_all()
        return entry

    def take(self) -> QueueEntry[Item] | None:
        """Wait for an item and return the most urgent one; None once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self) > 0)
            return self._pop()

    def try_take(self) -> QueueEntry[Item] | None:
        """Return the most urgent item; None if the queue is empty."""
        with self._changed:
            return self._pop()

    def put_back(self, entry: QueueEntry[Item]) -> None:
        """Queue a taken item again, before all others of its class and beyond the bounds. It cannot be cancelled."""
        with self._changed:
            queue = self._queues[entry.priority]
            queue[entry] = None
            queue.move_to_end(entry, last=False)
            self._bytes[entry.priority] += entry.num_bytes
            self._returned.add(entry)
            self._changed.notify_all()

    def cancel(self, entry: QueueEntry[Item]) -> bool:
        """Remove an item that was not taken yet. Return False if it was."""
        with self._changed:
            if entry in self._returned or entry not in self._queues[entry.priority]:
                return False
            self._remove(entry)
            return True

    def close(self) -> None:
        """Refuse new items; queued items can still be taken. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait_for_room(self, entry: QueueEntry[Item], timeout_s: float | None) -> bool:
        """Wait for room, in the order of the callers, so that small items do not overtake a large one for ever.

        Return whether there is room, or the queue is closed. The caller holds the lock.
        """
        assert self._changed.is_owned()
        waiters = self._waiters[entry.priority]
        waiters.append(entry)
        try:
            return self._changed.wait_for(
                lambda: self._is_closed or (waiters[0] is entry and self._has_room(entry)), timeout_s
            )
        finally:
            waiters.remove(entry)
            self._changed.notify_all()

    def _has_room(self, entry: QueueEntry[Item]) -> bool:
        """Return whether one more item is within the bounds; the caller holds the lock."""
        assert self._changed.is_owned()
        queue, num_bytes = self._queues[entry.priority], self._bytes[entry.priority] + entry.num_bytes
        return len(queue) < self._max_entries and (self._max_bytes is None or num_bytes <= self._max_bytes)

    def _pop(self) -> QueueEntry[Item] | None:
        """Remove and return the next item, or None; the caller holds the lock."""
        assert self._changed.is_owned()
        waiting = [each for each in Priority if self._queues[each]]
        if not waiting:
            return None
        chosen = next((each for each in waiting if self._passed_over[each] >= self._patience), waiting[0])
        for each in waiting:
            self._passed_over[each] += 1
        self._passed_over[chosen] = 0
        entry = next(iter(self._queues[chosen]))
        self._remove(entry)
        return entry

    def _remove(self, entry: QueueEntry[Item]) -> None:
        """Remove an item; the caller holds the lock."""
        assert self._changed.is_owned()
        del self._queues[entry.priority][entry]
        self._bytes[entry.priority] -= entry.num_bytes
        self._returned.discard(entry)
        self._changed.notify_all()


class PriorityThreadPool:
    """A fixed number of threads; a free thread takes the most urgent job. A job must not wait for another job.

    Of 32 jobs at least one is of a less urgent class, if there is any: requests, `close` and `flush` wait for the
    memory that demotions hold. A job is never interrupted, so an urgent job waits until the first thread is free.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._queue: WorkQueue[Callable[[], None]] = WorkQueue(max_entries=_MAX_JOBS, patience=PATIENCE)
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a call and return its future. Raises ClosedError after `shutdown`."""
        future: Future[Result] = Future()
        self._queue.put(lambda: _work(future, function, arguments), priority)
        return future

    def map(self, priority: Priority, function: Callable[..., Result], *iterables: Iterable[Any]) -> list[Result]:
        """Call a function with the items of the iterables, as the built-in `map`, several calls at a time.

        All calls have ended when this returns or raises, on an interrupt too: no thread still uses the arguments.
        """
        futures: list[Future[Result]] = []
        try:
            for each in zip(*iterables, strict=False):
                futures.append(self.submit(priority, function, *each))
            wait(futures)
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        return [future.result() for future in futures]

    def shutdown(self) -> None:
        """Run the queued jobs, then end the threads. May be called twice."""
        self._queue.close()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while job := self._queue.take():
            job.item()
            del job  # it refers to its arguments, and the next job may come late


def _work(future: Future[Result], function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments)
    except BaseException as exc:  # noqa: BLE001 - the future raises it
        future.set_exception(exc)
    else:
        future.set_result(result)
