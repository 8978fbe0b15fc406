"""The queue of work against a model of ten lines, and threads that take the most urgent job first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tierkv.background.work_queue import Priority, PriorityThreadPool, QueueEntry, WorkQueue
from tierkv.errors import CapacityError, ClosedError, ConfigError

MAX_ENTRIES, MAX_BYTES = 4, 100


class ModelledQueue(RuleBasedStateMachine):
    """The model is a list of (priority, order, entry), sorted before each take."""

    entries = Bundle("entries")
    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.queue: WorkQueue[int] = WorkQueue(max_entries=MAX_ENTRIES, max_bytes=MAX_BYTES)
        self.model: list[tuple[Priority, int, QueueEntry[int]]] = []
        self.returned: set[QueueEntry[int]] = set()
        self.count = 0

    @rule(target=entries, priority=st.sampled_from(Priority), num_bytes=st.integers(0, 150))
    def put(self, priority: Priority, num_bytes: int) -> QueueEntry[int] | None:
        same = [entry for each, _, entry in self.model if each is priority]
        counted = min(num_bytes, MAX_BYTES)
        fits = len(same) < MAX_ENTRIES and sum(entry.num_bytes for entry in same) + counted <= MAX_BYTES
        self.count += 1
        if not fits:
            with pytest.raises(CapacityError):
                self.queue.put(self.count, priority, num_bytes=num_bytes, timeout_s=0)
            return None
        entry = self.queue.put(self.count, priority, num_bytes=num_bytes, timeout_s=0)
        self.model.append((priority, self.count, entry))
        return entry

    @rule(target=taken)
    def take(self) -> QueueEntry[int] | None:
        self.model.sort(key=lambda each: each[:2])
        want = self.model.pop(0)[2] if self.model else None
        got = self.queue.try_take()
        assert got is want
        return got

    @rule(entry=consumes(taken))
    def put_back(self, entry: QueueEntry[int] | None) -> None:
        if entry is None:
            return
        self.queue.put_back(entry)
        self.returned.add(entry)
        first = min((order for priority, order, _ in self.model if priority is entry.priority), default=0)
        self.model.append((entry.priority, first - 1, entry))
        assert not self.queue.cancel(entry), "it has been taken once, and may be half done"

    @rule(entry=entries)
    def cancel(self, entry: QueueEntry[int] | None) -> None:
        waiting = [each for each in self.model if each[2] is entry and entry not in self.returned]
        is_fresh = bool(entry and waiting)
        assert entry is None or self.queue.cancel(entry) == is_fresh
        if is_fresh:
            self.model.remove(waiting[0])

    @invariant()
    def has_the_length_of_the_model(self) -> None:
        assert len(self.queue) == len(self.model)


TestModelledQueue = ModelledQueue.TestCase


def test_who_waits_for_room_is_let_in_when_something_is_taken() -> None:
    queue: WorkQueue[str] = WorkQueue(max_entries=1)
    queue.put("first", Priority.DEMOTION)
    queue.put("urgent", Priority.REQUEST, timeout_s=0)  # each priority has a bound of its own
    late = threading.Thread(target=queue.put, args=("second", Priority.DEMOTION))
    late.start()
    assert [entry.item for _ in range(3) if (entry := queue.take())] == ["urgent", "first", "second"]
    late.join()


def test_a_closed_queue_hands_out_what_waits_and_takes_nothing_more() -> None:
    queue: WorkQueue[str] = WorkQueue(max_entries=1)
    queue.put("last", Priority.PREFETCH)
    refused: list[Exception] = []

    def put() -> None:
        try:
            queue.put("too late", Priority.PREFETCH)
        except ClosedError as exc:
            refused.append(exc)

    waiting = threading.Thread(target=put, daemon=True)
    waiting.start()
    deadline = time.monotonic() + 20
    while not queue._waiters[Priority.PREFETCH]:
        assert time.monotonic() < deadline, "it does not wait for room"
    queue.close()
    queue.close()
    waiting.join(20)
    entry = queue.take()
    assert entry and entry.item == "last"
    assert queue.take() is None
    assert len(refused) == 1


def test_nobody_goes_before_one_who_waits_for_room() -> None:
    queue: WorkQueue[str] = WorkQueue(max_entries=9, max_bytes=10)
    queue.put("first", Priority.REQUEST, num_bytes=6)
    large = threading.Thread(target=queue.put, args=("large", Priority.REQUEST), kwargs={"num_bytes": 8})
    large.start()
    deadline = time.monotonic() + 20
    while True:
        try:
            small = queue.put("small", Priority.REQUEST, num_bytes=1, timeout_s=0)
        except CapacityError:
            break
        queue.cancel(small)  # the large one did not wait yet
        assert time.monotonic() < deadline, "small ones keep a large one out for ever"
    assert [entry.item for _ in range(2) if (entry := queue.take())] == ["first", "large"]
    large.join()
    queue.put("small", Priority.REQUEST, num_bytes=1, timeout_s=0)


def test_what_has_been_passed_over_often_enough_has_its_turn() -> None:
    queue: WorkQueue[str] = WorkQueue(max_entries=99, patience=3)
    for each in Priority:
        for _ in range(9):
            queue.put(each.name[0], each)
    assert "".join(entry.item for _ in range(27) if (entry := queue.take())) == "RRRPDRRPDRRPDRRPDPPPDPPDDDD"


def test_a_queue_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        WorkQueue(max_entries=0)


def test_a_free_thread_takes_the_most_urgent_job() -> None:
    gate, has_begun, order = threading.Event(), threading.Event(), list[str]()

    def block() -> None:
        has_begun.set()
        assert gate.wait(20)

    threads = PriorityThreadPool(1, name="test")
    threads.submit(Priority.DEMOTION, block)
    assert has_begun.wait(20)
    jobs = [threads.submit(each, order.append, each.name) for each in reversed(Priority) for _ in range(2)]
    dropped = threads.submit(Priority.REQUEST, order.append, "cancelled")
    assert dropped.cancel()
    gate.set()
    for job in jobs:
        job.result(20)
    assert order == ["REQUEST"] * 2 + ["PREFETCH"] * 2 + ["DEMOTION"] * 2
    threads.shutdown()
    threads.shutdown()
    with pytest.raises(ClosedError, match="closed"):
        threads.submit(Priority.REQUEST, block)


@pytest.mark.parametrize("priority", [Priority.PREFETCH, Priority.DEMOTION])
def test_a_less_urgent_job_is_done_beside_urgent_ones_that_never_end(priority: Priority) -> None:
    threads = PriorityThreadPool(1, name="test")
    is_done, is_over, num_urgent = threading.Event(), threading.Event(), 0

    def urgent() -> None:
        nonlocal num_urgent
        num_urgent += 1
        if is_done.is_set() or num_urgent == 1000:
            is_over.set()
        else:
            threads.submit(Priority.REQUEST, urgent)  # so that one always waits

    threads.submit(Priority.REQUEST, lambda: [threads.submit(priority, is_done.set), urgent()])
    assert is_over.wait(20)
    assert num_urgent < 50
    threads.shutdown()


def test_calls_that_cannot_all_be_queued_have_ended_when_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, has_begun, ended = threading.Event(), threading.Event(), threading.Event()

    def call(number: int) -> None:
        has_begun.set()
        assert gate.wait(20)
        ended.set()

    threads = PriorityThreadPool(1, name="test")
    submit = threads.submit

    def refuse_second(priority: Priority, function: Callable[[int], None], number: int) -> Future[None]:
        if number:
            assert has_begun.wait(20)
            threading.Timer(0.05, gate.set).start()
            raise ClosedError("the queue is closed")
        return submit(priority, function, number)

    monkeypatch.setattr(threads, "submit", refuse_second)
    with pytest.raises(ClosedError):
        threads.map(Priority.REQUEST, call, range(2))
    assert ended.is_set()
    threads.shutdown()


def test_a_call_that_raises_is_told_when_the_others_have_ended() -> None:
    failed, ended = threading.Event(), threading.Event()

    def call(number: int) -> int:
        if number == 0:
            failed.set()
            raise ValueError("zero")
        assert failed.wait(20)
        ended.set()
        return number

    threads = PriorityThreadPool(2, name="test")
    with pytest.raises(ValueError, match="zero"):
        threads.map(Priority.REQUEST, call, range(2))
    assert ended.is_set()
    assert threads.map(Priority.REQUEST, call, (1, 2, 3)) == [1, 2, 3]
    threads.shutdown()


def test_each_waiting_thread_gets_an_item_that_is_put_or_put_back() -> None:
    queue: WorkQueue[int] = WorkQueue(max_entries=4)
    queue.put(1, Priority.REQUEST)
    first = queue.try_take()
    assert first is not None
    taken: list[QueueEntry[int] | None] = []
    threads = [threading.Thread(target=lambda: taken.append(queue.take()), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10.0
    while len(queue._has_items._waiters) < 3:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    queue.put_back(first)
    queue.put(2, Priority.REQUEST)
    queue.put(3, Priority.DEMOTION)
    for thread in threads:
        thread.join(10.0)
    assert sorted(each.item for each in taken if each) == [1, 2, 3]
