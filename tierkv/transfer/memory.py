"""The memory of the hot and the warm tier, raw or compressed, and what moves blocks between them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field

import numpy as np

from tierkv.background.work_queue import PriorityThreadPool
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ConfigError, StoreError
from tierkv.index.slots import SlotPool
from tierkv.movers.frames import FrameMover, can_decode
from tierkv.movers.mover import Move, Mover
from tierkv.movers.windows import WindowMover, window_format
from tierkv.readers.pool import ReaderPool
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import Codec
from tierkv.storage.coded import CODED_ID
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.storage.windows import WindowFormat
from tierkv.values.block import Tier
from tierkv.values.events import MemoryRegion
from tierkv.values.layout import BlockLayout

__all__ = ["Compression", "TierMemory", "WarmMemory", "no_warm_memory", "open_warm_memory", "pool_regions"]

_logger = logging.getLogger(__name__)

_MIN_BLOCKS = 4
_MAX_STAGING_BLOCKS = 24
_MAX_CODED_BLOCKS = (
    34  # where a GPU decodes: 16 on their way there and 16 being read, or 32, and the write thread's two
)
_STAGING_SHARE = 8  # a compressed warm tier gives at most one byte in eight to raw blocks in work


@dataclass(slots=True, kw_only=True)
class Compression:
    """What a compressed warm tier has beside it.

    staging: raw blocks between the cold store and the hot tier, each for as long as a thread works on it.
    """

    form: WindowFormat
    mover: WindowMover
    staging: WarmPool
    slots: SlotPool[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmMemory:
    """The warm tier's memory and its movers. compression is None where blocks lie there as they are."""

    warm: WarmPool
    mover: Mover
    compression: Compression | None
    frames: FrameMover | None


