"""OwnTiers: the warm memory and the store on disk of a block store that needs no daemon."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from tierkv.block_store.calibration import Calibration
from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.loading import BlockLoader
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.saving import BlockSaver
from tierkv.block_store.stored_blocks import StoredBlocks
from tierkv.block_store.transfers import Load, Save
from tierkv.block_store.warm_memory import WarmMemory
from tierkv.errors import StoreError
from tierkv.readers.choice import choose_num_readers
from tierkv.remote_tiers.remotes import Remotes
from tierkv.remote_tiers.urls import remote_urls
from tierkv.storage.codecs import Codec
from tierkv.storage.coded import CODED_ID
from tierkv.storage.cold import ColdStore
from tierkv.values.block import Tier
from tierkv.values.locks import OwnedCondition
from tierkv.values.namespace import Namespace
from tierkv.values.remote_stats import RemoteStats
from tierkv.values.stats import StatsRecorder, TierStats

if TYPE_CHECKING:
    import torch

    from tierkv.movers.engine_memory import EngineMemory

__all__ = ["OwnTiers"]

_log = logging.getLogger(__name__)

_STALL_S = 30.0  # at the end, how long one read or write may take


class OwnTiers:
    """Satisfies `BlockTiers`. cold: an open store to share, or None to open and close that of `config`.

    memory: None for a store that only looks up.
    """

    def __init__(
        self,
        config: BlockStoreConfig,
        namespace: Namespace,
        codec: Codec,
        *,
        cold: ColdStore | None,
        stats: StatsRecorder,
        changed: OwnedCondition,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._root = namespace.digest
        self._changed = changed
        self._stats = stats
        self._clock = clock
        self._may_measure = False
        self._is_coded = codec.codec_id == CODED_ID
        self._owns_cold = cold is None
        self.cold: ColdStore | None = cold or _open_cold(config)
        try:
            if self.cold:
                self.cold.open_namespace(namespace)
            self.remotes: Remotes | None = None
            if urls := remote_urls(config.remote):
                self.remotes = Remotes(urls, store=self.cold)
            self._remote = self.remotes.source(namespace.describe()) if self.remotes else None
            self.stored = StoredBlocks(self.cold, self._remote)
            self.memory: WarmMemory | None = None
            if config.warm_bytes:
                num_readers = choose_num_readers(
                    config.num_reader_processes, block_bytes=namespace.layout.block_bytes, ranks=namespace.tp_size
                )
                self.memory = WarmMemory(
                    config, namespace.layout, clock, changed, num_readers=num_readers if self.cold else 0
                )
        except BaseException:
            self._close_stored()
            raise
        if self.memory and self.memory.readers and self.cold:
            self.memory.readers.start_for(self.cold)
        if self.memory:
            self._loader = BlockLoader(self.memory, self.stored, self._root, stats, changed)
            self._saver = BlockSaver(self.memory, self.stored, self._root, codec, stats, changed)

    def register(self, layers: Sequence[Sequence[torch.Tensor]], *, pages_per_block: int) -> EngineMemory:
        """Return an engine's tensors as memory to copy to and from."""
        assert self.memory is not None
        engine = self.memory.engines.register(layers, pages_per_block=pages_per_block)
        if self._is_coded:
            self.memory.open_frames(engine)
        return engine

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether a registered engine's GPU decodes."""
        return self.memory is not None and self.memory.num_decoded_at_once > 0

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks are warm, cold or remote."""
        if self.memory is None:
            return self.stored.count(keys)
        return self._loader.contains(keys)

    def origin(self, keys: Sequence[BlockKey]) -> Origin:
        """Return where the slowest of some blocks lies."""
        missing = keys
        if self.memory:
            with self._changed:
                missing = [key for key in keys if not self.memory.index.get(key)]
        return self.stored.origin(missing)

    def reserve(self, keys: Sequence[BlockKey], start: int) -> Reservation:
        """Hold blocks."""
        return self._loader.reserve(keys, start)

    def load(self, reservation: Reservation, targets: Placement) -> Load:
        """Copy reserved blocks to the engine."""
        return self._loader.load(reservation, targets)

    def save(self, keys: Sequence[BlockKey], sources: Placement, start: int) -> Save:
        """Take blocks over."""
        return self._saver.save(keys, sources, start)

    def calibrate(self, costs: LoadOrCompute) -> Future[None] | None:
        """Begin to measure how fast cold blocks come, before any request is there."""
        if not self.memory or not self.cold:
            return None
        self._may_measure = True
        return self._loader.submit(self._calibrate, costs, self.memory, self.cold, self._stats.requests)

    def end_calibration(self) -> None:
        """Begin no further reading to measure it. Nothing is done on a GPU for that any more when this returns."""
        self._may_measure = False
        if self.memory:
            with self._loader.measuring:
                pass

    def _calibrate(self, costs: LoadOrCompute, memory: WarmMemory, cold: ColdStore, num_before: int) -> None:
        """Measure until the first request comes. num_before: how many requests there were when that was wanted."""

        def may_go_on() -> bool:
            return self._may_measure and not self._loader.is_closing and self._stats.requests == num_before

        def get_ready() -> None:
            if memory.readers:
                memory.readers.wait_until_ready(lambda: not may_go_on())

        calibration = Calibration(
            cold,
            self._root,
            partial(self._loader.time_reading, may_go_on=may_go_on),
            most=len(memory.spare),
            num_threads=memory.read_threads.num_threads,
            get_ready=get_ready,
            may_go_on=may_go_on,
        )
        try:
            calibration.run(costs)
        except StoreError as exc:
            _log.info("how fast blocks come is measured by requests: %s", exc)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Record a use of blocks."""
        if self.memory:
            with self._changed:
                self.memory.index.touch(keys)
        self.stored.touch(keys)

    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None) -> int:
        """Keep blocks in the warm memory for a time; without one on disk too."""
        until = math.inf if ttl_s is None else self._clock() + ttl_s
        return self._set_pinned(keys, until, on_disk=True if ttl_s is None else None)

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """Let blocks be evicted again."""
        return self._set_pinned(keys, -math.inf, on_disk=False)

    def clear(self) -> int:
        """Evict all blocks of the namespace. Raises StoreError where the disk does not answer."""
        num_warm = 0
        if self.memory:
            self._saver.flush()
            with self._changed:
                num_warm = self.memory.clear()
        if self.cold is None or self.cold.read_only:
            return num_warm
        return max(num_warm, self.cold.evict(namespace=self._root).blocks)

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the tiers."""
        tiers: dict[Tier, TierStats] = {}
        if self.cold:
            cold = self.cold.stats()
            tiers[Tier.COLD] = TierStats(
                blocks=cold.blocks, stored_bytes=cold.live_bytes, capacity_bytes=cold.quota_bytes
            )
        if self.memory:
            with self._changed:
                tiers[Tier.WARM] = self.memory.tier_stats()
        return tiers

    def remote_stats(self) -> tuple[RemoteStats, ...]:
        """Return the counters of the remote tiers."""
        return self.remotes.stats() if self.remotes else ()

    def flush(self) -> None:
        """Wait until every saved block lies on the disk. Raises StoreError where that cannot be."""
        if self.memory:
            self._saver.flush()
        if self.cold and not self.cold.read_only:
            self.cold.flush()

    def close(self) -> bool:
        """Write what was saved, end all copies, free the memory. Return whether a hanging disk kept them open."""
        is_idle = True
        if self.memory:
            is_idle = self._loader.close(stall_s=_STALL_S)
            self.memory.close_readers()
            is_idle = self._saver.close(stall_s=self._config.write_wait_s + _STALL_S) and is_idle
            if is_idle:
                self.memory.close()
        return not self._close_stored(is_idle=is_idle)

    def _set_pinned(self, keys: Sequence[BlockKey], until: float, *, on_disk: bool | None) -> int:
        num_found = self.contains(keys)
        found = list(keys[:num_found])
        if self.memory:
            with self._changed:
                self.memory.set_pinned(found, until)
        if on_disk is not None and self.cold and not self.cold.read_only:
            if self.memory:
                self._saver.flush()
            self.cold.set_pinned([key.block_hash for key in found], on_disk)
        return num_found

    def _close_stored(self, *, is_idle: bool = True) -> bool:
        """Close the remote tiers, and the store unless a thread may still use it. Return whether none does."""
        remotes: Remotes | None = getattr(self, "remotes", None)  # opening may have failed before
        if remotes:
            is_idle = remotes.close() and is_idle
        if self.cold and self._owns_cold and is_idle:
            self.cold.close()
        return is_idle


def _open_cold(config: BlockStoreConfig) -> ColdStore | None:
    if config.cold_path is None:
        return None
    return ColdStore(
        config.cold_path,
        quota_bytes=config.cold_bytes,
        min_free_bytes=config.min_free_bytes,
        write_wait_s=config.write_wait_s,
        read_only=config.read_only,
    )
