"""AllocationLedger: what memory is in use now, what it comes to, and what came and went."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tierkv.values.block import BlockHash, Tier
from tierkv.values.events import BlockEvent, EventKind
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["AllocationEvent", "AllocationLedger", "MemoryAllocation"]


@dataclass(slots=True, kw_only=True)
class MemoryAllocation:
    """Memory in use. Times are seconds of the tracker's clock.

    tensor_ptr: address of the first byte on `device`. part_of: the allocation that contains this one; its bytes
    are not counted twice. access_count: exact for hits, an estimate for the steps of decoding, which are sampled.
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
    """One line of the history. tier and block_hash: of a block, else None and empty."""

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


class AllocationLedger:
    """Allocations by id, totals and peaks, and a history of `history_size` events.

    The caller of every method holds the lock.
    """

    def __init__(self, *, history_size: int, clock: Callable[[], float], lock: Owned = NO_LOCK) -> None:
        self._lock = lock
        self.total_allocated = 0
        self.peak_allocated = 0
        self.dropped_events = 0
        self.allocations: dict[str, MemoryAllocation] = {}
        self.history: deque[AllocationEvent] = deque(maxlen=history_size)
        self._events: Counter[EventKind] = Counter()
        self._purposes: dict[str, _Totals] = {}
        self._clock = clock

    def allocate(self, *, event: BlockEvent | None = None, **fields: Any) -> MemoryAllocation:
        """Enter an allocation in place of what had its id. event: what made it; fields: MemoryAllocation's."""
        assert self._lock.is_owned()
        now = self._clock()
        made = MemoryAllocation(**fields, created_at=now, last_accessed=now)
        self.drop(made.allocation_id)
        self.allocations[made.allocation_id] = made
        self._purposes.setdefault(made.purpose, _Totals()).add(1, made.size_bytes)
        if made.part_of is None:
            self.total_allocated += made.size_bytes
            self.peak_allocated = max(self.peak_allocated, self.total_allocated)
        self.note(made, event.kind if event else EventKind.ALLOCATE, event)
        return made

    def free(self, allocation_id: str, kind: EventKind, event: BlockEvent | None = None) -> None:
        """Take an allocation out and record that; nothing happens if it has gone."""
        assert self._lock.is_owned()
        freed = self.drop(allocation_id)
        if freed:
            self.note(freed, kind, event)

    def drop(self, allocation_id: str) -> MemoryAllocation | None:
        """Take an allocation out without a word in the history."""
        assert self._lock.is_owned()
        freed = self.allocations.pop(allocation_id, None)
        if freed:
            self._purposes[freed.purpose].add(-1, -freed.size_bytes)
            if freed.part_of is None:
                self.total_allocated -= freed.size_bytes
        return freed

    def touch(self, allocation: MemoryAllocation, count: int) -> None:
        """Count uses of an allocation, the last of them now."""
        assert self._lock.is_owned()
        allocation.access_count += count
        allocation.last_accessed = self._clock()

    def note(self, allocation: MemoryAllocation, kind: EventKind, event: BlockEvent | None) -> None:
        """Record what happened to an allocation."""
        assert self._lock.is_owned()
        self._append(
            AllocationEvent(
                self._clock(),
                kind,
                allocation.allocation_id,
                allocation.purpose,
                allocation.size_bytes,
                event.tier if event else None,
                allocation.block_hash,
            )
        )

    def note_block(self, event: BlockEvent) -> None:
        """Record what changes no allocation."""
        assert self._lock.is_owned()
        tier = event.tier.value if event.tier else "none"
        self._append(
            AllocationEvent(
                self._clock(),
                event.kind,
                "",
                f"{tier} block",
                event.num_bytes,
                event.tier,
                event.block_hash,
                event.reason,
            )
        )

    def summary(self) -> dict[str, Any]:
        """Return totals, peaks and counts, by purpose and by device; bytes of parts are in `by_purpose` only."""
        assert self._lock.is_owned()
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
        }

    def _append(self, event: AllocationEvent) -> None:
        assert self._lock.is_owned()
        self._events[event.kind] += 1
        self.dropped_events += len(self.history) == self.history.maxlen
        self.history.append(event)
