"""MemoryTracker: every pool, buffer and block of a cache, where each lies, when it was last used and how often."""

from __future__ import annotations

import random
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tierkv.errors import ConfigError
from tierkv.values.block import BlockHash, Tier
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion, RequestEvent, Span
from tierkv.values.locks import OwnedLock

__all__ = ["AllocationEvent", "MemoryAllocation", "MemoryTracker", "StepSampler"]

_ARRIVALS = (EventKind.REGISTER, EventKind.PROMOTE, EventKind.DEMOTE)


class TensorLike(Protocol):
    """What the tracker reads of a tensor."""

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
    """A cache that takes observers."""

    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


@dataclass(slots=True, kw_only=True)
class MemoryAllocation:
    """Memory in use. Times are seconds of the tracker's clock.

    tensor_ptr: address of the first byte on `device`. part_of: id of the allocation that contains this one, so that
    bytes are not counted twice. access_count: exact for hits, an estimate for decoding steps, which are sampled.
    """

    allocation_id: str
    purpose: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    tensor_ptr: int
    device: str
    created_at: float
    last_accessed: float
    access_count: int = 0
    part_of: str | None = None
    block_hash: BlockHash = b""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AllocationEvent:
    """One entry of the history. tier and block_hash: None and empty unless it is about a block."""

    time: float
    kind: EventKind
    allocation_id: str
    purpose: str
    size_bytes: int
    tier: Tier | None = None
    block_hash: BlockHash = b""
    reason: str = ""


@dataclass(slots=True)
class _Totals:
    """Bytes and counts of one purpose."""

    count: int = 0
    bytes: int = 0
    peak_bytes: int = 0

    def add(self, count: int, size: int) -> None:
        self.count += count
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)


