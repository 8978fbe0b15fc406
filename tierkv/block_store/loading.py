"""BlockLoader: finds blocks, reads cold ones into warm memory, and copies them to the engine."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import wait
from itertools import chain

from tierkv.background.work_queue import Priority
from tierkv.block_store.coded_slots import CodedSlots
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.loader import Loader
from tierkv.block_store.misses import are_logged, log_misses
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.stored_blocks import StoredBlocks, info_of
from tierkv.block_store.transfers import Load
from tierkv.block_store.warm_memory import WarmMemory
from tierkv.errors import StoreError
from tierkv.movers.ready import DONE, Ready
from tierkv.storage.codec import Bytes
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["BlockLoader"]

_log = logging.getLogger(__name__)

_WAVE_BLOCKS, _WAVE_BYTES = 64, 1 << 30  # the greater number of blocks: threads idle at the end of a wave
_GROUP_BLOCKS, _GROUP_BYTES = 16, 8 << 20  # the lesser number of blocks, which one thread reads at a time
_AHEAD_BLOCKS = 4
_COPY_BYTES = 128 << 20  # that are copied to the engine at a time while others are being read


class BlockLoader(Loader):
    """Finds and loads blocks of the own warm memory and store."""

    def __init__(
        self,
        memory: WarmMemory,
        stored: StoredBlocks,
        root: BlockHash,
        stats: StatsRecorder,
        changed: OwnedCondition,
    ) -> None:
        super().__init__(memory.layout, stats, changed)
        self._memory = memory
        self._stored = stored
        self._root = root
        self._coded = CodedSlots(memory, changed)
        self._spare_lock = threading.Lock()
        self.measuring = threading.Lock()  # held while a GPU works for a measurement

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks are warm, cold or remote."""
        found = 0
        while found < len(keys):
            with self.changed:
                while found < len(keys) and self._memory.index.get(keys[found]):
                    found += 1
                end = found
                while end < len(keys) and not self._memory.index.get(keys[end]):
                    end += 1
            missing = keys[found:end]
            num_cold = self._stored.count(missing)
            found += num_cold
            if num_cold < len(missing):
                break
        if are_logged() and found < len(keys):
            with self.changed:
                reason = self._reason(keys, found)
            log_misses(len(keys), found, reason)
        return found

    def reserve(self, keys: Sequence[BlockKey], start: int) -> Reservation:
        """Hold blocks; see `BlockStore.reserve`."""
        wanted = list(keys[start:])
        memory = self._memory
        with self.changed:
            self.reap()
            is_warm = [memory.index.get(key) is not None for key in wanted]
            slots = memory.hold(wanted[: memory.most_held])
        try:
            num_found = self._count_found(wanted, is_warm)
        except BaseException:
            with self.changed:
                memory.unpin(slot for slot in slots if slot is not None)
            raise
        with self.changed:
            memory.unpin(slot for slot in slots[num_found:] if slot is not None)
            slots = [*slots[:num_found], *[None] * (num_found - len(slots))]
            memory.index.touch(keys[: start + num_found])
            num_warm = sum(slot is not None for slot in slots)
            reason = self._reason(wanted, num_found)
            self.count_request(len(wanted), num_warm, num_found, reason)
        log_misses(len(wanted), num_found, reason)
        if start + num_found:
            self._stored.touch(keys[: start + num_found])
        missing = [key for key, slot in zip(wanted, slots, strict=False) if slot is None]
        found = Reservation(
            wanted[:num_found],
            slots,
            memory.slots,
            changed=self.changed,
            unpin=memory.unpin,
            origin=self._stored.origin(missing),
            num_at_once=self._memory.read_threads.num_threads * self._group_size(len(missing)),
        )
        if None in slots[: memory.most_held]:
            found.start_reading(self.submit(self._read, found))
        return found

    def _count_found(self, wanted: Sequence[BlockKey], is_warm: Sequence[bool]) -> int:
        """Return how many leading blocks are warm or cold. A warm block beyond those held may not be on disk yet."""
        found = 0
        while found < len(wanted):
            if is_warm[found]:
                found += 1
                continue
            end = next((at for at in range(found, len(wanted)) if is_warm[at]), len(wanted))
            num_cold = self._stored.count(wanted[found:end])
            found += num_cold
            if found < end:
                break
        return found

    def _reason(self, wanted: Sequence[BlockKey], num_found: int) -> MissReason | None:
        """Return why the first block that was not found is missing; the caller holds the lock."""
        assert self.changed.is_owned()
        if num_found == len(wanted):
            return None
        key = wanted[num_found]
        cold = self._stored.cold
        if cold is not None and cold.was_evicted(key.block_hash):
            return MissReason.EVICTED
        return MissReason.COLLISION if self._memory.index.collides(key) else MissReason.ABSENT

    def being_written(self, slots: Sequence[int]) -> list[Ready]:
        """Return when the bytes of these slots are there; the caller holds the lock."""
        assert self.changed.is_owned()
        owners = (self._memory.index.slots.owners[slot] for slot in slots)
        written = [owner.written for owner in owners if owner]
        written += [self._memory.arriving[slot] for slot in slots if slot in self._memory.arriving]
        return [each for each in written if not each.is_done()]

    def reap(self) -> None:
        """Release what copies that have ended still hold; the caller holds the lock."""
        assert self.changed.is_owned()
        self._memory.reap()
        super().reap()

    def load_slowly(self, load: Load, reservation: Reservation, targets: Placement, after: Ready) -> None:
        """Load blocks of which some are still being read, or are not read yet, on a thread of its own."""
        least = max(1, _COPY_BYTES // self.layout.block_bytes, self._memory.num_decoded_at_once)
        is_reading = True
        while is_reading:
            is_reading, slots = reservation.wait_for_more(load.num_loaded, least)
            if slots and not self.copy(load, reservation, targets, slots, after):
                return
        with self.changed:
            keys = list(reservation.keys)
        if load.num_loaded == len(keys):
            return
        with self._spare_lock:
            while load.num_loaded < len(keys) and not self.is_closing:
                if not self._load_through_spare(load, reservation, keys[load.num_loaded :], targets, after):
                    return

    def time_reading(self, keys: Sequence[BlockKey], *, may_go_on: Callable[[], bool] = lambda: True) -> float | None:
        """Read blocks from the store and keep none: return how many seconds that takes. No request waits for it.

        keys: at most as many as there are spare slots, which is where they are read. may_go_on: asked before a GPU
        decodes them. Return None if not, if one cannot be read, or if a load needs the spare slots.
        """
        if not self._spare_lock.acquire(blocking=False):
            return None
        try:
            wanted = list(zip(keys, self._memory.spare[: len(keys)], strict=True))
            started = time.perf_counter()
            with contextlib.closing(self._read_all(wanted, is_request=False)) as groups:
                if any(self.is_closing or any(reasons) for reasons in groups):
                    return None
            with self.measuring:
                if not may_go_on():
                    return None
                self._coded.decode_for_nothing([slot for _, slot in wanted])
            return time.perf_counter() - started
        except StoreError:  # of the GPU
            return None
        finally:
            self._spare_lock.release()

    def copy(
        self, load: Load, reservation: Reservation, targets: Placement, slots: Sequence[int], after: Ready
    ) -> bool:
        """Begin to copy the next blocks of a load; payloads are decoded. Return False if it fails: the rest is lost.

        Then, and after an error, the copies that have begun have ended: their slots may be released.
        """
        is_good = False
        try:
            is_good = all(
                self._copy_coded(load, targets, some, after)
                if is_coded and self._coded.can_decode_into(targets)
                else self._copy_decoded(load, reservation, targets, some, after, is_coded=is_coded)
                for is_coded, some in self._coded.runs_of(slots)
            )
        finally:
            if not is_good:
                load.synchronize_parts()
        return is_good

    def _copy_decoded(
        self,
        load: Load,
        reservation: Reservation,
        targets: Placement,
        slots: Sequence[int],
        after: Ready,
        *,
        is_coded: bool,
    ) -> bool:
        """Copy the next blocks of a load; payloads are decoded by this thread before."""
        if is_coded:
            try:
                self._coded.decode_here(slots)
            except StoreError as exc:
                self._lose(slots, exc)
                return False
            self._enter_decoded(slots, DONE)
        return super().copy(load, reservation, targets, slots, after)

    def _copy_coded(self, load: Load, targets: Placement, slots: Sequence[int], after: Ready) -> bool:
        """Have the GPU decode the next blocks of a load. They stay warm, but those that only pass through."""
        try:
            copied, written = self._coded.copy(load.num_loaded, slots, targets, after)
        except StoreError as exc:
            self._lose(slots, exc)
            return False
        load.add(copied, len(slots))
        self._enter_decoded(slots, written)
        with self.changed:
            self.stats.bytes_out[Tier.WARM] += len(slots) * self.layout.block_bytes
        return True

    def _lose(self, slots: Sequence[int], reason: StoreError) -> None:
        _log.warning("%d blocks are misses: %s", len(slots), reason)
        self.count_miss(MissReason.IO_ERROR)

    def _enter_decoded(self, slots: Sequence[int], written: Ready) -> None:
        """Enter blocks whose payloads have become what they are the payloads of; `written` says when."""
        with self.changed:
            for slot in reversed(slots):  # a chain goes from its end
                self._memory.enter(slot, written)
                self._memory.forget_coded([slot])

    def _load_through_spare(
        self, load: Load, reservation: Reservation, keys: Sequence[BlockKey], targets: Placement, after: Ready
    ) -> bool:
        """Load the next few unread blocks through the spare slots. Return False if one of them cannot be had."""
        memory = self._memory
        wave = keys[: len(memory.spare)]
        with self.changed:
            held = memory.hold(wave)
        try:
            missing = [(key, spare) for key, spare, slot in zip(wave, memory.spare, held, strict=False) if slot is None]
            slots: list[int] = []
            failure: MissReason | None = None
            with contextlib.closing(self._read_all(missing)) as groups:
                reasons = chain.from_iterable(groups)
                for slot, spare in zip(held, memory.spare, strict=False):
                    failure = next(reasons) if slot is None else None
                    if failure:
                        break
                    slots.append(spare if slot is None else slot)
            if slots and not self.copy(load, reservation, targets, slots, after):
                return False
            load.synchronize_parts()
        finally:
            with self.changed:
                memory.unpin(slot for slot in held if slot is not None)
        if failure:
            self.count_miss(failure)
        return failure is None

    def _read(self, reservation: Reservation) -> None:
        """Read the cold blocks of a reservation into warm memory, as far as there is room, on a thread of its own."""
        try:
            while not self.is_closing and self._read_wave(reservation):
                pass
        finally:
            with self.changed:
                reservation.end_reading()

    def _read_wave(self, reservation: Reservation) -> bool:
        """Read a few blocks. Return whether to go on: not after a failure, and not without room."""
        memory = self._memory
        most = max(_WAVE_BLOCKS, _WAVE_BYTES // self.layout.block_bytes)
        with self.changed:
            wanted = [each for each in reservation.wanted() if each[0] < memory.most_held][:most]
            for (at, key), slot in zip(wanted, memory.hold([key for _, key in wanted]), strict=True):
                if slot is not None:  # another request has read it meanwhile
                    reservation.put(at, key, slot)
            wanted = [each for each in reservation.wanted() if each[0] < memory.most_held][:most]
            slots = memory.take(len(wanted))
        wanted = wanted[: len(slots)]
        if not slots:
            return False
        kept = 0
        failure: MissReason | None = None
        try:
            reads = self._read_all([(key, slot) for (_, key), slot in zip(wanted, slots, strict=True)])
            with contextlib.closing(reads):
                for reasons in reads:
                    num_good, failure = _leading_good(reasons)
                    with self.changed:
                        for (at, key), slot in zip(wanted[kept:], slots[kept : kept + num_good], strict=False):
                            held = self._enter(key, slot)
                            kept += 1
                            is_wanted = reservation.put(at, key, held)
                            if not is_wanted:  # nor any block behind it
                                memory.unpin([held])
                                return False
                    if failure or self.is_closing:
                        break
        finally:
            with self.changed:
                memory.unpin(slots[kept:])
                if kept < len(wanted):
                    reservation.drop(wanted[kept][0])
        if failure:
            self.count_miss(failure)
        return failure is None

    def _enter(self, key: BlockKey, slot: int) -> int:
        """Enter a block that was read into a slot. Return the slot to hold, pinned. The caller holds the lock."""
        assert self.changed.is_owned()
        memory = self._memory
        self.stats.bytes_out[Tier.COLD] += memory.layout.block_bytes
        (known,) = memory.hold([key])
        if known is not None:  # another request was faster
            memory.unpin([slot])
            return known
        if slot not in memory.coded and not memory.index.collides(key):
            memory.index.add(key, slot, DONE)
        return slot

    def _read_all(
        self, wanted: Sequence[tuple[BlockKey, int]], *, is_request: bool = True
    ) -> Generator[list[MissReason | None], None, None]:
        """Read blocks into slots, several at a time. Yield for each, in order, why it could not be read, or None.

        They come in groups. Closing the generator ends the reads that nothing waits for any more. is_request: whether
        they are urgent, and counted.
        """
        threads = self._memory.read_threads
        size = self._group_size(len(wanted))
        reads = [
            threads.submit(
                Priority.REQUEST if is_request else Priority.PREFETCH,
                self._read_group if is_request else self._decode_group,
                wanted[start : start + size],
                wanted[start + _AHEAD_BLOCKS : start + _AHEAD_BLOCKS + size],
            )
            for start in range(0, len(wanted), size)
        ]
        try:
            for read in reads:
                yield read.result()
        finally:
            for read in reads:
                read.cancel()
            wait(reads)

    def _group_size(self, num_blocks: int) -> int:
        """Return how many of so many blocks a thread reads one after another."""
        share = num_blocks // self._memory.read_threads.num_threads
        return max(1, min(_GROUP_BLOCKS, _GROUP_BYTES // self.layout.block_bytes, share))

    def _read_group(
        self, group: Sequence[tuple[BlockKey, int]], ahead: Sequence[tuple[BlockKey, int]]
    ) -> list[MissReason | None]:
        """Read a few blocks one after another, while the disk fetches those `ahead`."""
        outs = self._begin_group(group, ahead)
        with self._coded.reading(group) as how:
            return self._stored.read_many_into([key for key, _ in group], self._root, outs, layout=self.layout, **how)

    def _decode_group(
        self, group: Sequence[tuple[BlockKey, int]], ahead: Sequence[tuple[BlockKey, int]]
    ) -> list[MissReason | None]:
        """Do as `_read_group` for blocks of the store, which counts no read of them."""
        outs, cold = self._begin_group(group, ahead), self._stored.cold
        assert cold is not None
        infos = [info_of(key, self._root) for key, _ in group]
        with self._coded.reading(group) as how:
            return cold.decode_blocks(infos, outs, layout=self.layout, **how)

    def _begin_group(self, group: Sequence[tuple[BlockKey, int]], ahead: Sequence[tuple[BlockKey, int]]) -> list[Bytes]:
        """Have the disk fetch the blocks `ahead`. Return where to read those of the group."""
        self._stored.read_ahead([key for key, _ in ahead])
        return [self._memory.slots[slot] for _, slot in group]


def _leading_good(reasons: Sequence[MissReason | None]) -> tuple[int, MissReason | None]:
    """Return how many leading blocks were read, and why the next one was not."""
    return next(((at, reason) for at, reason in enumerate(reasons) if reason), (len(reasons), None))
