"""The way up: what a lookup found is brought into hot blocks, or found wanting and left to be computed."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tierkv.block import BlockHash, Tier
from tierkv.demotion import Demoter
from tierkv.errors import StoreError
from tierkv.lookup import ColdSource, Hit, Lookup
from tierkv.mover import Move, Ready
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.tiers import Place, Tiers

__all__ = ["Promoted", "Promoter"]

_WAVE_BLOCKS = 16
_DAMAGED = (MissReason.CORRUPT, MissReason.TRUNCATED)


@dataclass(slots=True)
class Promoted:
    """What became of a lookup.

    block_table: a pinned block id for every block of the sequence, cached ones first.
    hits: the hits that hold good, in order; their tokens need no prefill.
    loads: copies to wait for before the cached bytes are read.
    failure: why the block behind the last hit could not be had, if the lookup had promised it.
    """

    block_table: list[int] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    loads: list[Ready] = field(default_factory=list)
    failure: MissReason | None = None


class Promoter:
    """Turns hits into hot blocks. A block that cannot be had ends the hit there: failure is a miss."""

    def __init__(self, tiers: Tiers, demoter: Demoter) -> None:
        self._tiers = tiers
        self._demoter = demoter

    def promote(self, lookup: Lookup, pinned: dict[Hit, Place], *, num_blocks: int) -> Promoted:
        """Return a block table of `num_blocks` blocks that begins with what was found.

        pinned: what `pin` returned, given back here. The caller does not hold the lock: cold blocks are read
        without it. Raises CapacityError, everything given back.
        """
        result = Promoted()
        fresh: deque[int] = deque()
        try:
            num_hot = sum(hit.tier is Tier.HOT for hit in lookup.blocks)
            self._read_ahead(lookup)
            fresh.extend(self._demoter.take_hot(num_blocks - num_hot))
            tail = lookup.tail
            has_tail = False
            if tail and tail.tier is not Tier.COLD:  # first, since every layer's attention needs it
                has_tail = self._fill_tail(tail, fresh[-1], result)
            self._promote_blocks(lookup.blocks, pinned, fresh, result)
            fresh.extendleft(self._demoter.take_hot(num_blocks - len(result.block_table) - len(fresh)))
            if tail and len(result.hits) == len(lookup.blocks):
                if tail.tier is Tier.COLD:
                    has_tail = self._fill_tail(tail, fresh[-1], result)
                if has_tail:
                    result.hits.append(tail)
                    fresh.rotate(1)  # its block comes first
            result.block_table.extend(fresh)
            return result
        except BaseException:
            self._tiers.unpin(Place(Tier.HOT, block_id) for block_id in [*result.block_table, *fresh])
            raise
        finally:
            self._tiers.unpin(pinned.values())

    def pin(self, lookup: Lookup) -> dict[Hit, Place]:
        """Pin what the hits point at, so that it stays while room is made and other blocks are read.

        The caller holds the lock since the lookup.
        """
        index = self._tiers.index
        pinned: dict[Hit, Place] = {}
        for hit in lookup:
            slot = hit.entry.place(hit.tier) if hit.entry and hit.tier is not Tier.COLD else None
            if hit.entry and slot is not None:
                index.pin(hit.entry, hit.tier)
                pinned[hit] = Place(hit.tier, slot)
        return pinned

    def _read_ahead(self, lookup: Lookup) -> None:
        """Let the sources fetch all that is needed of them, while room is made and the first wave is decoded."""
        wanted: defaultdict[ColdSource, list[BlockHash]] = defaultdict(list)
        for hit in lookup:
            if hit.source:
                wanted[hit.source].append(hit.block_hash)
        for source, block_hashes in wanted.items():
            self._tiers.threads.submit(source.read_ahead, block_hashes)

    def _promote_blocks(
        self, hits: Sequence[Hit], pinned: dict[Hit, Place], fresh: deque[int], result: Promoted
    ) -> None:
        """Extend the result block by block until the hits end or one of them cannot be had."""
        at = 0
        while at < len(hits):
            hit = hits[at]
            if hit.tier is Tier.HOT:
                self._use_hot(hit, pinned[hit].slot, result)
                at += 1
                continue
            wave = _same_tier(hits, at)
            targets = [fresh.popleft() for _ in wave]
            if hit.tier is Tier.WARM:
                num_good = self._promote_warm(wave, [pinned.pop(h) for h in wave], targets, result)
            else:
                num_good = self._promote_cold(wave, targets, result)
            result.block_table.extend(targets[:num_good])
            result.hits.extend(wave[:num_good])
            fresh.extendleft(reversed(targets[num_good:]))
            at += num_good
            if num_good == 0 or result.failure:
                return

    def _use_hot(self, hit: Hit, block_id: int, result: Promoted) -> None:
        with self._tiers.changed:
            self._tiers.index.hot.pin(block_id)
            arriving = self._tiers.arriving.get(block_id)
        if arriving:
            result.loads.append(arriving)
        result.block_table.append(block_id)
        result.hits.append(hit)

    def _promote_warm(self, wave: Sequence[Hit], places: list[Place], targets: list[int], result: Promoted) -> int:
        """Copy a wave from its pinned warm slots and register the copies. Return how many arrived: all or none."""
        tiers = self._tiers
        try:
            ready = tiers.mover.promote([Move(place.slot, to) for place, to in zip(places, targets, strict=True)])
        except StoreError:
            tiers.unpin(places)
            result.failure = MissReason.IO_ERROR
            return 0
        with tiers.changed:
            for hit, target in zip(wave, targets, strict=True):
                entry = tiers.index.insert(hit.block_hash, hit.parent_hash, hit.token_bytes)
                if entry and entry.block_id is None:
                    tiers.index.attach(entry, Tier.HOT, target)
                tiers.stats.bytes_out[Tier.WARM] += tiers.layout.block_bytes
        tiers.track(ready, places, targets)
        result.loads.append(ready)
        return len(wave)

    def _promote_cold(self, wave: Sequence[Hit], targets: list[int], result: Promoted) -> int:
        """Read a wave into warm slots and copy it on. Return how many leading blocks arrived."""
        places = self._read(wave, result)
        if not places:
            return 0
        return self._promote_warm(wave[: len(places)], places, targets[: len(places)], result)

    def _read(self, wave: Sequence[Hit], result: Promoted) -> list[Place]:
        """Decode blocks into warm slots, several at once. Return the pinned places of the leading good ones."""
        tiers = self._tiers
        slots = tiers.take_warm(len(wave))
        reasons = list(tiers.threads.map(self._read_one, wave, slots))
        num_good = next((i for i, reason in enumerate(reasons) if reason), len(slots))
        with tiers.changed:
            for hit, slot in zip(wave, slots[:num_good], strict=False):
                entry = tiers.index.insert(hit.block_hash, hit.parent_hash, hit.token_bytes)
                if entry:
                    entry.in_cold = True
                    if entry.warm_slot is None:
                        tiers.index.attach(entry, Tier.WARM, slot)
                tiers.stats.bytes_out[Tier.COLD] += tiers.layout.packed_bytes(len(hit.token_bytes) // 4)
            tiers.unpin(Place(Tier.WARM, slot) for slot in slots[num_good:])
        if num_good < len(slots):
            result.failure = reasons[num_good]
            self._give_up(wave[num_good], reasons[num_good])
        return [Place(Tier.WARM, slot) for slot in slots[:num_good]]

    def _read_one(self, hit: Hit, slot: int) -> MissReason | None:
        assert hit.source is not None
        info = BlockInfo(
            block_hash=hit.block_hash,
            parent=hit.parent_hash,
            token_bytes=hit.token_bytes,
            namespace=self._tiers.namespace,
        )
        try:
            return hit.source.read_into(info, self._tiers.warm.slots[slot], layout=self._tiers.layout)
        except StoreError:
            return MissReason.IO_ERROR

    def _give_up(self, hit: Hit, reason: MissReason | None) -> None:
        """Forget that a source has a block which could not be read, and take a damaged one out of its store."""
        assert hit.source is not None
        with self._tiers.changed:
            entry = self._tiers.index.get(hit.block_hash, hit.parent_hash, hit.token_bytes)
            if entry:
                entry.in_cold = False
        if reason in _DAMAGED:
            with contextlib.suppress(StoreError):  # a store that may not be written, or fails: it stays a miss
                hit.source.delete(hit.block_hash)

    def _fill_tail(self, hit: Hit, target: int, result: Promoted) -> bool:
        """Copy a block of which a part is of use into a block of the sequence's own. False if it cannot be had."""
        tiers = self._tiers
        if hit.tier is Tier.HOT:
            assert hit.entry and hit.entry.block_id is not None
            arriving = tiers.arriving.get(hit.entry.block_id)
            if arriving:
                arriving.wait()
            result.loads.append(tiers.mover.copy([Move(hit.entry.block_id, target)]))
            return True
        if hit.tier is Tier.WARM:
            assert hit.entry and hit.entry.warm_slot is not None
            places = [Place(Tier.WARM, hit.entry.warm_slot)]
            with tiers.changed:
                tiers.index.pin(hit.entry, Tier.WARM)
        else:
            places = self._read([hit], result)
        if not places:
            return False
        ready = tiers.mover.promote([Move(places[0].slot, target)])
        tiers.track(ready, places, [])
        result.loads.append(ready)
        return True


def _same_tier(hits: Sequence[Hit], start: int) -> Sequence[Hit]:
    """Return the run of hits from `start` that lie in one tier below hot; of cold ones at most a wave."""
    end = start
    limit = len(hits) if hits[start].tier is Tier.WARM else min(len(hits), start + _WAVE_BLOCKS)
    while end < limit and hits[end].tier is hits[start].tier:
        end += 1
    return hits[start:end]
