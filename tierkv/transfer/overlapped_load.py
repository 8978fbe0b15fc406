"""OverlappedLoad: loads a request's cold blocks from the last one on while its engine computes them from the first on.

The engine begins at the front because K and V need everything before them; a stored block needs nothing, so the cache
loads from the back. All blocks are there once both sides touch, after less time than either side would need alone.
Measured speeds only decide how large a piece the engine takes next, so that both sides end together.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeAlias

from tierkv.background.work_queue import Priority
from tierkv.errors import ClosedError, StoreError
from tierkv.movers.mover import Ready
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.lookup import Hit
from tierkv.transfer.recompute_or_load import LoadKind, RecomputeOrLoad
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import Tier

__all__ = ["BlockDivision", "OverlappedLoad"]

_Reading: TypeAlias = "tuple[int, Place, Future[MissReason | CodedBlock]]"
_DECODED_AT_ONCE = 16  # a GPU takes hardly longer to decode sixteen blocks than to decode one
ReadBlock: TypeAlias = Callable[[Hit, Place], "MissReason | CodedBlock"]


class BlockDivision:
    """A row of `num_blocks` blocks, divided between the engine, at the front, and the loader, at the back. Thread-safe.

    The engine may still compute a block that the loader has claimed, not one that it has loaded.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._lock = threading.Lock()
        self._num_computed = 0
        self._first_claimed = num_blocks
        self._first_loaded = num_blocks
        self._may_load = True

    @property
    def num_computed(self) -> int:
        """Leading blocks that the engine has claimed."""
        return self._num_computed

    @property
    def first_loaded(self) -> int:
        """The first of the loaded blocks, which are the last of the row."""
        return self._first_loaded

    def claim_load(self) -> int | None:
        """Claim the last unclaimed block for the loader; None if there is none, or loading has ended."""
        with self._lock:
            if not self._may_load or self._num_computed >= self._first_claimed:
                return None
            self._first_claimed -= 1
            return self._first_claimed

    def note_loaded(self, block: int) -> bool:
        """Record that a claimed block is loaded, from the last block on. False if the engine computes it already."""
        with self._lock:
            if not self._may_load or block < self._num_computed:
                return False
            assert block == self._first_loaded - 1, "blocks are loaded from the back"
            self._first_loaded = block
            return True

    def end_loading(self, first_good: int | None = None) -> None:
        """Leave all blocks that are not loaded to the engine; nothing more is loaded.

        first_good: the first block that did arrive, where the copy of noted ones failed.
        """
        with self._lock:
            self._may_load = False
            self._first_loaded = max(self._first_loaded, first_good or 0)

    def claim_agreed(self, num_blocks: int) -> bool:
        """Claim the next blocks for the engine, as all ranks agreed, also those that are loaded here.

        Return whether some of them are loaded: the engine then computes them again, behind their copies.
        """
        with self._lock:
            self._num_computed += num_blocks
            is_loaded = self._num_computed > self._first_loaded
            self._first_loaded = max(self._first_loaded, self._num_computed)
            return is_loaded

    def discard_loaded(self) -> None:
        """Make no use of the loaded blocks: between them and the computed ones is a gap."""
        with self._lock:
            self._may_load = False
            self._first_loaded = self._first_claimed = self.num_blocks

    def claim_compute(self, num_blocks: int) -> int:
        """Claim up to `num_blocks` leading blocks that are not loaded for the engine; return how many."""
        with self._lock:
            count = min(num_blocks, self._first_loaded - self._num_computed)
            self._num_computed += count
            return count

    def next_piece(self, *, compute_s: Callable[[int], float | None], load_s: float | None, most: int) -> int:
        """Claim for the engine what it should compute next, at most `most` blocks; 0: wait for the loader.

        compute_s: seconds that so many blocks take in one pass; load_s: seconds a block. None: not measured yet. The
        engine gets as much as it computes before the loader would have loaded the rest.
        """
        count = self.wanted_piece(compute_s=compute_s, load_s=load_s, most=most)
        return self.claim_compute(count) if count else 0

    def wanted_piece(self, *, compute_s: Callable[[int], float | None], load_s: float | None, most: int) -> int:
        """Return what `next_piece` would claim at most, and claim nothing."""
        left = self._first_loaded - self._num_computed
        if not self._may_load or load_s is None or compute_s(1) is None:
            return min(most, left)
        for count in range(min(most, left), 0, -1):
            if (compute_s(count) or 0.0) <= (left - count) * load_s:
                return count
        is_faster = left and (compute_s(left) or 0.0) < left * load_s
        return min(most, left) if is_faster else 0