class MemoryTracker:
    """Tracks the memory of a cache that it observes, and tensors that are registered. Satisfies `CacheObserver`.

    allocations: what is allocated now, by id. allocation_history: the latest `history_size` events, oldest first.
    sample_every: of so many decoding steps one is recorded, chosen at random and counted that many times, because
    decoding is the hot path. Thread-safe. Imports no torch.

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
        self.total_allocated: int = 0  # bytes now, without parts
        self.peak_allocated: int = 0
        self.dropped_events: int = 0  # that the history has no room for any more
        self.allocations: dict[str, MemoryAllocation] = {}
        self.allocation_history: deque[AllocationEvent] = deque(maxlen=history_size)
        self._events: Counter[EventKind] = Counter()
        self._purposes: dict[str, _Totals] = {}
        self._regions: dict[Tier, MemoryRegion] = {}
        self._hot_blocks: dict[int, MemoryAllocation] = {}  # by block id: the hot path builds no keys
        self._sampler = StepSampler(sample_every, seed=seed)
        self._num_registered = 0
        self._collected: deque[str] = deque()
        self._clock = clock
        self._lock = OwnedLock()

    def observe(self, cache: Observable) -> None:
        """Track everything that a cache holds and will hold. One cache to a tracker. Raises ConfigError."""
        if self._regions:
            raise ConfigError("this tracker observes a cache already", hint="use one tracker for each cache")
        cache.add_observer(self)

    def stop_observing(self, cache: Observable) -> None:
        """Track the cache no more and forget its memory; peaks and history stay."""
        cache.remove_observer(self)
        with self._lock:
            pools = {region.purpose for region in self._regions.values()}
            for key in [key for key, each in self.allocations.items() if each.part_of in pools or key in pools]:
                self._drop(key)
            self._regions.clear()
            self._hot_blocks.clear()

    def register_allocation(self, tensor: TensorLike, purpose: str, **metadata: Any) -> str:
        """Track a tensor until it is collected or given to `free_allocation`. Return the allocation's id.

        The tracker keeps no reference to the tensor. Two tensors over the same memory count twice, unless the second
        is registered with part_of="the other's id".
        """
        part_of = metadata.pop("part_of", None)
        with self._lock:
            self._num_registered += 1
            self._free_collected()
            allocation = self._allocate(
                allocation_id=f"{purpose.replace(' ', '-')}:{self._num_registered}",
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
            self._free(allocation_id, EventKind.FREE)

    def update_access(self, allocation_id: str, count: int = 1) -> None:
        """Count `count` uses of an allocation, the last of them now. Raises ConfigError for an unknown id."""
        with self._lock:
            if allocation_id not in self.allocations:
                raise ConfigError(f"no allocation {allocation_id!r}")
            self._touch(self.allocations[allocation_id], count)

    def get_allocation_summary(self) -> dict[str, Any]:
        """Return totals, peaks and counts, by purpose and by device; bytes of parts are in `by_purpose` only."""
        with self._lock:
            self._free_collected()
            accesses: Counter[str] = Counter()
            devices: Counter[str] = Counter()
            for allocation in self.allocations.values():
                accesses[allocation.purpose] += allocation.access_count
                if allocation.part_of is None:
                    devices[allocation.device] += allocation.size_bytes
            return {
                "total_allocated": self.total_allocated,
                "peak_allocated": self.peak_allocated,
                "num_allocations": len(self.allocations),
                "by_device": dict(devices),
                "by_purpose": {
                    purpose: {
                        "count": totals.count,
                        "bytes": totals.bytes,
                        "peak_bytes": totals.peak_bytes,
                        "accesses": accesses[purpose],
                    }
                    for purpose, totals in self._purposes.items()
                },
                "events": {kind.value: count for kind, count in self._events.items()},
                "dropped_events": self.dropped_events,
                "sample_every": self.sample_every,
            }

    def list_allocations(self) -> list[MemoryAllocation]:
        """Return what is allocated now, pools before their blocks."""
        with self._lock:
            self._free_collected()
            return sorted(self.allocations.values(), key=lambda each: (each.part_of is not None, each.created_at))

    # --- CacheObserver ---------------------------------------------------------------------------------

    def on_memory(self, region: MemoryRegion) -> None:
        """Track a pool or buffer of the cache."""
        with self._lock:
            if region.tier:
                self._regions[region.tier] = region
            self._free_collected()
            self._allocate(
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
        """Track a block that a tier receives, forgets or moves."""
        with self._lock:
            region = self._regions.get(event.tier) if event.tier else None
            if region and event.slot is not None and event.kind in _ARRIVALS:
                self._allocate_block(region, event)
            elif region and event.slot is not None and event.kind is EventKind.EVICT:
                if event.tier is Tier.HOT:
                    self._hot_blocks.pop(event.slot, None)
                self._free(_block_id(event.tier, event.slot), event.kind, event)
            elif region and event.slot is not None and event.kind is EventKind.MOVE:
                self._move_block(region, event)
            else:
                self._record_block(event)

    def on_request(self, event: RequestEvent) -> None:
        """Count the hits as uses of their blocks."""
        with self._lock:
            for block in event.blocks:
                self._record_block(block)
                allocation = self.allocations.get(_block_id(block.tier, block.slot)) if block.slot is not None else None
                if allocation:
                    self._touch(allocation, 1)

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Count a step's use of its hot blocks, sampled."""
        if not self._sampler.is_due():
            return
        with self._lock:
            now, hot = self._clock(), self._hot_blocks
            for block_id in block_ids:
                if allocation := hot.get(block_id):
                    allocation.access_count += self.sample_every
                    allocation.last_accessed = now

    def on_span(self, span: Span) -> None:
        """Ignore work: it is not memory."""

    def _allocate_block(self, region: MemoryRegion, event: BlockEvent) -> None:
        """Record that a block has bytes in a region. The caller holds the lock."""
        assert self._lock.is_owned()
        assert event.tier and event.slot is not None
        self._free_collected()
        made = self._allocate(
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
        """Keep a block's allocation under its new place. The caller holds the lock."""
        assert self._lock.is_owned()
        assert event.tier is Tier.HOT and event.slot is not None and event.moved_from is not None
        if (moved := self.allocations.pop(_block_id(event.tier, event.moved_from), None)) is None:
            return
        self._hot_blocks.pop(event.moved_from, None)
        moved.allocation_id = _block_id(event.tier, event.slot)
        moved.tensor_ptr = region.address + event.slot * region.slot_bytes
        self.allocations[moved.allocation_id] = self._hot_blocks[event.slot] = moved
        self._record(moved, event.kind, event)

    def _allocate(self, *, event: BlockEvent | None = None, **fields: Any) -> MemoryAllocation:
        """Add an allocation in place of any that has its id. The caller holds the lock.

        event: of the block that it is for; fields: MemoryAllocation's.
        """
        assert self._lock.is_owned()
        now = self._clock()
        made = MemoryAllocation(**fields, created_at=now, last_accessed=now)
        self._drop(made.allocation_id)
        self.allocations[made.allocation_id] = made
        self._purposes.setdefault(made.purpose, _Totals()).add(1, made.size_bytes)
        if made.part_of is None:
            self.total_allocated += made.size_bytes
            self.peak_allocated = max(self.peak_allocated, self.total_allocated)
        self._record(made, event.kind if event else EventKind.ALLOCATE, event)
        return made

    def _free(self, allocation_id: str, kind: EventKind, event: BlockEvent | None = None) -> None:
        """Remove an allocation, if it is there, and record that. The caller holds the lock."""
        assert self._lock.is_owned()
        if freed := self._drop(allocation_id):
            self._record(freed, kind, event)

    def _drop(self, allocation_id: str) -> MemoryAllocation | None:
        """Remove an allocation and record nothing. The caller holds the lock."""
        assert self._lock.is_owned()
        freed = self.allocations.pop(allocation_id, None)
        if freed:
            self._purposes[freed.purpose].add(-1, -freed.size_bytes)
            if freed.part_of is None:
                self.total_allocated -= freed.size_bytes
        return freed

    def _touch(self, allocation: MemoryAllocation, count: int) -> None:
        """Count uses of an allocation, the last of them now. The caller holds the lock."""
        assert self._lock.is_owned()
        allocation.access_count += count
        allocation.last_accessed = self._clock()

    def _record(self, allocation: MemoryAllocation, kind: EventKind, event: BlockEvent | None) -> None:
        """Add an allocation's event to the history. The caller holds the lock."""
        assert self._lock.is_owned()
        tier = event.tier if event else None
        self._append(
            kind, allocation.allocation_id, allocation.purpose, allocation.size_bytes, tier, allocation.block_hash
        )

    def _record_block(self, event: BlockEvent) -> None:
        """Add a block's event that changes no allocation to the history. The caller holds the lock."""
        assert self._lock.is_owned()
        purpose = f"{event.tier.value if event.tier else 'none'} block"
        self._append(event.kind, "", purpose, event.num_bytes, event.tier, event.block_hash, event.reason)

    def _append(self, kind: EventKind, *fields: Any) -> None:
        """Add an AllocationEvent of this moment to the history. The caller holds the lock."""
        assert self._lock.is_owned()
        self._events[kind] += 1
        self.dropped_events += len(self.allocation_history) == self.allocation_history.maxlen
        self.allocation_history.append(AllocationEvent(self._clock(), kind, *fields))

    def _free_collected(self) -> None:
        """Free the allocations of tensors that were garbage-collected. The caller holds the lock."""
        assert self._lock.is_owned()
        while self._collected:
            self._free(self._collected.popleft(), EventKind.FREE)


class StepSampler:
    """Picks one decoding step in `every` on average. At random: every n-th could always be of the same sequence."""

    def __init__(self, every: int, *, seed: int = 0) -> None:
        self._every = every
        self._random = random.Random(seed)
        self._steps_left = self._gap()

    def is_due(self) -> bool:
        """Return whether to record this step. Two threads at once may record a step too many."""
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        self._steps_left = self._gap()
        return True

    def _gap(self) -> int:
        return self._random.randint(1, 2 * self._every - 1)


def _block_id(tier: Tier | None, slot: int) -> str:
    return f"{tier.value}:{slot}" if tier else ""
