"""Bounded queues of work beside the requests, and the threads that take from them.

A `WorkQueue` orders items by priority class, and a `PriorityThreadPool` takes the most urgent one. `WriteBehind` is one
thread that takes jobs in their order, in batches.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

from tierkv.errors import CapacityError, ClosedError, ConfigError
from tierkv.values.locks import OwnedLock

__all__ = ["PATIENCE", "Priority", "PriorityThreadPool", "QueueEntry", "WorkQueue", "WriteBehind"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Job = TypeVar("Job")

_MAX_JOBS = 4096
_POLL_S = 0.1
_log = logging.getLogger(__name__)
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
        self._lock = OwnedLock()
        self._has_items = threading.Condition(self._lock)  # apart from the next: an item wakes one thread, not all
        self._has_left = threading.Condition(self._lock)

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
        with self._lock:
            has_room = self._wait_for_room(entry, timeout_s)
            if self._is_closed:
                raise ClosedError("the queue is closed")
            if not has_room:
                waiting = f"{len(self._queues[priority])} entries, {self._bytes[priority]} bytes"
                raise CapacityError(f"no room for more {priority.name.lower()} work: {waiting} are queued")
            self._queues[priority][entry] = None
            self._bytes[priority] += counted
            self._has_items.notify()
        return entry

    def take(self) -> QueueEntry[Item] | None:
        """Wait for an item and return the most urgent one; None once the queue is closed and empty."""
        with self._lock:
            self._has_items.wait_for(lambda: self._is_closed or len(self) > 0)
            return self._pop()

    def try_take(self) -> QueueEntry[Item] | None:
        """Return the most urgent item; None if the queue is empty."""
        with self._lock:
            return self._pop()

    def put_back(self, entry: QueueEntry[Item]) -> None:
        """Queue a taken item again, before all others of its class and beyond the bounds. It cannot be cancelled."""
        with self._lock:
            queue = self._queues[entry.priority]
            queue[entry] = None
            queue.move_to_end(entry, last=False)
            self._bytes[entry.priority] += entry.num_bytes
            self._returned.add(entry)
            self._has_items.notify()

    def cancel(self, entry: QueueEntry[Item]) -> bool:
        """Remove an item that was not taken yet. Return False if it was."""
        with self._lock:
            if entry in self._returned or entry not in self._queues[entry.priority]:
                return False
            self._remove(entry)
            return True

    def close(self) -> None:
        """Refuse new items; queued items can still be taken. May be called twice."""
        with self._lock:
            self._is_closed = True
            self._has_items.notify_all()
            self._has_left.notify_all()

    def _wait_for_room(self, entry: QueueEntry[Item], timeout_s: float | None) -> bool:
        """Wait for room, in the order of the callers, so that small items do not overtake a large one for ever.

        Return whether there is room, or the queue is closed. The caller holds the lock.
        """
        assert self._lock.is_owned()
        waiters = self._waiters[entry.priority]
        waiters.append(entry)
        try:
            return self._has_left.wait_for(
                lambda: self._is_closed or (waiters[0] is entry and self._has_room(entry)), timeout_s
            )
        finally:
            waiters.remove(entry)
            self._has_left.notify_all()

    def _has_room(self, entry: QueueEntry[Item]) -> bool:
        """Return whether one more item is within the bounds; the caller holds the lock."""
        assert self._lock.is_owned()
        queue, num_bytes = self._queues[entry.priority], self._bytes[entry.priority] + entry.num_bytes
        return len(queue) < self._max_entries and (self._max_bytes is None or num_bytes <= self._max_bytes)

    def _pop(self) -> QueueEntry[Item] | None:
        """Remove and return the next item, or None; the caller holds the lock."""
        assert self._lock.is_owned()
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
        assert self._lock.is_owned()
        del self._queues[entry.priority][entry]
        self._bytes[entry.priority] -= entry.num_bytes
        self._returned.discard(entry)
        self._has_left.notify_all()


class PriorityThreadPool:
    """A fixed number of threads; a free thread takes the most urgent job. A job must not wait for another job.

    Of 32 jobs at least one is of a less urgent class, if there is any: requests, `close` and `flush` wait for the
    memory that demotions hold. A job is never interrupted, so an urgent job waits until the first thread is free.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        self.num_threads = num_threads
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