@dataclass(slots=True, kw_only=True)
class TierMemory:
    """What moves the blocks of one cache: memory, movers, and the threads that read, decode and encode.

    raw: blocks as they are, beside the hot tier: the warm tier's own places, or the staging slots.
    frames: decodes cold blocks on the GPU, where that is possible. threads: a request's work first. read_threads: those
    that read cold blocks; the same ones, but with reader processes one for each process at least, and twice as many
    where a GPU decodes: they copy and compare checksums, without the interpreter's lock (measured). loaders: a thread
    for each request that loads while it computes. reserved_raw: places in `raw` that the write thread always holds.
    """

    layout: BlockLayout
    codec: Codec
    hot: HotPool
    warm: WarmPool
    mover: Mover
    compression: Compression | None
    frames: FrameMover | None
    threads: PriorityThreadPool
    num_readers: InitVar[int]
    loaders: ThreadPoolExecutor
    raw: WarmPool = field(init=False)
    readers: ReaderPool | None = field(init=False)
    read_threads: PriorityThreadPool = field(init=False)
    reserved_raw: int = 0

    def __post_init__(self, num_readers: int) -> None:
        self.raw = self.compression.staging if self.compression else self.warm
        self.read_threads = self.threads
        num_threads = self.threads.num_threads
        self.readers = ReaderPool.of_slab(self.raw, num_processes=num_readers, num_in_process=num_threads)
        if self.readers:
            self.read_threads = PriorityThreadPool(max(num_threads, num_readers), name="tierkv-read")
        elif self.decodes_on_gpu:
            self.read_threads = PriorityThreadPool(2 * num_threads, name="tierkv-read")

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether cold blocks are decoded there, unless they were stored by another codec."""
        return self.frames is not None and self.codec.codec_id == CODED_ID

    def copy_warm(self, slot: int) -> Bytes:
        """Return a copy of the block in a warm slot, decompressed. The caller makes sure that it stays there."""
        if self.compression is None:
            return np.array(self.warm.slots[slot])
        block = np.empty(self.layout.block_bytes, dtype=np.uint8)
        self.compression.form.decompress(self.warm.slots[slot], block)
        return block

    def close_readers(self) -> None:
        """End the reader processes; threads read what is still wanted. Bounded. May be called twice."""
        if self.readers:
            self.readers.close()

    def close(self) -> None:
        """Free threads and memory, once everything in flight has ended. May be called twice."""
        self.loaders.shutdown()
        self.read_threads.shutdown()
        self.threads.shutdown()
        self.close_readers()
        if self.compression:
            self.compression.mover.close()
        self.mover.close()
        self.warm.close()
        if self.compression:
            self.compression.staging.close()


def open_warm_memory(hot: HotPool, config: CacheConfig) -> WarmMemory:
    """Take `config.warm_bytes` of memory. Raises CapacityError if that is under four blocks, or not there.

    Raises StoreError where CUDA does not register it, or the GPU cannot compress although that is asked for. Whatever
    it raises, all memory is freed.
    """
    form = _form(hot, config)
    _check_memory(config.warm_bytes)
    if form is not None:
        try:
            return _open_compressed(hot, config, form)
        except StoreError as exc:
            if config.warm_codec != "auto":
                raise
            _logger.warning("%s; the warm tier keeps blocks as they are instead", exc)
    return _open_raw(hot, config)


def _open_raw(hot: HotPool, config: CacheConfig) -> WarmMemory:
    block_bytes = hot.layout.block_bytes
    num_slots = config.warm_bytes // block_bytes
    _check_room(num_slots, config, block_bytes)
    with ExitStack() as undo:
        warm = WarmPool(block_bytes, num_slots, num_threads=config.io_threads)
        undo.callback(warm.close)
        mover = Mover(hot, warm)
        undo.callback(mover.close)
        memory = WarmMemory(warm=warm, mover=mover, compression=None, frames=_frames(hot, mover, config))
        undo.pop_all()
    return memory


def _open_compressed(hot: HotPool, config: CacheConfig, form: WindowFormat) -> WarmMemory:
    block_bytes, threads = hot.layout.block_bytes, config.io_threads
    most = _MAX_CODED_BLOCKS if _wants_frames(hot, config) else _MAX_STAGING_BLOCKS
    num_staging = max(2, min(most, config.warm_bytes // _STAGING_SHARE // block_bytes))
    num_slots = (config.warm_bytes - num_staging * block_bytes) // form.slot_bytes
    _check_room(num_slots, config, form.slot_bytes)
    with ExitStack() as undo:
        staging = WarmPool(block_bytes, num_staging, num_threads=threads)
        undo.callback(staging.close)
        warm = WarmPool(form.slot_bytes, num_slots, num_threads=threads)
        undo.callback(warm.close)
        mover = Mover(hot, staging)
        undo.callback(mover.close)
        windows = WindowMover(hot, warm, form, mover)
        undo.callback(windows.close)
        windows.warm_up()
        compression = Compression(form=form, mover=windows, staging=staging, slots=SlotPool(num_staging))
        memory = WarmMemory(warm=warm, mover=mover, compression=compression, frames=_frames(hot, mover, config))
        undo.pop_all()
    return memory


def no_warm_memory(hot: HotPool) -> WarmMemory:
    """Return the warm memory of a cache with a daemon: one page, which the write thread always holds."""
    warm = WarmPool(1, 1, num_threads=1)
    return WarmMemory(warm=warm, mover=Mover(hot, warm), compression=None, frames=None)


def _form(hot: HotPool, config: CacheConfig) -> WindowFormat | None:
    """Return the format to compress with; None if it is not asked for, or not possible here."""
    if config.warm_codec == "raw":
        return None
    is_possible = hot.layout.dtype == "bfloat16" and (hot.device.type != "cuda" or _has_triton())
    if config.warm_codec == "auto":
        return window_format(hot.layout) if is_possible and hot.device.type == "cuda" else None
    if not is_possible:
        raise ConfigError(
            f"a compressed warm tier needs bfloat16, and triton on a GPU; this is {hot.layout.dtype} on {hot.device}",
            hint='warm_codec="auto" compresses where that is possible',
        )
    return window_format(hot.layout)


def _frames(hot: HotPool, mover: Mover, config: CacheConfig) -> FrameMover | None:
    """Return what decodes cold blocks on the GPU, or None where that is not wanted or not possible."""
    if not _wants_frames(hot, config):
        return None
    try:
        frames = FrameMover(hot.blocks, hot.layout, mover.slots, mover.load_stream)
        frames.warm_up([Move(0, hot.scratch_block)])
    except StoreError as exc:
        _logger.warning("%s; the CPU decodes cold blocks instead", exc)
        return None
    return frames


def _wants_frames(hot: HotPool, config: CacheConfig) -> bool:
    return config.gpu_decode and can_decode(hot.layout, hot.device)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_room(num_slots: int, config: CacheConfig, slot_bytes: int) -> None:
    if num_slots < _MIN_BLOCKS:
        raise CapacityError(
            f"warm_bytes {config.warm_bytes} holds {num_slots} blocks of {slot_bytes} bytes",
            hint=f"at least {_MIN_BLOCKS} are needed: raise warm_bytes, or lower block_size",
        )


def _check_memory(warm_bytes: int) -> None:
    """Raise CapacityError for more memory than the machine has: to touch it would end the process, or another."""
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if warm_bytes > machine_bytes:
        raise CapacityError(
            f"warm_bytes {warm_bytes} is more than the {machine_bytes} bytes of memory of this machine",
            hint="lower warm_bytes",
        )


def pool_regions(memory: TierMemory, *, reserved: Sequence[int]) -> Iterator[MemoryRegion]:
    """Yield the memory that a cache holds, regions before their parts. reserved: the write thread's raw places."""
    hot, warm = memory.hot, memory.warm
    staging = memory.compression.staging if memory.compression else None
    device, dtype = str(hot.device), hot.layout.dtype
    address, size = hot.blocks.data_ptr(), hot.layout.block_bytes
    yield MemoryRegion(
        purpose="hot pool",
        shape=tuple(hot.blocks.shape),
        dtype=dtype,
        num_bytes=hot.blocks.nbytes,
        address=address,
        device=device,
        tier=Tier.HOT,
        slot_bytes=size,
    )
    yield MemoryRegion(
        purpose="scratch block",
        shape=tuple(hot.blocks.shape[1:]),
        dtype=dtype,
        num_bytes=size,
        address=address + hot.scratch_block * size,
        device=device,
        part_of="hot pool",
    )
    yield _slab(warm, "warm pool", Tier.WARM)
    if staging:
        yield _slab(staging, "staging pool", None)
    slab, name = (staging, "staging pool") if staging else (warm, "warm pool")
    yield MemoryRegion(
        purpose="write thread's slots",
        shape=(len(reserved), slab.stride_bytes),
        dtype="uint8",
        num_bytes=len(reserved) * slab.stride_bytes,
        address=slab.address + min(reserved) * slab.stride_bytes,
        device="cpu",
        part_of=name,
    )


def _slab(pool: WarmPool, purpose: str, tier: Tier | None) -> MemoryRegion:
    return MemoryRegion(
        purpose=purpose,
        shape=(pool.num_slots, pool.stride_bytes),
        dtype="uint8",
        num_bytes=pool.slab_bytes,
        address=pool.address,
        device="cpu",
        tier=tier,
        slot_bytes=pool.stride_bytes,
    )
