"""Blocks of the hot pool by their ids: what each one is, and evicting, pinning or offloading just those."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tierkv.background.active_calls import ActiveCalls, while_open
from tierkv.errors import ConfigError
from tierkv.index.index import Entry
from tierkv.transfer.offload import Offloader, Offloading
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import BlockHash, Tier
from tierkv.values.checks import check_count

__all__ = ["BlockControl", "BlockReport", "BlockState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """A block of the hot pool that is not free. block_hash: None for one that no other sequence can find yet.

    num_tokens and depth (blocks before it in its chain) are known of findable ones, and so is which lower tiers keep
    it. Times are seconds of the cache's clock.
    """

    block_id: int
    reference_count: int
    block_hash: BlockHash | None = None
    num_tokens: int = 0
    depth: int = 0
    pinned: bool = False
    lower_tiers: tuple[Tier, ...] = ()
    access_count: int = 0
    last_access: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """Which block ids were evicted, pinned and offloaded, and why the others were not."""

    evicted: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    offloaded: tuple[int, ...] = ()
    refused: dict[int, str] = field(default_factory=dict)


class BlockControl:
    """Acts on blocks by their ids, within the cache's rules: nothing in use or pinned goes, children before parents.

    calls: of the cache, which is not closed while somebody is inside here.
    """

    def __init__(self, tiers: Tiers, offloader: Offloader, *, calls: ActiveCalls) -> None:
        self.calls = calls
        self._tiers = tiers
        self._offloader = offloader

    @while_open
    def inspect(self) -> tuple[BlockState, ...]:
        """Return every block of the hot pool that is in use or cached, in order of their ids."""
        pool = self._tiers.index.hot
        with self._tiers.changed:
            self._tiers.reap()
            used = [i for i in range(pool.capacity) if pool.owners[i] is not None or pool.reference_count(i)]
            return tuple(self._state(block_id) for block_id in used)

    @while_open
    def manage(self, *, evict: Iterable[int] = (), pin: Iterable[int] = (), offload: Iterable[int] = ()) -> BlockReport:
        """Pin, then offload, then evict blocks; say what became of each.

        evict: the hot tier forgets a block; unless a lower tier keeps it, it is gone. offload: a lower tier gets the
        block before the hot one forgets it. Waits for the writes that these need. What cannot be done is reported,
        not raised; ids that no block can have raise ConfigError, and nothing is done.
        """
        asked = {name: self._checked(ids) for name, ids in (("pin", pin), ("offload", offload), ("evict", evict))}
        refused: dict[int, str] = {}
        pinned = self._pin(asked["pin"], refused)
        offloaded = self._offload(asked["offload"], refused) if asked["offload"] else []
        evicted = self._evict(asked["evict"], refused) if asked["evict"] else []
        return BlockReport(evicted=tuple(evicted), pinned=tuple(pinned), offloaded=tuple(offloaded), refused=refused)

    @property
    def limit(self) -> int:
        """How many blocks may be in use or cached in the hot pool."""
        return self._tiers.index.hot.limit

    @property
    def peak_count(self) -> int:
        """The most blocks of the hot pool that were in use or cached at a time."""
        return self._tiers.index.hot.peak_count

    @while_open
    def set_limit(self, num_blocks: int) -> int:
        """Let the hot pool take so many blocks from now on, at most as many as it has.

        What is beyond that is evicted, written down first where no lower tier has it; waits for that. Return how many
        blocks are beyond it all the same because sequences use them or they are pinned: they go as soon as they may.
        Raises ConfigError for less than one block. The pool keeps its memory: what it does not use is not given back.
        """
        pool = self._tiers.index.hot
        num_blocks = check_count("num_blocks", num_blocks, least=None)
        if num_blocks < 1:
            raise ConfigError(f"the hot pool needs at least one block, not {num_blocks}")
        with self._tiers.changed:
            pool.set_limit(min(num_blocks, pool.capacity))
            self._tiers.changed.notify_all()
        return self._offloader.shrink()

    @while_open
    def set_offloading(self, offloading: Offloading | None) -> None:
        """Demote a share of what nobody uses whenever the hot pool is too full, behind the request; None ends it."""
        if offloading is not None and not isinstance(offloading, Offloading):
            raise ConfigError(f"an Offloading is wanted, or None, got {offloading!r}")
        self._offloader.set_offloading(offloading)

    @while_open
    def unpin(self, block_ids: Iterable[int]) -> None:
        """Let pinned blocks be evicted again; ids of blocks that are not pinned change nothing.

        Raises ConfigError, nothing changed, for ids that no block can have.
        """
        self._set_pinned([entry for block_id in self._checked(block_ids) if (entry := self._owner(block_id))], False)

    def _checked(self, block_ids: Iterable[int]) -> list[int]:
        """Return ids, each once. Raises ConfigError for what no block of the pool can have for an id."""
        try:
            asked = list(dict.fromkeys(block_ids))
        except TypeError as exc:
            raise ConfigError(f"block ids must be whole numbers: {exc}") from exc
        capacity = self._tiers.index.hot.capacity
        for block_id in asked:
            if not 0 <= check_count("a block id", block_id, least=None) < capacity:
                raise ConfigError(f"there is no block {block_id}: the hot pool has {capacity}")
        return [int(block_id) for block_id in asked]

    def _pin(self, block_ids: list[int], refused: dict[int, str]) -> list[int]:
        found = {block_id: self._owner(block_id) for block_id in block_ids}
        refused |= {block_id: "nothing is cached there" for block_id, entry in found.items() if entry is None}
        self._set_pinned([entry for entry in found.values() if entry], True)
        return [block_id for block_id, entry in found.items() if entry]

    def _set_pinned(self, entries: list[Entry], pinned: bool) -> None:
        with self._tiers.changed:
            for entry in entries:
                self._tiers.index.set_pinned(entry, pinned)
        if self._tiers.cold and not self._tiers.cold.read_only:
            self._tiers.cold.set_pinned([entry.block_hash for entry in entries], pinned)

    def _offload(self, block_ids: list[int], refused: dict[int, str]) -> list[int]:
        """Write down what no lower tier has yet, then evict what one has."""
        tiers = self._tiers
        self._offloader.flush()  # what is queued to be written is in use until it is
        with tiers.changed:
            for block_id in block_ids:
                entry = tiers.index.hot.owners[block_id]
                if entry and not _lower_tiers(entry) and not tiers.index.hot.reference_count(block_id):
                    self._offloader.write_down(entry, tiers.copies.written(entry))
        self._offloader.flush()
        with tiers.changed:
            kept = {i for i in block_ids if (entry := tiers.index.hot.owners[i]) and _lower_tiers(entry)}
            cached = {i for i in block_ids if tiers.index.hot.owners[i]}
        refused |= dict.fromkeys(sorted(cached - kept), "no lower tier could take it")
        return self._evict([i for i in block_ids if i in kept or i not in cached], refused)

    def _evict(self, block_ids: list[int], refused: dict[int, str]) -> list[int]:
        tiers = self._tiers
        self._offloader.flush()
        evicted: set[int] = set()
        with tiers.changed:
            tiers.reap()
            owners = {block_id: tiers.index.hot.owners[block_id] for block_id in block_ids}
            deepest_first = sorted(block_ids, key=lambda i: -(owner.depth if (owner := owners[i]) else 0))
            for block_id in deepest_first:
                entry = owners[block_id]
                reason = self._why_not(entry, block_id)
                if entry is None or reason:
                    refused[block_id] = reason
                    continue
                self._offloader.evict([entry])
                evicted.add(block_id)
            tiers.changed.notify_all()
        return [block_id for block_id in block_ids if block_id in evicted]

    def _why_not(self, entry: Entry | None, block_id: int) -> str:
        """Say why a block cannot be evicted; empty if it can. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        users = self._tiers.index.hot.reference_count(block_id)
        if users:
            return f"{users} sequences or copies use it"
        if entry is None:
            return "nothing is cached there"
        if entry.pinned:
            return "it is pinned"
        return "blocks that continue it are hot" if not self._tiers.index.is_evictable(entry, Tier.HOT) else ""

    def _owner(self, block_id: int) -> Entry | None:
        with self._tiers.changed:
            return self._tiers.index.hot.owners[block_id]

    def _state(self, block_id: int) -> BlockState:
        """Return what is known of a block; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        pool = self._tiers.index.hot
        entry = pool.owners[block_id]
        users = pool.reference_count(block_id)
        if entry is None:
            return BlockState(block_id=block_id, reference_count=users)
        return BlockState(
            block_id=block_id,
            reference_count=users,
            block_hash=entry.block_hash,
            num_tokens=entry.num_tokens,
            depth=entry.depth,
            pinned=entry.pinned,
            lower_tiers=_lower_tiers(entry),
            access_count=entry.access_count,
            last_access=entry.last_access,
        )


def _lower_tiers(entry: Entry) -> tuple[Tier, ...]:
    return (*((Tier.WARM,) if entry.warm_slot is not None else ()), *((Tier.COLD,) if entry.in_cold else ()))
