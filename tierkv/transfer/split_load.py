"""Loads the cold blocks of one request from the back while its engine computes from the front."""

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
from tierkv.transfer.costs import LoadKind
from tierkv.transfer.lookup import Hit
from tierkv.transfer.meeting import Meeting
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import Tier

__all__ = ["SplitLoad"]

_Reading: TypeAlias = "tuple[int, Place, Future[MissReason | CodedBlock]]"
_DECODED_AT_ONCE = 16  # a GPU takes hardly longer to decode sixteen blocks than to decode one
ReadBlock: TypeAlias = Callable[[Hit, Place], "MissReason | CodedBlock"]


class SplitLoad:
    """One request's cold blocks on their way up, last one first, into block ids that it holds.

    hits: the cold blocks in order, behind num_before tokens; in_memory: whether the page cache has them. targets: their
    block ids, of which the load keeps a reference of its own until it has ended. after: when the targets may be
    written. The bytes are registered with nobody: the registrar does that once the blocks before them are. Runs on
    `tiers.loaders`; `read` decodes one block on `tiers.threads`.
    """

    def __init__(
        self,
        tiers: Tiers,
        hits: Sequence[Hit],
        targets: Sequence[int],
        *,
        num_before: int,
        in_memory: bool,
        read: ReadBlock,
        after: Ready,
    ) -> None:
        self.hits = list(hits)
        self.num_before = num_before
        self.meeting = Meeting(len(hits))
        self.loads: list[Ready] = []
        self.failure: MissReason | None = None
        self.failed: tuple[Hit, MissReason] | None = None
        self._pid = os.getpid()
        self._tiers = tiers
        self._targets = list(targets)
        self._read = read
        self._after = after
        self._kind = LoadKind(in_memory)
        self._brought: tuple[int, float | None] = (0, None)
        self._is_cancelled = threading.Event()
        with tiers.changed:
            tiers.index.hot.pin_all(self._targets)
        try:
            self._work = tiers.loaders.submit(self._run_watched)
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
        """Block until the load has ended, however it did."""
        wait([self._work])

    def next_piece(self, *, most: int) -> int:
        """Return how many leading blocks, at most `most`, the engine shall compute now; 0: the load does the rest."""
        tiers = self._tiers
        size = tiers.layout.block_size
        return self.meeting.next_piece(
            compute_s=lambda count: tiers.step_costs.estimate(count * size), load_s=self._block_s(), most=most
        )

    def _block_s(self) -> float | None:
        """Return the seconds a block that loading takes, here or until the first is there elsewhere; None: unknown."""
        num_brought, seconds = self._brought
        if seconds is None:
            num_brought = len(self.hits)
            seconds = self._tiers.load_costs[self._kind].estimate(num_brought)
        return None if seconds is None else seconds / num_brought

    def _run_watched(self) -> None:
        with self._tiers.watch.span("load behind") as detail:
            self._run()
            detail["blocks"] = len(self.loads)

    def _run(self) -> None:
        """Keep the reading threads busy, and bring up in the order of claims what they have read."""
        tiers = self._tiers
        at_once = _DECODED_AT_ONCE if tiers.frames else 1
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
                is_wanted = self._bring(read)
                if num_brought := len(self.hits) - self.meeting.first_loaded:
                    self._brought = (num_brought, time.perf_counter() - started)
                if not is_wanted:
                    break
        finally:
            self.meeting.end_loading()
            for _, place, decoded in reading:
                decoded.exception()  # its bytes are of no use, but the thread may still be writing them
                tiers.unpin([place])
            tiers.unpin_all(Tier.HOT, self._targets)

    def _bring(self, read: Sequence[_Reading]) -> bool:
        """Bring up the leading good ones of what was read. Return whether that was all, and is still wanted."""
        good: list[tuple[int, Place, CodedBlock]] = []
        wait([decoded for _, _, decoded in read])
        try:
            for at, place, decoded in read:
                outcome = decoded.result()
                if isinstance(outcome, MissReason):
                    self.failure, self.failed = outcome, (self.hits[at], outcome)
                    break
                if not self.meeting.bring(at):
                    break
                good.append((at, place, outcome))
        except BaseException:
            self._tiers.unpin(place for _, place, _ in read)
            raise
        self._tiers.unpin(place for _, place, _ in read[len(good) :])
        if good:
            self._copy_up(good)
        return len(good) == len(read)

    def _start_reading(self, reading: deque[_Reading]) -> None:
        """Claim blocks and start to read them until every thread has one and enough others wait."""
        tiers = self._tiers
        most = tiers.num_threads + (_DECODED_AT_ONCE if tiers.frames else tiers.num_threads)
        while len(reading) < most and not self._is_cancelled.is_set():
            places = tiers.try_take_raw(1) if reading else tiers.take_raw(1)
            if not places:
                self.failure = None if reading else MissReason.NO_ROOM
                return
            at = self.meeting.claim_load()
            if at is None:
                tiers.unpin(places)
                return
            try:
                decoded = tiers.threads.submit(Priority.REQUEST, self._read, self.hits[at], places[0])
            except BaseException:
                tiers.unpin(places)
                raise
            reading.append((at, places[0], decoded))

    def _copy_up(self, good: Sequence[tuple[int, Place, CodedBlock]]) -> None:
        places = [place for _, place, _ in good]
        targets = [self._targets[at] for at, _, _ in good]
        try:
            ready = self._tiers.bring_up(places, targets, coded=[block for _, _, block in good], after=self._after)
        except StoreError:
            self._tiers.unpin(places)
            self.failure = MissReason.IO_ERROR
            self.meeting.end_loading(good[0][0] + 1)
            return
        except BaseException:
            self._tiers.unpin(places)
            raise
        self._tiers.track(ready, places, targets)
        self.loads.append(ready)
