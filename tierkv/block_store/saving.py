"""BlockSaver: takes blocks over from the engine, and writes them to the disk in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.background.work_queue import WriteBehind
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Placement
from tierkv.block_store.stored_blocks import StoredBlocks, info_of
from tierkv.block_store.transfers import Save
from tierkv.block_store.warm_memory import WarmMemory
from tierkv.errors import ConfigError, ShapeError, StoreError
from tierkv.movers.ready import Ready
from tierkv.readers.record_encoder import RecordEncoder
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import Codec
from tierkv.storage.outcomes import PutOutcome
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["BlockSaver", "copy_sources", "wanted_blocks"]

_log = logging.getLogger(__name__)

_JOB_BLOCKS = 8
_QUEUE_JOBS = 4096
_FLUSH_STALL_S = 30.0


def wanted_blocks(keys: Sequence[BlockKey], sources: Placement, start: int) -> list[BlockKey]:
    """Return the blocks that are to be saved. Raises ConfigError or ShapeError unless each has a place."""
    if not 0 <= start <= len(keys):
        raise ConfigError(f"start is {start}, of {len(keys)} blocks")
    wanted = list(keys[start:])
    if len(sources) != len(wanted):
        raise ShapeError(f"{len(wanted)} blocks are to be saved, there are {len(sources)} places")
    return wanted


def copy_sources(
    sources: Placement, places: Sequence[int], slots: Sequence[int], memory: Bytes, *, abandon: Callable[[], None]
) -> Ready | None:
    """Begin to copy places into slots. If that fails, abandon the slots and return None, or raise ShapeError."""
    try:
        return sources.save(places, slots, memory, after=[sources.mark()])
    except StoreError as exc:
        _log.warning("%d blocks were not saved: %s", len(slots), exc)
        abandon()
        return None
    except BaseException:
        abandon()
        raise


@dataclass(frozen=True, slots=True)
class _Job:
    """Blocks in pinned slots to write to the disk, parents first, once their copies have ended."""

    keys: Sequence[BlockKey]
    slots: Sequence[int]
    copied: Ready


class BlockSaver:
    """What `BlockStore` does to save blocks. One thread writes; a save never waits for it.

    Remote tiers get a copy of each record, from queues of their own.
    """

    def __init__(
        self,
        memory: WarmMemory,
        stored: StoredBlocks,
        root: BlockHash,
        codec: Codec,
        stats: StatsRecorder,
        changed: OwnedCondition,
    ) -> None:
        self._memory = memory
        self._cold = None if stored.cold is None or stored.cold.read_only else stored.cold
        self._remote = stored.remote
        self._root = root
        self._stats = stats
        self._changed = changed
        self._is_awaited = False
        self._encoder = RecordEncoder(memory.layout, codec, readers=memory.readers, threads=memory.threads)
        self._queue: WriteBehind[_Job] = WriteBehind(self._write, capacity=_QUEUE_JOBS, batch_size=1)

    def save(self, keys: Sequence[BlockKey], sources: Placement, start: int) -> Save:
        """Take blocks over; see `BlockStore.save`."""
        wanted = wanted_blocks(keys, sources, start)
        missing = self._missing(wanted)
        with self._changed:
            slots = self._memory.take(len(missing))
        if num_skipped := len(missing) - len(slots):
            self._count_skips("no_room", num_skipped)
        missing = missing[: len(slots)]
        if not missing:
            return Save(num_skipped=num_skipped)

        def abandon() -> None:
            with self._changed:
                self._memory.unpin(slots)

        copied = copy_sources(sources, missing, slots, self._memory.slots, abandon=abandon)
        if copied is None:
            self._count_skips("io_error", len(slots))
            return Save(num_skipped=len(slots) + num_skipped)
        return Save(self._enter([wanted[at] for at in missing], slots, copied), num_skipped, copied)

    def flush(self) -> None:
        """Wait until all that was saved has been written. Raises StoreError if one write takes too long."""
        self._is_awaited = True
        try:
            is_written = self._queue.flush(stall_s=_FLUSH_STALL_S)
        finally:
            self._is_awaited = False
        if not is_written:
            raise StoreError(f"a write to the store has taken longer than {_FLUSH_STALL_S:g} s")

    def close(self, *, stall_s: float) -> bool:
        """Write what is queued and stop. Return whether the write thread has ended; it hangs in a write if not."""
        self._is_awaited = True
        left = self._queue.close(stall_s=stall_s)
        with self._changed:
            for job in left:
                self._memory.unpin(job.slots)
                self._stats.skip_reasons["stalled"] += len(job.keys)
        if left:
            _log.warning("%d blocks were not written before the block store was closed", sum(len(j.keys) for j in left))
        self._encoder.close()
        return not self._queue.is_running

    def _missing(self, wanted: Sequence[BlockKey]) -> list[int]:
        """Return the positions of the blocks that neither the warm memory nor the disk has; touch the others.

        A damaged block is removed from the disk with those that follow it when it is written again: they are missing
        too.
        """
        index = self._memory.index
        with self._changed:
            index.touch(wanted)
            unknown = [at for at, key in enumerate(wanted) if index.get(key) is None]
            collide = {at for at in unknown if index.collides(wanted[at])}
            if collide:
                self._stats.skip_reasons["collision"] += len(collide)
        unknown = [at for at in unknown if at not in collide]
        if self._cold is None or not unknown:
            return unknown
        try:
            entries = self._cold.lookup_many(wanted[at].block_hash for at in unknown)
        except StoreError:  # the write says what is wrong
            return unknown
        missing: list[int] = []
        lost: set[BlockHash] = set()
        for at, entry in zip(unknown, entries, strict=True):
            key = wanted[at]
            if entry is None or entry.parent != key.parent_hash or key.parent_hash in lost:
                missing.append(at)
                lost.add(key.block_hash)
        self._cold.notes.touch([wanted[at].block_hash for at in unknown if wanted[at].block_hash not in lost])
        return missing

    def _enter(self, keys: Sequence[BlockKey], slots: Sequence[int], copied: Ready) -> int:
        """Enter blocks that are being copied into slots, and queue them for the disk. Return how many are new."""
        memory = self._memory
        with self._changed:
            new: list[tuple[BlockKey, int]] = []
            spare: list[int] = []
            for key, slot in zip(keys, slots, strict=True):
                if memory.index.get(key) or memory.index.collides(key):  # another thread was faster
                    spare.append(slot)
                    continue
                memory.index.add(key, slot, copied)
                new.append((key, slot))
            memory.unpin_after(copied, spare)
            self._stats.bytes_in[Tier.WARM] += len(new) * memory.layout.block_bytes
            for first in range(0, len(new), _JOB_BLOCKS):
                part = new[first : first + _JOB_BLOCKS]
                job = _Job([key for key, _ in part], [slot for _, slot in part], copied)
                if self._cold is None and self._remote is None:
                    memory.unpin_after(copied, job.slots)
                elif not self._queue.try_put(job):
                    memory.unpin_after(copied, job.slots)
                    self._stats.skip_reasons["queue_full"] += len(part)
        return len(new)

    def _write(self, jobs: list[_Job]) -> None:
        """Write jobs to the disk, and unpin their slots. Blocks that cannot be written are counted."""
        for job in jobs:
            outcomes: Sequence[PutOutcome] = [PutOutcome.IO_ERROR] * len(job.keys)
            try:
                job.copied.synchronize()
                outcomes = self._put(job)
            except (StoreError, RuntimeError) as exc:
                _log.warning("%d blocks were not written to the disk: %s", len(job.keys), exc)
            finally:
                with self._changed:
                    self._memory.unpin(job.slots)
                    self._count(outcomes)
        try:
            if self._cold and self._cold.notes.are_due:
                self._cold.maintain()
        except StoreError as exc:
            _log.warning("what readers have noted is not written yet: %s", exc)

    def _count(self, outcomes: Sequence[PutOutcome]) -> None:
        """Count what became of blocks; the caller holds the lock."""
        assert self._changed.is_owned()
        for outcome in outcomes:
            if outcome is PutOutcome.STORED:
                self._stats.bytes_in[Tier.COLD] += self._memory.layout.block_bytes
            elif outcome is not PutOutcome.EXISTS:
                self._stats.skip_reasons[outcome.value] += 1

    def _count_skips(self, reason: str, count: int) -> None:
        with self._changed:
            self._stats.skip_reasons[reason] += count

    def _put(self, job: _Job) -> Sequence[PutOutcome]:
        """Encode blocks and write them to the disk, and have remote tiers get them."""
        slots = self._memory.slots
        blocks = [(info_of(key, self._root), slots[slot]) for key, slot in zip(job.keys, job.slots, strict=True)]
        is_kept = self._remote is not None
        with self._encoder.encoding(blocks, is_awaited=lambda: self._is_awaited, is_kept=is_kept) as records:
            if self._remote:
                for record in records:
                    self._remote.write(record)
            return self._cold.put(records) if self._cold else []
