"""Stack distances, compared with caches that are run one by one."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from tierkv.profiling.measured import HitCurve
from tierkv.profiling.recorder import ReuseRecorder


def lru_hits(requests: list[list[int]], capacity: int) -> int:
    """Run an LRU cache that uses the blocks of a request last to first, as children go before parents."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        hits += sum(block in cache for block in blocks)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
            while len(cache) > capacity:
                cache.popitem(last=False)
    return hits


@given(st.lists(st.lists(st.integers(0, 12), max_size=6, unique=True), max_size=40))
def test_one_pass_counts_what_a_cache_of_each_size_would_hold(requests: list[list[int]]) -> None:
    recorder = ReuseRecorder()
    for blocks in requests:
        recorder.record_request([bytes([block]) for block in blocks])
    distances = recorder.distances()
    curve = HitCurve(sorted(each for each in distances if each is not None), asked=len(distances))
    hits = {capacity: lru_hits(requests, capacity) for capacity in range(15)}
    assert {capacity: curve.hits(capacity) for capacity in hits} == hits
    for wanted in range(max(hits.values()) + 1):
        assert curve.smallest(wanted) == min(capacity for capacity, count in hits.items() if count >= wanted)


def test_a_block_never_used_before_has_no_distance() -> None:
    recorder = ReuseRecorder()
    recorder.record_request([b"a", b"b"])
    recorder.record_request([b"a", b"c"])
    assert recorder.distances() == [None, None, 0, None]


def test_a_block_that_was_computed_meanwhile_pushes_others_down() -> None:
    recorder = ReuseRecorder()
    recorder.record_request([b"a"])
    recorder.record_arrival(b"x")
    recorder.record_request([b"a"])
    assert recorder.distances() == [None, 1]


def test_what_comes_after_the_bound_is_counted_and_not_kept() -> None:
    recorder = ReuseRecorder(max_uses=2)
    for name in (b"a", b"b", b"c"):
        recorder.record_request([name])
    assert recorder.dropped_requests == 1 and recorder.distances() == [None, None]
