"""Loader: loads what a lookup found into hot blocks. Blocks that cannot be had are left to be computed."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from tierkv.errors import CapacityError, StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move, Ready
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.cold_reading import ColdReading, ColdReads
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import Tier
from tierkv.values.events import EventKind

__all__ = ["Loader", "Pinned", "Promoted"]

_WAVE_BLOCKS = 16
_LAST_WAVE_BYTES = 1 << 30  # which, and half of it again, such a wave takes of the GPU's memory beside the pools
_LAST_WAVE_BLOCKS = 32  # where a GPU decodes, which takes 14 ms for 32 blocks of an 8B model and 10 for 16


@dataclass(slots=True)
class Promoted:
    """What became of a lookup.

    block_table: a pinned block id for every block of the sequence, cached ones first.
    hot: the leading blocks that were hot already.
    hits: the good hits after them, in order; their tokens need no prefill.
    loads: copies to wait for before the cached bytes are read.
    failure: why the block after the last hit could not be had, if the lookup had found it.
    owned: every block id pinned for the sequence so far, to unpin after an error.
    num_surplus: blocks that were dropped because another rank lacks them.
    """

    block_table: list[int] = field(default_factory=list)
    hot: list[Entry] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    loads: list[Ready] = field(default_factory=list)
    failure: MissReason | None = None
    owned: list[int] = field(default_factory=list)
    num_surplus: int = 0

    @property
    def num_tokens(self) -> int:
        """Leading tokens that need no prefill."""
        return sum(entry.num_tokens for entry in self.hot) + sum(hit.num_tokens for hit in self.hits)


@dataclass(frozen=True, slots=True)
class Pinned:
    """What `Loader.pin` holds.

    hot: block ids of the leading hot blocks; their pins become the sequence's own. arriving: copies and
    computations that still write those. rest: places of the blocks found after them, by position in `Lookup.rest`.
    """

    hot: list[int]
    arriving: list[Ready] = field(default_factory=list)
    rest: dict[int, Place] = field(default_factory=dict)


class Loader:
    """Turns hits into hot blocks. A block that cannot be had ends the hit there: failure is a miss."""

    def __init__(self, tiers: Tiers, offloader: Offloader, reading: ColdReading) -> None:
        self._tiers = tiers
        self._offloader = offloader
        self._reading = reading

    def promote(self, lookup: Lookup, pinned: Pinned, *, num_blocks: int) -> Promoted:
        """Return a block table of `num_blocks` blocks that begins with what was found.

        pinned: what `pin` returned and what lower tiers leased, unpinned here. The caller does not hold the lock:
        cold blocks are read without it. Raises CapacityError, everything unpinned.
        """
        assert not self._tiers.changed.is_owned()
        result = Promoted(list(pinned.hot), lookup.hot, owned=list(pinned.hot), loads=pinned.arriving)
        fresh: deque[int] = deque()
        try:
            num_hot = len(pinned.hot) + sum(hit.tier is Tier.HOT for hit in lookup.blocks)
            partial_block = lookup.partial_block
            has_partial = False
            try:
                fresh.extend(self._take(num_blocks - num_hot, result))
            except CapacityError:
                source = pinned.rest.pop(len(lookup.blocks), None)
                if source is None or source.tier is not Tier.HOT:
                    raise
                # The partial block holds the last free place itself: its tokens are computed instead.
                self._tiers.unpin([source])
                partial_block, result.failure = None, MissReason.NO_ROOM
                fresh.extend(self._take(num_blocks - num_hot, result))
            if partial_block and partial_block.tier is not Tier.COLD:  # first, since every layer's attention needs it
                has_partial = self._fill_partial(partial_block, fresh[-1], pinned.rest, result)
            self._promote_blocks(lookup.blocks, pinned.rest, fresh, result)
            fresh.extendleft(self._take(num_blocks - len(result.block_table) - len(fresh), result))
            if partial_block and len(result.hits) == len(lookup.blocks):
                if partial_block.tier is Tier.COLD:
                    has_partial = self._fill_partial(partial_block, fresh[-1], pinned.rest, result)
                if has_partial:
                    result.hits.append(partial_block)
                    fresh.rotate(1)  # its block comes first
            result.block_table.extend(fresh)
            return result
        except BaseException:
            self._tiers.copies.leave(result.owned)
            self._tiers.unpin_all(Tier.HOT, result.owned)
            raise
        finally:
            if pinned.rest:
                self._tiers.unpin(pinned.rest.values())

    def pin(self, lookup: Lookup) -> Pinned:
        """Pin what the lookup points at, so that it stays while room is made and other blocks are read.

        The caller holds the lock since the lookup.
        """
        assert self._tiers.changed.is_owned()
        tiers, index = self._tiers, self._tiers.index
        pinned = Pinned([entry.block_id for entry in lookup.hot if entry.block_id is not None])
        assert len(pinned.hot) == len(lookup.hot), "the lock was released between the lookup and the pin"
        index.hot.pin_all(pinned.hot)
        if tiers.copies.arriving:
            tiers.reap()
            arriving = (tiers.copies.arriving[slot] for slot in pinned.hot if slot in tiers.copies.arriving)
            pinned.arriving.extend(dict.fromkeys(arriving))  # many blocks come in one batch, or of one commit
        for position, hit in enumerate(lookup.rest()):
            slot = hit.entry.place(hit.tier) if hit.entry and hit.tier is not Tier.COLD else None
            if hit.entry and slot is not None:
                index.pin(hit.entry, hit.tier)
                pinned.rest[position] = Place(hit.tier, slot)
        return pinned

    def _promote_blocks(
        self, hits: Sequence[Hit], pinned: dict[int, Place], fresh: deque[int], result: Promoted
    ) -> None:
        """Extend the result block by block until the hits end or one of them cannot be had."""
        with contextlib.ExitStack() as cold:
            self._promote_in_turn(hits, pinned, fresh, result, cold)

    def _promote_in_turn(
        self,
        hits: Sequence[Hit],
        pinned: dict[int, Place],
        fresh: deque[int],
        result: Promoted,
        cold: contextlib.ExitStack,
    ) -> None:
        """Do as `_promote_blocks` says; `cold` ends the reads that are left over."""
        at = 0
        reads: ColdReads | None = None
        while at < len(hits):
            hit = hits[at]
            if hit.tier is not Tier.COLD:
                reads = None  # of the run of cold blocks that has ended
            if hit.tier is Tier.HOT:
                self._use_hot(hit, pinned[at].slot, result)
                at += 1
                continue
            wave = self._next_wave(hits, at)
            if hit.tier is Tier.WARM:
                held = list(
                    takewhile(pinned.__contains__, range(at, at + len(wave)))
                )  # see `_start_reading` on the others
                if not held:
                    result.failure = MissReason.NO_ROOM
                    return
                wave = wave[: len(held)]
            targets = [fresh.popleft() for _ in wave]
            if hit.tier is Tier.WARM:
                places = [pinned.pop(position) for position in held]
                num_good = self._promote_warm(wave, places, targets, result)
            else:
                reads = reads or cold.enter_context(self._start_reading(_cold_run(hits, at), pinned))
                num_good = self._promote_cold(wave, targets, reads, result)
            result.block_table.extend(targets[:num_good])
            result.hits.extend(wave[:num_good])
            fresh.extendleft(reversed(targets[num_good:]))
            at += num_good
            if num_good == 0 or result.failure:
                return

    def _next_wave(self, hits: Sequence[Hit], start: int) -> Sequence[Hit]:
        """Return the run of hits from `start` that lie in one tier below hot; of many cold ones a part."""
        tier = hits[start].tier
        end = next((at for at in range(start, len(hits)) if hits[at].tier is not tier), len(hits))
        most = _WAVE_BLOCKS
        if self._tiers.memory.decodes_on_gpu:
            most = max(most, min(_LAST_WAVE_BLOCKS, _LAST_WAVE_BYTES // self._tiers.layout.block_bytes))
        if tier is Tier.COLD and end - start > most:
            end = start + _WAVE_BLOCKS
        return hits[start:end]

    def _take(self, count: int, result: Promoted) -> list[int]:
        block_ids = self._offloader.take_hot(count) if count else []
        result.owned += block_ids
        return block_ids

    def _use_hot(self, hit: Hit, block_id: int, result: Promoted) -> None:
        with self._tiers.changed:
            self._pin_hot(block_id, result)
        result.block_table.append(block_id)
        result.hits.append(hit)

    def _pin_hot(self, block_id: int, result: Promoted) -> None:
        """Let the sequence use a registered block, which may still be arriving; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        self._tiers.index.hot.pin(block_id)
        result.owned.append(block_id)
        if arriving := self._tiers.copies.arriving.get(block_id):
            result.loads.append(arriving)

    def _promote_warm(
        self,
        wave: Sequence[Hit],
        places: list[Place],
        targets: list[int],
        result: Promoted,
        coded: Sequence[CodedBlock] = (),
    ) -> int:
        """Copy a wave from its pinned places and register it. Return how many leading blocks are of use.

        targets: where to copy to. A target is replaced by the registered block where another request was faster.
        """
        tiers = self._tiers
        try:
            ready = tiers.load(places, targets, coded=coded)
        except StoreError:
            tiers.unpin(places)
            result.failure = MissReason.IO_ERROR
            return 0
        except BaseException:
            tiers.unpin(places)
            raise
        result.loads.append(ready)
        copied = list(targets)
        with tiers.changed:
            try:
                return self._register(wave, places, targets, result)
            finally:
                tiers.track(ready, places, copied)

    def _register(self, wave: Sequence[Hit], places: Sequence[Place], targets: list[int], result: Promoted) -> int:
        """Enter a wave that is on its way into `targets`. Return how many leading blocks are of use.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        tiers = self._tiers
        for i, hit in enumerate(wave):
            tiers.stats.bytes_out[Tier.WARM] += tiers.layout.block_bytes
            entry = tiers.insert(hit)
            if entry is None:  # another block has taken the hash in the meantime
                result.failure = MissReason.COLLISION
                return i
            entry.in_cold |= hit.tier is Tier.COLD or places[i].owner is not None
            if entry.block_id is None:
                tiers.attach(entry, Tier.HOT, targets[i], EventKind.PROMOTE)
            else:  # another request was faster: use its block, so that the whole chain stays in use
                self._pin_hot(entry.block_id, result)
                result.owned.remove(targets[i])
                tiers.index.unpin(Tier.HOT, targets[i])
                targets[i] = entry.block_id
        return len(wave)

    def _promote_cold(self, wave: Sequence[Hit], targets: list[int], reads: ColdReads, result: Promoted) -> int:
        """Wait for a wave and copy it on. Return how many leading blocks arrived."""
        places, coded, failure = reads.next(len(wave))
        result.failure = failure or result.failure
        if not places:
            return 0
        used = targets[: len(places)]
        num_good = self._promote_warm(wave[: len(places)], places, used, result, coded)
        targets[: len(places)] = used
        self.keep_warm(wave[:num_good])
        return num_good

    def keep_warm(self, hits: Sequence[Hit]) -> None:
        """Have loaded cold blocks written to the warm tier too, in the background."""
        if self._tiers.lower:
            return  # the daemon keeps them in its warm tier
        with self._tiers.changed:
            for hit in hits:
                entry = self._tiers.entry_of(hit)
                if entry and entry.block_id is not None and entry.warm_slot is None:
                    written = self._tiers.copies.written(entry)
                    self._offloader.write_down(entry, written)

    def _start_reading(self, hits: Sequence[Hit], pinned: dict[int, Place]) -> ColdReads:
        tiers = self._tiers

        def free_places() -> None:
            tiers.unpin([pinned.pop(at) for at, place in list(pinned.items()) if place.tier is Tier.WARM])

        return self._reading.start(hits, free_places=free_places)

    def _fill_partial(self, hit: Hit, target: int, pinned: dict[int, Place], result: Promoted) -> bool:
        """Copy a block of which a part is of use into a block of the sequence's own. False if it cannot be had."""
        tiers = self._tiers
        coded: list[CodedBlock] = []
        if hit.tier is Tier.HOT:
            assert hit.entry and hit.entry.block_id is not None
            if arriving := tiers.copies.arriving.get(hit.entry.block_id):
                arriving.wait()
            try:
                result.loads.append(tiers.memory.mover.copy([Move(hit.entry.block_id, target)]))
            except StoreError:
                result.failure = MissReason.IO_ERROR
                return False
            tiers.copies.leave([hit.entry.block_id])  # the copy is only queued when others may evict what it reads
            return True
        if hit.tier is Tier.WARM and hit.entry is None:  # leased: this cache has no entry of it
            places = [pinned.pop(max(pinned))]
        elif hit.tier is Tier.WARM:
            assert hit.entry and hit.entry.warm_slot is not None
            places = [Place(Tier.WARM, hit.entry.warm_slot)]
            with tiers.changed:
                tiers.index.pin(hit.entry, Tier.WARM)
        else:
            with self._start_reading([hit], pinned) as reads:
                places, coded, failure = reads.next(1)
            result.failure = failure or result.failure
        if not places:
            return False
        try:
            ready = tiers.load(places, [target], coded=coded)
        except StoreError:
            tiers.unpin(places)
            result.failure = MissReason.IO_ERROR
            return False
        except BaseException:
            tiers.unpin(places)
            raise
        tiers.track(ready, places, [target])
        result.loads.append(ready)
        return True


def _cold_run(hits: Sequence[Hit], start: int) -> Sequence[Hit]:
    """Return the cold hits from `start` on, up to the first one of another tier."""
    end = next((at for at in range(start, len(hits)) if hits[at].tier is not Tier.COLD), len(hits))
    return hits[start:end]
