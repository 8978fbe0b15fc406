"""Loader: what a block store does to load reserved blocks, wherever their warm slots lie."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from tierkv.block_store.misses import log_lost
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.transfers import Load
from tierkv.errors import ClosedError, ConfigError, StoreError
from tierkv.movers.ready import Ready
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["Loader"]

_log = logging.getLogger(__name__)

_NUM_LOADERS = 5  # one of them may be calibrating
_POLL_S = 0.1


class Loader(ABC):
    """Copies reserved blocks to the engine. Work that waits goes on in threads, one for each request.

    A subclass finds and reads blocks.
    """

    def __init__(self, layout: BlockLayout, stats: StatsRecorder, changed: OwnedCondition) -> None:
        self.layout = layout
        self.stats = stats
        self.changed = changed
        self.is_closing: bool = False
        self._num_working = 0
        self._in_progress: list[Load] = []
        self._loaders = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="tierkv-load")

    def load(self, reservation: Reservation, targets: Placement) -> Load:
        """Copy reserved blocks to the engine; see `BlockStore.load`."""
        with self.changed:
            self.reap()
            if reservation.is_released:
                raise ConfigError("the reservation was released, or loaded before")
            reservation.drop(len(targets))
            reservation.take_over()
            keys, slots = list(reservation.keys), reservation.ready_slots()
        load = Load(keys, ended=partial(self._end, reservation))
        try:
            after = targets.mark()
            if len(slots) == len(keys):
                self.copy(load, reservation, targets, slots, after)
            else:
                load.start_working(self.submit(self.load_slowly, load, reservation, targets, after))
        except BaseException:
            self._end(reservation)
            raise
        if not load.is_done():
            with self.changed:
                self._in_progress.append(load)
        return load

    def close(self, *, stall_s: float) -> bool:
        """Refuse further work and wait for what is in progress, at most `stall_s` seconds. Return whether it ended."""
        self.is_closing = True
        deadline = time.monotonic() + stall_s
        self._loaders.shutdown(wait=False)
        while time.monotonic() < deadline:
            with self.changed:
                self.reap()
                if not self._num_working:
                    break
                self.changed.wait(_POLL_S)
        with self.changed:
            in_progress, self._in_progress = self._in_progress, []
            if self._num_working:
                return False
        for load in in_progress:
            with contextlib.suppress(RuntimeError):  # of a device that has failed: nothing is copied any more
                load.synchronize()
        return True

    # for subclasses

    @abstractmethod
    def load_slowly(self, load: Load, reservation: Reservation, targets: Placement, after: Ready) -> None:
        """Load blocks of which some are still being read, or are not read yet, on a thread of its own."""

    def being_written(self, slots: Sequence[int]) -> list[Ready]:
        """Return when the bytes of these slots are there, for those that are still being written."""
        return []

    def reap(self) -> None:
        """Release what loads that have ended still hold; the caller holds the lock."""
        assert self.changed.is_owned()
        self._in_progress = [load for load in self._in_progress if not load.is_done()]

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Start work on a thread of its own; `close` waits for it."""
        with self.changed:
            self._num_working += 1
        try:
            return self._loaders.submit(self._work, function, arguments)
        except RuntimeError as exc:
            self._end_work()
            raise ClosedError("the block store is being closed") from exc

    def copy(
        self, load: Load, reservation: Reservation, targets: Placement, slots: Sequence[int], after: Ready
    ) -> bool:
        """Begin to copy the next blocks of a load from held slots. Return False, with nothing loaded, if it fails."""
        with self.changed:
            written = self.being_written(slots)
        try:
            copied = targets.load(load.num_loaded, slots, reservation.memory, after=[after, *written])
        except StoreError as exc:
            _log.warning("%d blocks are misses: %s", len(slots), exc)
            self.count_miss(MissReason.IO_ERROR)
            return False
        load.add(copied, len(slots))
        with self.changed:
            self.stats.bytes_out[Tier.WARM] += len(slots) * self.layout.block_bytes
        return True

    def count_request(self, num_wanted: int, num_warm: int, num_found: int, reason: MissReason | None) -> None:
        """Count a request; the caller holds the lock. reason: why the first block that was not found is missing."""
        assert self.changed.is_owned()
        stats, block_size = self.stats, self.layout.block_size
        stats.requests += 1
        stats.misses += num_wanted - num_found
        for tier, count in ((Tier.WARM, num_warm), (Tier.COLD, num_found - num_warm)):
            stats.hits[tier] += count
            stats.hit_tokens[tier] += count * block_size
        stats.prompt_tokens += num_wanted * block_size
        if reason:
            stats.miss_reasons[reason.value] += 1

    def count_miss(self, reason: MissReason) -> None:
        """Count a block that was found and cannot be had."""
        with self.changed:
            self.stats.misses += 1
            self.stats.miss_reasons[reason.value] += 1
        log_lost(reason)

    def _work(self, function: Callable[..., None], arguments: Sequence[object]) -> None:
        try:
            function(*arguments)
        except Exception:  # noqa: BLE001 - the outermost call of its thread; what it did not load has failed
            if not self.is_closing:
                _log.exception("loading blocks failed")
        finally:
            self._end_work()

    def _end_work(self) -> None:
        with self.changed:
            self._num_working -= 1
            self.changed.notify_all()

    def _end(self, reservation: Reservation) -> None:
        with self.changed:
            reservation.drop(0)
