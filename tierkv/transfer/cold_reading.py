"""ColdReading: reads cold blocks into warm or staging places, from which they are copied to the hot tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tierkv.background.work_queue import Priority
from tierkv.errors import StoreError
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.transfer.lookup import Hit
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.events import EventKind

__all__ = ["ColdReading"]

_AHEAD_BLOCKS = 4  # measured: more at once keeps the disk from what is needed first
_DAMAGED = (MissReason.CORRUPT, MissReason.TRUNCATED)


class ColdReading:
    """Reads blocks from the sources of a cache, or has its lower tiers do it. What cannot be read is a reason."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    def read(
        self, wave: Sequence[Hit], *, free_places: Callable[[], None]
    ) -> tuple[list[Place], list[CodedBlock], MissReason | None]:
        """Read several blocks at once.

        free_places: unpins the warm places that the caller holds; called before this waits for room. Return the pinned
        places of the leading good blocks, what lies there (nothing where lower tiers read them), and why the next block
        could not be read.
        """
        tiers = self._tiers
        if tiers.lower:
            leased, failure = tiers.lower.read(wave)
            return leased, [], failure
        places = tiers.try_take_raw(len(wave))
        if not places:
            free_places()  # this request may hold all warm slots itself
            places = tiers.take_raw(len(wave))
        if not places:
            return [], [], MissReason.NO_ROOM
        try:
            coded, failure = self._read_into(places, wave)
        except BaseException:
            tiers.unpin(places)
            raise
        tiers.unpin(places[len(coded) :])
        return places[: len(coded)], coded, failure

    def read_one(
        self, hit: Hit, place: Place, ahead: Hit | None = None, *, may_stay_coded: bool = True
    ) -> MissReason | CodedBlock:
        """Read a block into its place, while the disk fetches the block `ahead`. Return what lies there.

        may_stay_coded: leave the decoding to a GPU, if there is one that can.
        """
        assert hit.source is not None and hit.content_digest is not None
        tiers = self._tiers
        if ahead and ahead.source:
            ahead.source.read_ahead([ahead.block_hash])
        info = BlockInfo.of(hit, namespace=tiers.namespace, content_digest=hit.content_digest)
        coded = CodedBlock()
        wanted = {"coded": coded} if tiers.memory.frames and may_stay_coded else {}
        try:
            reason = hit.source.read_into(info, tiers.memory.raw.slots[place.slot], layout=tiers.layout, **wanted)
        except StoreError:
            return MissReason.IO_ERROR
        return coded if reason is None else reason

    def fail(self, hit: Hit, reason: MissReason | None) -> None:
        """Forget that a source has a block which could not be read; report a damaged one to the source."""
        assert hit.source is not None
        with self._tiers.changed:
            entry = self._tiers.entry_of(hit)
            if entry:
                entry.in_cold = False
        if reason in _DAMAGED:
            hit.source.note_damaged(hit.block_hash)

    def _read_into(self, places: Sequence[Place], wave: Sequence[Hit]) -> tuple[list[CodedBlock], MissReason | None]:
        """Read blocks into places until one cannot be read, and enter those that were."""
        tiers = self._tiers
        ahead = [*wave[_AHEAD_BLOCKS:], *[None] * _AHEAD_BLOCKS]
        coded: list[CodedBlock] = []
        failure: MissReason | None = None
        with tiers.span("read cold") as detail:
            read = tiers.memory.threads.map(Priority.REQUEST, self.read_one, wave, places, ahead)
            detail["blocks"] = len(places)
        for block in read:
            if isinstance(block, MissReason):
                failure = block
                break
            coded.append(block)
        if len(coded) < len(places):
            self.fail(wave[len(coded)], failure)
        with tiers.changed:
            for hit, place, block in zip(wave, places, coded, strict=False):
                self._note_read(hit, place, block)
        return coded, failure

    def _note_read(self, hit: Hit, place: Place, coded: CodedBlock) -> None:
        """Enter a block that has been read: into the warm tier, if that is where it lies. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        tiers = self._tiers
        tiers.stats.bytes_out[Tier.COLD] += tiers.layout.token_bytes * (len(hit.token_bytes) // TOKEN_BYTES)
        if place.tier is None or coded.frame_sizes:
            entry = tiers.entry_of(hit)
        else:
            entry = tiers.insert(hit)
            if entry and entry.warm_slot is None:
                tiers.attach(entry, Tier.WARM, place.slot, EventKind.PROMOTE)
        if entry:
            entry.in_cold = True
