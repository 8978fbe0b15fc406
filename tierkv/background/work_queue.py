"""Who is served first: a bounded queue of work by priority, and threads that always take the most urgent job."""

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

__all__ = ["PATIENCE", "Priority", "PriorityThreads", "QueueEntry", "WorkQueue"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_JOBS = 4096
PATIENCE = 32
"""How many more urgent items go before one of a less urgent priority, where they never end."""


class Priority(IntEnum):
    """Whose work goes first: a request that waits, then what one will ask for, then what is written down."""

    REQUEST = 0
    PREFETCH = 1
    DEMOTION = 2


@dataclass(frozen=True, slots=True, eq=False)
class QueueEntry(Generic[Item]):
    """One item in a queue; each is itself alone."""

    item: Item
    priority: Priority
    num_bytes: int


class WorkQueue(Generic[Item]):
    """Items of the most urgent priority first, those of one priority in the order in which they came. Thread-safe.

    max_entries, max_bytes: bounds of what waits, for each priority on its own, so that a queue full of demotions
    refuses no request. An item larger than `max_bytes` waits alone. Who waits for room is let in in order.
    patience: how often those of a priority may be passed over by others before one of them has its turn.
    """

    def __init__(self, *, max_entries: int, max_bytes: int | None = None, patience: float = math.inf) -> None:
        if max_entries < 1 or (max_bytes is not None and max_bytes < 1):
            raise ConfigError(f"a queue of {max_entries} entries and {max_bytes} bytes holds nothing")
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lanes: dict[Priority, OrderedDict[QueueEntry[Item], None]] = {each: OrderedDict() for each in Priority}
        self._patience = patience
        self._bytes = dict.fromkeys(Priority, 0)
        self._passed_over = dict.fromkeys(Priority, 0)
        self._at_the_door: dict[Priority, deque[QueueEntry[Item]]] = {each: deque() for each in Priority}
        self._taken_back: set[QueueEntry[Item]] = set()
        self._is_closed = False
        self._changed = OwnedCondition()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(
        self, item: Item, priority: Priority, *, num_bytes: int = 0, timeout_s: float | None = None
    ) -> QueueEntry[Item]:
        """Queue an item, waiting for room: at most `timeout_s` seconds, 0 to wait for none.

        Raises CapacityError where there was none in time, ClosedError once the queue is closed; nothing is queued.
        """
        counted = num_bytes if self._max_bytes is None else min(num_bytes, self._max_bytes)
        entry = QueueEntry(item, priority, counted)
        with self._changed:
            has_room = self._wait_for_room(entry, timeout_s)
            if self._is_closed:
                raise ClosedError("the queue is closed")
            if not has_room:
                waiting = f"{len(self._lanes[priority])} entries, {self._bytes[priority]} bytes"
                raise CapacityError(f"no room for more {priority.name.lower()} work: {waiting} wait already")
            self._lanes[priority][entry] = None
            self._bytes[priority] += counted
            self._changed.notify_all()
        return entry

    def take(self) -> QueueEntry[Item] | None:
        """Return the most urgent item, waiting for one; None once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self) > 0)
            return self._pop()

    def try_take(self) -> QueueEntry[Item] | None:
        """Return the most urgent item, or None if none waits."""
        with self._changed:
            return self._pop()

    def put_back(self, entry: QueueEntry[Item]) -> None:
        """Let what was taken be taken again, before all others of its priority; it can no longer be cancelled.

        Takes no notice of the bounds: the item had its place already.
        """
        with self._changed:
            lane = self._lanes[entry.priority]
            lane[entry] = None
            lane.move_to_end(entry, last=False)
            self._bytes[entry.priority] += entry.num_bytes
            self._taken_back.add(entry)
            self._changed.notify_all()

    def cancel(self, entry: QueueEntry[Item]) -> bool:
        """Take an item out that nobody has taken yet. False if somebody has."""
        with self._changed:
            if entry in self._taken_back or entry not in self._lanes[entry.priority]:
                return False
            self._remove(entry)
            return True

    def close(self) -> None:
        """Take nothing more; what waits can still be taken. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait_for_room(self, entry: QueueEntry[Item], timeout_s: float | None) -> bool:
        """Return whether there is room, or the queue is closed. Else large items would wait as long as small ones come.

        The caller holds the lock.
        """
        assert self._changed.is_owned()
        line = self._at_the_door[entry.priority]
        line.append(entry)
        try:
            return self._changed.wait_for(
                lambda: self._is_closed or (line[0] is entry and self._has_room(entry)), timeout_s
            )
        finally:
            line.remove(entry)
            self._changed.notify_all()

    def _has_room(self, entry: QueueEntry[Item]) -> bool:
        """Tell whether one more item is within the bounds; the caller holds the lock."""
        assert self._changed.is_owned()
        lane, num_bytes = self._lanes[entry.priority], self._bytes[entry.priority] + entry.num_bytes
        return len(lane) < self._max_entries and (self._max_bytes is None or num_bytes <= self._max_bytes)

    def _pop(self) -> QueueEntry[Item] | None:
        """Take the item whose turn it is, if there is one; the caller holds the lock."""
        assert self._changed.is_owned()
        waiting = [each for each in Priority if self._lanes[each]]
        if not waiting:
            return None
        chosen = next((each for each in waiting if self._passed_over[each] >= self._patience), waiting[0])
        for each in waiting:
            self._passed_over[each] += 1
        self._passed_over[chosen] = 0
        entry = next(iter(self._lanes[chosen]))
        self._remove(entry)
        return entry

    def _remove(self, entry: QueueEntry[Item]) -> None:
        """Take an item out; the caller holds the lock."""
        assert self._changed.is_owned()
        del self._lanes[entry.priority][entry]
        self._bytes[entry.priority] -= entry.num_bytes
        self._taken_back.discard(entry)
        self._changed.notify_all()


class PriorityThreads:
    """A fixed number of threads; one that is free takes the most urgent job. Jobs must not wait for jobs.

    One job in 32 is another's, where more urgent ones never end: what is to be written down holds memory that requests
    wait for, and whoever closes or flushes waits for it too.
    A job that has begun is not interrupted, so an urgent one waits at most for the shortest rest of those in work.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._queue: WorkQueue[Callable[[], None]] = WorkQueue(max_entries=_MAX_JOBS, patience=PATIENCE)
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a function called; the future has what came of it. Raises ClosedError after `shutdown`."""
        future: Future[Result] = Future()
        self._queue.put(lambda: _work(future, function, arguments), priority)
        return future

    def map(self, priority: Priority, function: Callable[..., Result], *iterables: Iterable[Any]) -> list[Result]:
        """Call a function with the items of the iterables, as the built-in does, several at once.

        Whatever is raised here, also an interrupt, all calls have ended before: nobody still works on the arguments.
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
        """Do what is queued, then end the threads. May be called twice."""
        self._queue.close()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while job := self._queue.take():
            job.item()
            del job  # it holds its arguments, and the next one may be long in coming


def _work(future: Future[Result], function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments)
    except BaseException as exc:  # noqa: BLE001 - whoever asks the future gets it
        future.set_exception(exc)
    else:
        future.set_result(result)
