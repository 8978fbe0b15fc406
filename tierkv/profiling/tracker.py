"""MemoryTracker: every pool, buffer and block of a cache, with where it lies, when it was used and how often."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tierkv.errors import ConfigError
from tierkv.profiling.ledger import AllocationEvent, AllocationLedger, MemoryAllocation
from tierkv.profiling.step_sampler import StepSampler
from tierkv.values.block import Tier
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion, RequestEvent, Span
from tierkv.values.locks import OwnedLock

__all__ = ["AllocationEvent", "MemoryAllocation", "MemoryTracker"]

_ARRIVALS = (EventKind.REGISTER, EventKind.PROMOTE, EventKind.DEMOTE)


class TensorLike(Protocol):
    """What the tracker reads of a tensor; torch's have it."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    @property
    def nbytes(self) -> int: ...
    def data_ptr(self) -> int: ...


class Observable(Protocol):
    """A cache that can be watched."""

    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


class MemoryTracker:
    """Knows every allocation it was told of. Satisfies `CacheObserver`: `watch` a cache, or register tensors.

    history_size: events that are kept; older ones are dropped and counted. sample_every: of so many steps of
    decoding one is recorded, chosen at random and counted that many times, because they are the hot path.
    Thread-safe. Imports no torch.

    >>> tracker = MemoryTracker()
    >>> key = tracker.register_allocation(torch.ones(256), "activations")
    >>> tracker.total_allocated
    1024
    """

    def __init__(
        self,
        *,
        history_size: int = 10_000,
        sample_every: int = 16,
        clock: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        if history_size < 1 or sample_every < 1:
            raise ConfigError(f"history_size {history_size} and sample_every {sample_every} must be positive")
        self.sample_every = sample_every
        self._lock = OwnedLock()
        self._ledger = AllocationLedger(history_size=history_size, clock=clock, lock=self._lock)
        self.allocations: Mapping[str, MemoryAllocation] = self._ledger.allocations
        self.allocation_history: Sequence[AllocationEvent] = self._ledger.history
        self._regions: dict[Tier, MemoryRegion] = {}
        self._clock = clock
        self._hot_blocks: dict[int, MemoryAllocation] = {}  # by block id: the hot path builds no keys
        self._sampler = StepSampler(sample_every, seed=seed)
        self._serial = 0
        self._collected: deque[str] = deque()

    @property
    def total_allocated(self) -> int:
        """Bytes in use now; those of parts are not counted twice."""
        return self._ledger.total_allocated

    @property
    def peak_allocated(self) -> int:
        """The most bytes in use at a time."""
        return self._ledger.peak_allocated

    @property
    def dropped_events(self) -> int:
        """Events that the history has no room for any more."""
        return self._ledger.dropped_events

    def watch(self, cache: Observable) -> None:
        """Track everything a cache holds, what is there already included. One cache to a tracker."""
        if self._regions:
            raise ConfigError("this tracker watches a cache already", hint="use one tracker for each cache")
        cache.add_observer(self)

    def unwatch(self, cache: Observable) -> None:
        """Track a watched cache no more and forget its memory; peaks and history stay."""
        cache.remove_observer(self)
        with self._lock:
            pools = {region.purpose for region in self._regions.values()}
            mine = [key for key, each in self.allocations.items() if each.part_of in pools or key in pools]
            for allocation_id in mine:
                self._ledger.drop(allocation_id)
            self._regions.clear()
            self._hot_blocks.clear()

    def register_allocation(self, tensor: TensorLike, purpose: str, **metadata: Any) -> str:
        """Track a tensor until it is collected or given to `free_allocation`. Return the allocation's id.

        The tracker keeps no reference to it. Two tensors over the same memory count twice: say part_of="the other's
        id" for a view.
        """
        part_of = metadata.pop("part_of", None)
        with self._lock:
            self._serial += 1
            self._collect()
            allocation = self._ledger.allocate(
                allocation_id=f"{purpose.replace(' ', '-')}:{self._serial}",
                purpose=purpose,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                size_bytes=tensor.nbytes,
                tensor_ptr=tensor.data_ptr(),
                device=str(tensor.device),
                part_of=part_of,
                metadata=metadata,
            )
        # A finalizer runs wherever the collector does, perhaps under our lock: it only leaves a note.
        weakref.finalize(tensor, self._collected.append, allocation.allocation_id).atexit = False
        return allocation.allocation_id

    def free_allocation(self, allocation_id: str) -> None:
        """Forget an allocation. No error if it is gone already."""
        with self._lock:
            self._ledger.free(allocation_id, EventKind.FREE)

    def update_access(self, allocation_id: str, count: int = 1) -> None:
        """Count `count` uses of an allocation, the last of them now. Raises ConfigError for an unknown id."""
        with self._lock:
            if allocation_id not in self.allocations:
                raise ConfigError(f"no allocation {allocation_id!r}")
            self._ledger.touch(self.allocations[allocation_id], count)

    def get_allocation_summary(self) -> dict[str, Any]:
        """Return totals, peaks and counts, by purpose and by device; bytes of parts are in `by_purpose` only."""
        with self._lock:
            self._collect()
            return {**self._ledger.summary(), "sample_every": self.sample_every}

    def list_allocations(self) -> list[MemoryAllocation]:
        """Return what is allocated now, pools before their blocks."""
        with self._lock:
            self._collect()
            return sorted(self.allocations.values(), key=lambda each: (each.part_of is not None, each.created_at))

    # --- CacheObserver ---------------------------------------------------------------------------------

    def on_memory(self, region: MemoryRegion) -> None:
        """Track a pool or buffer of the cache."""
        with self._lock:
            if region.tier:
                self._regions[region.tier] = region
            self._collect()
            self._ledger.allocate(
                allocation_id=region.purpose,
                purpose=region.purpose,
                shape=region.shape,
                dtype=region.dtype,
                size_bytes=region.num_bytes,
                tensor_ptr=region.address,
                device=region.device,
                part_of=region.part_of,
            )

    def on_block(self, event: BlockEvent) -> None:
        """Track a block that comes or goes."""
        with self._lock:
            region = self._regions.get(event.tier) if event.tier else None
            if region and event.slot is not None and event.kind in _ARRIVALS:
                self._allocate_block(region, event)
            elif region and event.slot is not None and event.kind is EventKind.EVICT:
                if event.tier is Tier.HOT:
                    self._hot_blocks.pop(event.slot, None)
                self._ledger.free(_block_id(event.tier, event.slot), event.kind, event)
            elif region and event.slot is not None and event.kind is EventKind.MOVE:
                self._move_block(region, event)
            else:
                self._ledger.note_block(event)

    def on_request(self, event: RequestEvent) -> None:
        """Count the hits as uses of the blocks that answered."""
        with self._lock:
            for block in event.blocks:
                self._ledger.note_block(block)
                allocation = self.allocations.get(_block_id(block.tier, block.slot)) if block.slot is not None else None
                if allocation:
                    self._ledger.touch(allocation, 1)

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Count a step's use of its hot blocks, sampled."""
        if not self._sampler.is_due():
            return
        with self._lock:
            now, hot = self._clock(), self._hot_blocks
            for block_id in block_ids:
                allocation = hot.get(block_id)
                if allocation:
                    allocation.access_count += self.sample_every
                    allocation.last_accessed = now

    def on_span(self, span: Span) -> None:
        """Nothing to track: work is not memory."""

    def _allocate_block(self, region: MemoryRegion, event: BlockEvent) -> None:
        """Note that a block has bytes in a region; the caller holds the lock."""
        assert self._lock.is_owned()
        assert event.tier and event.slot is not None
        self._collect()
        made = self._ledger.allocate(
            event=event,
            allocation_id=_block_id(event.tier, event.slot),
            purpose=f"{event.tier.value} block",
            shape=region.shape[1:],
            dtype=region.dtype,
            size_bytes=region.slot_bytes,
            tensor_ptr=region.address + event.slot * region.slot_bytes,
            device=region.device,
            part_of=region.purpose,
            block_hash=event.block_hash,
            metadata={"num_tokens": event.num_tokens},
        )
        if event.tier is Tier.HOT:
            self._hot_blocks[event.slot] = made

    def _move_block(self, region: MemoryRegion, event: BlockEvent) -> None:
        """Keep what is known of a block under its new place; the caller holds the lock."""
        assert self._lock.is_owned()
        assert event.tier is Tier.HOT and event.slot is not None and event.moved_from is not None
        moved = self._ledger.allocations.pop(_block_id(event.tier, event.moved_from), None)
        if moved is None:
            return
        self._hot_blocks.pop(event.moved_from, None)
        moved.allocation_id = _block_id(event.tier, event.slot)
        moved.tensor_ptr = region.address + event.slot * region.slot_bytes
        self._ledger.allocations[moved.allocation_id] = self._hot_blocks[event.slot] = moved
        self._ledger.note(moved, event.kind, event)

    def _collect(self) -> None:
        """Note what the collector has freed; the caller holds the lock."""
        assert self._lock.is_owned()
        while self._collected:
            self._ledger.free(self._collected.popleft(), EventKind.FREE)


def _block_id(tier: Tier | None, slot: int) -> str:
    return f"{tier.value}:{slot}" if tier else ""
