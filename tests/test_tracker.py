"""The memory tracker, with the events of a cache."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.profiling.prefixes import PrefixTable
from tierkv.profiling.tracker import MemoryTracker
from tierkv.values.block import Tier
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion, RequestEvent

HOT = MemoryRegion(
    purpose="hot pool", shape=(5, 8), dtype="float32", num_bytes=160, address=1000, device="cuda:0", tier=Tier.HOT,
    slot_bytes=32,
)  # fmt: skip
SCRATCH = MemoryRegion(
    purpose="scratch block",
    shape=(8,),
    dtype="float32",
    num_bytes=32,
    address=1128,
    device="cuda:0",
    part_of="hot pool",
)


class FakeTensor:
    """Two rows of three float16."""

    shape: Sequence[int] = (2, 3)
    dtype: Any = "torch.float16"
    device: Any = "cpu"
    nbytes = 12

    def data_ptr(self) -> int:
        return 77


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def block(kind: EventKind, tier: Tier | None, number: int, *, slot: int | None = None, parent: int = 0) -> BlockEvent:
    return BlockEvent(kind, tier, bytes([number]), bytes([parent]), 4, 32, slot)


def tracker_of_a_pool(**options: Any) -> MemoryTracker:
    tracker = MemoryTracker(clock=FakeClock(), **options)
    tracker.on_memory(HOT)
    tracker.on_memory(SCRATCH)
    return tracker


def test_a_registered_tensor_is_described_by_all_that_is_known_of_it() -> None:
    tracker = MemoryTracker(clock=FakeClock())
    tensor = FakeTensor()
    allocation_id = tracker.register_allocation(tensor, "workspace", layer=3)
    (found,) = tracker.list_allocations()
    assert (found.allocation_id, found.purpose, found.shape, found.dtype) == (
        allocation_id, "workspace", (2, 3), "float16",
    )  # fmt: skip
    assert (found.size_bytes, found.tensor_ptr, found.device, found.metadata) == (12, 77, "cpu", {"layer": 3})
    assert tracker.total_allocated == 12


def test_a_tensor_that_is_collected_is_freed_and_the_peak_stays() -> None:
    tracker = MemoryTracker()
    tensors = [FakeTensor(), FakeTensor()]
    for tensor in tensors:
        tracker.register_allocation(tensor, "workspace")
    del tensor
    tensors.pop()
    gc.collect()
    summary = tracker.get_allocation_summary()
    assert (summary["total_allocated"], summary["peak_allocated"], summary["num_allocations"]) == (12, 24, 1)
    assert [event.kind for event in tracker.allocation_history] == [
        EventKind.ALLOCATE, EventKind.ALLOCATE, EventKind.FREE,
    ]  # fmt: skip


def test_updating_an_access_counts_it_and_moves_the_time() -> None:
    tracker = MemoryTracker(clock=FakeClock())
    tensor = FakeTensor()
    allocation_id = tracker.register_allocation(tensor, "buffer")
    tracker.update_access(allocation_id)
    tracker.update_access(allocation_id)
    (found,) = tracker.list_allocations()
    assert found.access_count == 2 and found.last_accessed > found.created_at


def test_an_unknown_allocation_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="no allocation 'hot:1'"):
        MemoryTracker().update_access("hot:1")


def test_a_part_is_listed_and_not_counted_twice() -> None:
    summary = tracker_of_a_pool().get_allocation_summary()
    assert summary["total_allocated"] == 160
    assert summary["by_device"] == {"cuda:0": 160}
    assert summary["by_purpose"]["scratch block"]["bytes"] == 32


def test_a_block_lies_in_its_pool_at_its_slot() -> None:
    tracker = tracker_of_a_pool()
    tracker.on_block(block(EventKind.REGISTER, Tier.HOT, 1, slot=3))
    found = tracker.allocations["hot:3"]
    assert (found.tensor_ptr, found.size_bytes, found.part_of) == (1000 + 3 * 32, 32, "hot pool")
    assert found.block_hash == bytes([1])


def test_an_evicted_block_is_gone_and_its_history_stays() -> None:
    tracker = tracker_of_a_pool()
    tracker.on_block(block(EventKind.REGISTER, Tier.HOT, 1, slot=3))
    tracker.on_block(block(EventKind.EVICT, Tier.HOT, 1, slot=3))
    assert "hot:3" not in tracker.allocations
    last = tracker.allocation_history[-1]
    assert (last.kind, last.block_hash, last.tier) == (EventKind.EVICT, bytes([1]), Tier.HOT)
    assert tracker.get_allocation_summary()["by_purpose"]["hot block"]["peak_bytes"] == 32


def test_a_hit_is_a_use_of_the_block_that_answered() -> None:
    tracker = tracker_of_a_pool()
    tracker.on_block(block(EventKind.REGISTER, Tier.HOT, 1, slot=3))
    tracker.on_request(RequestEvent(4, {}, (block(EventKind.HIT, Tier.HOT, 1, slot=3),)))
    assert tracker.allocations["hot:3"].access_count == 1


def test_a_block_in_the_store_is_history_and_no_memory() -> None:
    tracker = tracker_of_a_pool()
    tracker.on_block(block(EventKind.DEMOTE, Tier.COLD, 1))
    assert len(tracker.allocations) == 2
    assert tracker.allocation_history[-1].kind is EventKind.DEMOTE


def test_the_history_is_bounded_and_says_what_it_dropped() -> None:
    tracker = tracker_of_a_pool(history_size=4)
    for _ in range(10):
        tracker.on_request(RequestEvent(4, {}, (block(EventKind.MISS, None, 1),)))
    summary = tracker.get_allocation_summary()
    assert len(tracker.allocation_history) == 4 and summary["dropped_events"] == 8
    assert summary["events"] == {"allocate": 2, "miss": 10}


def test_sampled_uses_add_up_to_about_all_of_them_whatever_the_batch() -> None:
    tracker = tracker_of_a_pool(sample_every=8)
    for slot in range(4):
        tracker.on_block(block(EventKind.REGISTER, Tier.HOT, slot + 1, slot=slot))
    for _ in range(2000):
        for slot in range(4):  # a batch of four sequences, one block each
            tracker.on_use([slot])
    counts = [tracker.allocations[f"hot:{slot}"].access_count for slot in range(4)]
    assert all(1400 < count < 2600 for count in counts), counts


def test_every_use_is_counted_where_nothing_is_sampled() -> None:
    tracker = tracker_of_a_pool(sample_every=1)
    tracker.on_block(block(EventKind.REGISTER, Tier.HOT, 1, slot=0))
    for _ in range(5):
        tracker.on_use([0, 1])
    assert tracker.allocations["hot:0"].access_count == 5


def test_a_second_cache_needs_a_second_tracker() -> None:
    with pytest.raises(ConfigError, match="observes a cache already"):
        tracker_of_a_pool().observe(NoCache())


class NoCache:
    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


def test_prompts_that_part_are_three_prefixes() -> None:
    table = PrefixTable()
    for number, parent in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 4)]:
        table.on_block(block(EventKind.REGISTER, Tier.HOT, number, slot=number, parent=parent))
    table.on_block(block(EventKind.DEMOTE, Tier.WARM, 1, slot=0))
    table.on_request(RequestEvent(4, {}, (block(EventKind.HIT, Tier.HOT, 2, slot=2), block(EventKind.MISS, None, 3))))
    shared, longer, shorter = table.largest(9)
    assert (shared.first_token, shared.num_tokens, shared.hits) == (0, 8, 1)
    assert shared.blocks == {Tier.HOT: 2, Tier.WARM: 1} and shared.num_bytes == 96
    assert (longer.first_token, longer.num_tokens, longer.block_hash) == (8, 8, bytes([5]))
    assert (shorter.first_token, shorter.num_tokens) == (8, 4)


def test_an_evicted_branch_leaves_one_prefix() -> None:
    table = PrefixTable()
    for number, parent in [(1, 0), (2, 1), (3, 1)]:
        table.on_block(block(EventKind.REGISTER, Tier.HOT, number, slot=number, parent=parent))
    table.on_block(block(EventKind.EVICT, Tier.HOT, 3, slot=3))
    (left,) = table.largest(9)
    assert left.num_tokens == 8