class WriteBehind(Generic[Job]):
    """Calls `process` with batches of at most `batch_size` jobs, in order, on a thread of its own.

    `process` must release what its jobs hold, also when it fails. Its exceptions are logged; the next batch follows.
    """

    def __init__(
        self,
        process: Callable[[list[Job]], None],
        *,
        capacity: int,
        batch_size: int,
        name: str = "tierkv-write",
    ) -> None:
        self.capacity = capacity
        self._process = process
        self._batch_size = batch_size
        self._jobs: deque[Job] = deque()
        self._num_in_work = 0
        self._started_at = 0.0  # of the batch in work
        self._is_closing = False
        self._is_abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs queued or in work."""
        with self._changed:
            return len(self._jobs) + self._num_in_work

    def try_put(self, job: Job) -> bool:
        """Queue a job. Return False, without the job, if the queue is full or closing."""
        with self._changed:
            if self._is_closing or len(self._jobs) >= self.capacity:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    def try_put_all(self, jobs: Sequence[Job]) -> int:
        """Queue the first jobs, as many as there is room for, and return how many; none if the queue is closing."""
        with self._changed:
            count = 0 if self._is_closing else min(len(jobs), self.capacity - len(self._jobs))
            if count > 0:
                self._jobs.extend(jobs[:count])
                self._changed.notify_all()
            return max(count, 0)

    @property
    def stalled_s(self) -> float:
        """Seconds since the batch in work began; 0 without one."""
        with self._changed:
            return time.monotonic() - self._started_at if self._num_in_work else 0.0

    def queued(self) -> list[Job]:
        """Return the jobs that are not in work yet, oldest first."""
        with self._changed:
            return list(self._jobs)

    def drop_oldest(self, count: int, may_drop: Callable[[Job], bool]) -> list[Job]:
        """Remove up to `count` of the oldest queued jobs; the caller releases what they hold."""
        dropped: list[Job] = []
        with self._changed:
            kept: list[Job] = []
            while self._jobs and len(dropped) < count:
                job = self._jobs.popleft()
                (dropped if may_drop(job) else kept).append(job)
            self._jobs.extendleft(reversed(kept))
            self._changed.notify_all()
        return dropped

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue jobs of the batch in work again, in front of all others. Only `process` calls this."""
        with self._changed:
            self._jobs.extendleft(reversed(jobs))
            self._num_in_work -= len(jobs)
            self._changed.notify_all()

    def flush(self, *, stall_s: float = math.inf) -> bool:
        """Wait until all queued jobs have been processed, or `close` has abandoned them; then return True.

        Return False if one batch takes longer than `stall_s`.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: (not self._jobs and not self._num_in_work) or self._is_abandoned,
                timeout=None if stall_s == math.inf else min(stall_s, _POLL_S),
            ):
                if self._num_in_work and time.monotonic() - self._started_at > stall_s:
                    return False
            return True

    def close(self, *, stall_s: float = math.inf) -> list[Job]:
        """Process the queued jobs, then stop the thread. May be called twice.

        If one batch takes longer than `stall_s`, the jobs after it are returned instead, and the thread stays in that
        batch: see `is_running`.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(min(_POLL_S, stall_s))
            if self.stalled_s > stall_s:
                with self._changed:
                    left = list(self._jobs)
                    self._jobs.clear()
                    self._is_abandoned = True
                    self._changed.notify_all()
                return left
        return []

    @property
    def is_running(self) -> bool:
        """Whether the thread may still use what its jobs hold."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._is_closing)
                batch = [self._jobs.popleft() for _ in range(min(self._batch_size, len(self._jobs)))]
                self._num_in_work = len(batch)
                self._started_at = time.monotonic()
            if not batch:
                return
            try:
                self._process(batch)
            except Exception:  # noqa: BLE001 - the outermost loop of its thread
                _log.exception("writing %d blocks to lower tiers failed", len(batch))
            finally:
                with self._changed:
                    self._num_in_work = 0
                    self._changed.notify_all()
