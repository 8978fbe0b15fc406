"""ColdReading: reads cold blocks into warm or staging places, from which they are copied to the hot tier."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from tierkv.background.work_queue import Priority
from tierkv.errors import StoreError
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.transfer.lookup import Hit
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.events import EventKind

__all__ = ["ColdReading", "ColdReads"]

_AHEAD_BLOCKS = 4  # measured: more at once keeps the disk from what is needed first
_DAMAGED = (MissReason.CORRUPT, MissReason.TRUNCATED)


class ColdReading:
    """Reads blocks from the sources of a cache, or has its lower tiers do it. What cannot be read is a reason."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    def start(self, hits: Sequence[Hit], *, free_places: Callable[[], None]) -> ColdReads:
        """Read blocks one after another, several at once; the caller closes what this returns.

        free_places: unpins the warm places that the caller holds; called before a read waits for room.
        """
        return ColdReads(self, self._tiers, hits, free_places)

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
        memory, out = tiers.memory, tiers.memory.raw.slots[place.slot]
        wanted = {"coded": coded} if memory.frames and may_stay_coded else {}
        try:
            if memory.readers and isinstance(hit.source, ColdStore):
                reason = hit.source.read_into(info, out, layout=tiers.layout, decoders=memory.readers, **wanted)
            else:
                reason = hit.source.read_into(info, out, layout=tiers.layout, **wanted)
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


class ColdReads:
    """The cold blocks of one request on their way into warm or staging places, in order.

    Blocks behind those that the caller waits for are read meanwhile, so that no thread idles between two waves. A
    context manager: at its end nothing is read into a place any more.
    """

    def __init__(
        self, reading: ColdReading, tiers: Tiers, hits: Sequence[Hit], free_places: Callable[[], None]
    ) -> None:
        self._reading = reading
        self._tiers = tiers
        self._hits = hits
        self._free_places = free_places
        self._num_taken = 0
        self._in_flight: deque[tuple[Place, Future[MissReason | CodedBlock]]] = deque()

    def __enter__(self) -> ColdReads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reads that nothing waits for, and unpin their places. May be called twice."""
        for _, read in self._in_flight:
            read.cancel()
        wait([read for _, read in self._in_flight])
        self._tiers.unpin([place for place, _ in self._in_flight])
        self._in_flight.clear()

    def next(self, most: int) -> tuple[list[Place], list[CodedBlock], MissReason | None]:
        """Wait for the next few blocks. Return the pinned places of the leading good ones, what lies there (nothing
        where lower tiers read them), and why the block after them could not be read.
        """
        tiers = self._tiers
        hits = self._hits[self._num_taken : self._num_taken + most]
        if tiers.lower:
            leased, failure = tiers.lower.read(hits)
            self._num_taken += len(leased)
            return leased, [], failure
        self._start_reading(most)
        if not self._in_flight:
            return [], [], MissReason.NO_ROOM
        with tiers.span("read cold") as detail:
            reads = [self._in_flight[at] for at in range(min(most, len(self._in_flight)))]
            wait([read for _, read in reads])
            detail["blocks"] = len(reads)
        coded: list[CodedBlock] = []
        failure = None
        for _, read in reads:
            block = read.result()
            if isinstance(block, MissReason):
                failure = block
                break
            coded.append(block)
        if failure:
            self._reading.fail(hits[len(coded)], failure)
        with tiers.changed:
            for hit, (place, _), block in zip(hits, reads, coded, strict=False):
                self._note_read(hit, place, block)
        self._num_taken += len(coded)
        return [self._in_flight.popleft()[0] for _ in coded], coded, failure

    def _start_reading(self, most: int) -> None:
        """Keep the threads busy: read so many blocks, and as many behind them as there are threads."""
        tiers = self._tiers
        first = self._num_taken + len(self._in_flight)
        count = min(len(self._hits), self._num_taken + most + tiers.memory.read_threads.num_threads) - first
        if count <= 0:
            return
        places = tiers.try_take_raw(count)
        if not places and not self._in_flight:
            self._free_places()  # this request may hold all warm slots itself
            places = tiers.take_raw(min(count, most))
        for number, place in enumerate(places):
            at = first + number
            ahead = self._hits[at + _AHEAD_BLOCKS] if at + _AHEAD_BLOCKS < len(self._hits) else None
            try:
                read = tiers.memory.read_threads.submit(
                    Priority.REQUEST, self._reading.read_one, self._hits[at], place, ahead
                )
            except BaseException:
                tiers.unpin(places[number:])
                raise
            self._in_flight.append((place, read))

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