class OverlappedLoad:
    """One request's cold blocks on their way into block ids that it holds, the last one first.

    hits: the cold blocks in order, behind num_before tokens; kind: where they lie. targets: their
    block ids, of which the load keeps a reference of its own until it has ended. after: when the targets may be
    written. The load registers nothing: `commit` does that once the blocks before them are registered. Runs on
    the loader threads; `read` decodes one block on the threads that read.
    """

    def __init__(
        self,
        tiers: Tiers,
        costs: RecomputeOrLoad,
        hits: Sequence[Hit],
        targets: Sequence[int],
        *,
        num_before: int,
        kind: LoadKind,
        read: ReadBlock,
        after: Ready,
    ) -> None:
        self.hits: list[Hit] = list(hits)
        self.num_before = num_before
        self.division: BlockDivision = BlockDivision(len(hits))
        self.copies: list[Ready] = []
        self.failure: MissReason | None = None
        self.failed: tuple[Hit, MissReason] | None = None
        self._pid = os.getpid()
        self._tiers = tiers
        self._costs = costs
        self._targets = list(targets)
        self._read = read
        self._after = after
        self._kind = kind._replace(overlaps=False)
        self._loaded: tuple[int, float | None] = (0, None)  # blocks, and the seconds that they took
        self._is_cancelled = threading.Event()
        self._copying = threading.Lock()  # held from the note that blocks are loaded until their copy is queued
        with tiers.changed:
            tiers.index.hot.pin_all(self._targets)
        try:
            self._work = tiers.memory.loaders.submit(self._run_in_span)
        except BaseException:
            tiers.unpin_all(Tier.HOT, self._targets)
            raise

    @property
    def is_done(self) -> bool:
        """True once nothing is loaded any more; copies to the GPU may still be on their way."""
        return self._work.done()

    def cancel(self) -> None:
        """Ask the load to end soon; returns at once."""
        self._is_cancelled.set()

    def wait(self) -> None:
        """Block until the load has ended. Raises what went wrong beyond a miss, and ClosedError in a forked process."""
        if os.getpid() != self._pid:
            raise ClosedError("the load belongs to the process that began it, not to one forked from it")
        self._work.result()

    def wait_ended(self) -> None:
        """Block until the load has ended, with or without an error."""
        wait([self._work])

    def next_piece(self) -> int:
        """Return how many leading blocks the engine should compute now; 0: the loader does the rest."""
        costs = self._costs
        return self.division.next_piece(compute_s=costs.pass_s, load_s=self._block_s(), most=costs.piece_blocks)

    def wanted_piece(self) -> int:
        """Return how many leading blocks this rank wants computed next, and claim nothing."""
        costs = self._costs
        return self.division.wanted_piece(compute_s=costs.pass_s, load_s=self._block_s(), most=costs.piece_blocks)

    def claim_agreed(self, num_blocks: int) -> list[Ready]:
        """Claim for the engine what all ranks agreed to compute next. Return copies that its pass must wait for."""
        with self._copying:
            return list(self.copies) if self.division.claim_agreed(num_blocks) else []

    @property
    def has_failed(self) -> bool:
        """Whether the load has ended with an error beyond a miss; `wait` raises it."""
        return self._work.done() and self._work.exception() is not None

    def _block_s(self) -> float | None:
        """Return the seconds that loading takes a block: in this load, or in earlier ones before it has a block."""
        num_loaded, seconds = self._loaded
        if seconds is None:
            num_loaded = len(self.hits)
            seconds = self._costs.load_costs[self._kind].estimate(num_loaded)
        return None if seconds is None else seconds / num_loaded

    def _run_in_span(self) -> None:
        with self._tiers.span("load in the background") as detail:
            self._run()
            detail["blocks"] = len(self.copies)

    def _run(self) -> None:
        """Keep the reading threads busy, and copy what they have read in the order of claims."""
        tiers = self._tiers
        at_once = _DECODED_AT_ONCE if tiers.memory.frames else 1
        reading: deque[_Reading] = deque()
        started = time.perf_counter()
        try:
            while self.failure is None and not self._is_cancelled.is_set():
                self._start_reading(reading)
                if not reading:
                    break
                read = [reading.popleft() for _ in range(min(at_once, len(reading)))]
                while reading and reading[0][2].done():
                    read.append(reading.popleft())
                is_wanted = self._load(read)
                if num_loaded := len(self.hits) - self.division.first_loaded:
                    self._loaded = (num_loaded, time.perf_counter() - started)
                if not is_wanted:
                    break
        finally:
            self.division.end_loading()
            for _, place, decoded in reading:
                decoded.exception()  # its bytes are of no use, but the thread may still be writing them
                tiers.unpin([place])
            tiers.unpin_all(Tier.HOT, self._targets)

    def _load(self, read: Sequence[_Reading]) -> bool:
        """Load the leading good ones of what was read. Return whether that was all, and is still wanted."""
        good: list[tuple[int, Place, CodedBlock]] = []
        wait([decoded for _, _, decoded in read])
        with self._copying:
            try:
                for at, place, decoded in read:
                    outcome = decoded.result()
                    if isinstance(outcome, MissReason):
                        self.failure, self.failed = outcome, (self.hits[at], outcome)
                        break
                    if not self.division.note_loaded(at):
                        break
                    good.append((at, place, outcome))
            except BaseException:
                self._tiers.unpin(place for _, place, _ in read)
                raise
            self._tiers.unpin(place for _, place, _ in read[len(good) :])
            if good:
                self._copy(good)
        return len(good) == len(read)

    def _start_reading(self, reading: deque[_Reading]) -> None:
        """Claim blocks and start to read them until every thread has a block and enough others are queued."""
        tiers = self._tiers
        num_threads = tiers.memory.read_threads.num_threads
        most = num_threads + (_DECODED_AT_ONCE if tiers.memory.frames else num_threads)
        while len(reading) < most and not self._is_cancelled.is_set():
            places = tiers.try_take_raw(1) if reading else tiers.take_raw(1)
            if not places:
                self.failure = None if reading else MissReason.NO_ROOM
                return
            at = self.division.claim_load()
            if at is None:
                tiers.unpin(places)
                return
            try:
                decoded = tiers.memory.read_threads.submit(Priority.REQUEST, self._read, self.hits[at], places[0])
            except BaseException:
                tiers.unpin(places)
                raise
            reading.append((at, places[0], decoded))

    def _copy(self, good: Sequence[tuple[int, Place, CodedBlock]]) -> None:
        places = [place for _, place, _ in good]
        targets = [self._targets[at] for at, _, _ in good]
        try:
            ready = self._tiers.load(places, targets, coded=[block for _, _, block in good], after=self._after)
        except StoreError:
            self._tiers.unpin(places)
            self.failure = MissReason.IO_ERROR
            self.division.end_loading(good[0][0] + 1)
            return
        except BaseException:
            self._tiers.unpin(places)
            raise
        self._tiers.track(ready, places, targets)
        self.copies.append(ready)
