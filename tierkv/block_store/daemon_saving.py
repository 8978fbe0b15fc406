"""DaemonSaver: copies blocks of the engine into slots that the daemon reserves, and publishes them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.background.work_queue import WriteBehind
from tierkv.block_store.daemon_chains import Connection, DaemonChains
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Placement
from tierkv.block_store.saving import copy_sources, wanted_blocks
from tierkv.block_store.transfers import Save
from tierkv.daemon.messages import Abandon, ChainAnswer, Publish, Published, Reserve, Reserved
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError
from tierkv.movers.ready import Ready
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["DaemonSaver"]

_log = logging.getLogger(__name__)

_QUEUE_JOBS = 4096
_FLUSH_STALL_S = 30.0
_REFUSALS = ("no_room", "no_parent", "collision")


@dataclass(frozen=True, slots=True)
class _Job:
    """Reserved slots to publish once the copies into them have ended. slots: as the daemon gave them."""

    connection: Connection
    slots: bytes
    copied: Ready

    @property
    def num_blocks(self) -> int:
        return len(self.slots) // 4


class DaemonSaver:
    """What a block store does to save blocks to the daemon. One thread publishes; a save never waits for it.

    A block whose copy has ended when `save` returns, as on a CPU, is published by then. connected: returns the present
    connection.
    """

    def __init__(
        self,
        connected: Callable[[], Connection | None],
        chains: DaemonChains,
        layout: BlockLayout,
        stats: StatsRecorder,
        changed: OwnedCondition,
    ) -> None:
        self._connected = connected
        self._chains = chains
        self._layout = layout
        self._stats = stats
        self._changed = changed
        self._queue: WriteBehind[_Job] = WriteBehind(
            self._publish, capacity=_QUEUE_JOBS, batch_size=1, name="tierkv-publish"
        )

    def save(self, keys: Sequence[BlockKey], sources: Placement, start: int) -> Save:
        """Take blocks over; see `BlockStore.save`."""
        num_wanted = len(wanted_blocks(keys, sources, start))
        chain = self._chains.leading(keys)
        connection = self._connected()
        if not num_wanted:
            return Save()
        if connection is not None and connection.is_reader:
            return self._skipped("read_only", num_wanted)
        if connection is None or start >= len(chain):
            return self._skipped("no_parent" if connection else "daemon", num_wanted)
        try:
            given = self._reserve(connection, chain, start)
        except DaemonError as exc:
            _log.debug("%d blocks were not saved: %s", num_wanted, exc)
            return self._skipped("daemon", num_wanted)
        slots = split_numbers(given.slots)
        num_skipped = max(0, num_wanted - len(slots) - given.num_there - given.num_busy)
        if num_skipped:
            self._count_skips(given.refusal if given.refusal in _REFUSALS else "refused", num_skipped)
        if given.num_there:
            with contextlib.suppress(DaemonError):
                connection.post(self._chains.match(chain, start, is_use=True))
        if not slots:
            return Save(num_skipped=num_skipped)

        def abandon() -> None:
            connection.end_writing(slots)
            connection.post(Abandon(slots=given.slots))

        places = [number - start for number in split_numbers(given.numbers)]
        copied = copy_sources(sources, places, slots, connection.slots, abandon=abandon)
        if copied is None:
            self._count_skips("io_error", len(slots))
            return Save(num_skipped=num_skipped + len(slots))
        job = _Job(connection, given.slots, copied)
        if copied.is_done():
            num_lost = 0 if self._publish_one(job) else len(slots)
            return Save(len(slots) - num_lost, num_skipped + num_lost, copied)
        if not self._queue.try_put(job):
            copied.synchronize()
            abandon()
            self._count_skips("queue_full", len(slots))
            return Save(num_skipped=num_skipped + len(slots))
        return Save(len(slots), num_skipped, copied)

    def flush(self) -> bool:
        """Wait until all that was saved has been published. Return False if one of the copies does not end."""
        return self._queue.flush(stall_s=_FLUSH_STALL_S)

    def close(self, *, stall_s: float) -> bool:
        """Publish what is queued and stop. Return whether the thread has ended; it hangs in a copy if not."""
        left = self._queue.close(stall_s=stall_s)
        self._count_skips("stalled", sum(job.num_blocks for job in left))
        return not (left or self._queue.is_running)

    def _reserve(self, connection: Connection, chain: Sequence[BlockKey], start: int) -> ChainAnswer:
        """Have slots reserved for the blocks from `start` on that the daemon lacks. Raises DaemonError."""
        connection.send_returned()  # those slots may be needed
        (given,) = connection.call(Reserve(chains=[self._chains.chain(chain, start)]), Reserved).chains
        connection.begin_writing(split_numbers(given.slots))
        return given

    def _publish(self, jobs: list[_Job]) -> None:
        for job in jobs:
            self._publish_one(job)

    def _publish_one(self, job: _Job) -> bool:
        """Wait for the copies of a job, then publish its blocks. Return whether the daemon has them now."""
        connection, slots = job.connection, split_numbers(job.slots)
        try:
            job.copied.synchronize()
        except RuntimeError as exc:  # the device has failed: nothing is copied any more
            _log.warning("%d blocks were not saved: %s", job.num_blocks, exc)
            connection.end_writing(slots)
            connection.post(Abandon(slots=job.slots))
            self._count_skips("io_error", job.num_blocks)
            return False
        connection.end_writing(slots)
        try:
            connection.call(Publish(slots=job.slots), Published)
        except DaemonError as exc:
            _log.debug("%d blocks were not published: %s", job.num_blocks, exc)
            self._count_skips("daemon", job.num_blocks)
            return False
        with self._changed:
            self._stats.bytes_in[Tier.WARM] += job.num_blocks * self._layout.block_bytes
        return True

    def _skipped(self, reason: str, count: int) -> Save:
        self._count_skips(reason, count)
        return Save(num_skipped=count)

    def _count_skips(self, reason: str, count: int) -> None:
        if count:
            with self._changed:
                self._stats.skip_reasons[reason] += count
