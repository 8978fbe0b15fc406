"""One thread and a bounded queue: in order, and what a batch gives back goes first again."""

from __future__ import annotations

import threading

from tierkv.background.work_queue import WriteBehind

HANG_S = 20.0


def test_jobs_that_a_batch_puts_back_come_again_before_all_others() -> None:
    seen: list[list[int]] = []
    may_begin = threading.Event()

    def process(batch: list[int]) -> None:
        assert may_begin.wait(HANG_S)
        seen.append(batch)
        queue.put_back(batch[1:])

    queue: WriteBehind[int] = WriteBehind(process, capacity=8, batch_size=3)
    assert all(queue.try_put(job) for job in range(4))
    may_begin.set()
    queue.flush()
    queue.close()
    assert [batch[0] for batch in seen] == [0, 1, 2, 3]
    assert queue.pending == 0


def test_jobs_put_back_by_a_batch_that_stands_still_can_be_dropped() -> None:
    stuck, may_end = threading.Event(), threading.Event()

    def process(batch: list[int]) -> None:
        queue.put_back(batch[1:])
        stuck.set()
        assert may_end.wait(HANG_S)

    queue: WriteBehind[int] = WriteBehind(process, capacity=8, batch_size=3)
    for job in range(3):
        queue.try_put(job)
    assert stuck.wait(HANG_S)
    assert queue.queued() == [1, 2]
    assert queue.drop_oldest(8, lambda job: True) == [1, 2]
    assert queue.pending == 1
    may_end.set()
    queue.close()


def test_of_several_jobs_the_first_ones_that_fit_are_queued() -> None:
    may_end = threading.Event()
    begun = threading.Event()

    def process(batch: list[int]) -> None:
        begun.set()
        assert may_end.wait(HANG_S)

    queue: WriteBehind[int] = WriteBehind(process, capacity=3, batch_size=1)
    assert queue.try_put_all([0]) == 1
    assert begun.wait(HANG_S)
    assert queue.try_put_all([1, 2]) == 2
    assert queue.try_put_all([3, 4]) == 1
    assert queue.try_put_all([5]) == 0
    assert queue.queued() == [1, 2, 3]
    may_end.set()
    queue.close()
    assert queue.try_put_all([6]) == 0
