"""BlockStore: immutable blocks of one namespace in warm memory and on disk, for an engine that owns its KV tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Protocol

from tierkv.background.active_calls import ActiveCalls, while_open
from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.cost_file import CostFile
from tierkv.block_store.daemon_tiers import DaemonBlockTiers
from tierkv.block_store.keys import BlockKey, BlockKeys, digest_key, is_digest_namespace
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.own_tiers import OwnTiers
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.transfers import Load, Save
from tierkv.errors import ConfigError
from tierkv.storage.cold import ColdStore
from tierkv.transfer.codec_choice import codec_of, namespace_of
from tierkv.values.block import HashFunction, Tier, TokenIds, hash_block
from tierkv.values.checks import check_seconds
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.namespace import Namespace
from tierkv.values.remote_stats import RemoteStats
from tierkv.values.stats import CacheStats, StatsRecorder, TierStats

if TYPE_CHECKING:
    import torch

    from tierkv.movers.engine_memory import EngineMemory

__all__ = ["BlockStore"]

_log = logging.getLogger(__name__)
_CALLS_WAIT_S = 10.0


class BlockTiers(Protocol):
    """The tiers below an engine. `BlockStore` documents the methods."""

    @property
    def cold(self) -> ColdStore | None: ...
    def register(self, layers: Sequence[Sequence[torch.Tensor]], *, pages_per_block: int) -> EngineMemory: ...
    def contains(self, keys: Sequence[BlockKey]) -> int: ...
    def origin(self, keys: Sequence[BlockKey]) -> Origin: ...
    def reserve(self, keys: Sequence[BlockKey], start: int) -> Reservation: ...
    def load(self, reservation: Reservation, targets: Placement) -> Load: ...
    def save(self, keys: Sequence[BlockKey], sources: Placement, start: int) -> Save: ...
    @property
    def decodes_on_gpu(self) -> bool: ...
    def calibrate(self, costs: LoadOrCompute) -> Future[None] | None: ...
    def end_calibration(self) -> None: ...
    def touch(self, keys: Sequence[BlockKey]) -> None: ...
    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None) -> int: ...
    def unpin(self, keys: Sequence[BlockKey]) -> int: ...
    def clear(self) -> int: ...
    def sizes(self) -> dict[Tier, TierStats]: ...
    def remote_stats(self) -> tuple[RemoteStats, ...]: ...
    def flush(self) -> None: ...
    def close(self) -> bool:
        """End everything. Return whether something hangs and was left open."""


class BlockStore:
    """Blocks below an engine's own memory. Context manager; thread-safe; `close` may be called twice.

    namespace: identity of the model and the layout of its blocks. With `digest_namespace` the engine names rows by
    digests, with any other it names blocks by their tokens. A lossy codec adds its name: see `store.namespace`.
    cold: an open store to share; otherwise the block store opens and closes `config.cold_path`.

    With `config.socket` the blocks are the daemon's, and shared by its clients. Without the daemon nothing raises:
    every block is a miss, every save is skipped and counted, and a thread looks for the daemon again; `clear` and
    `flush` log that they did nothing. Keys begin with the first block of their sequence there, or are digests that
    differ. Raises DaemonError if the daemon refuses the namespace or speaks another version.

    A parent need not be loaded to save or load its child. Damage, a full or hanging disk, and other processes are
    misses that `stats` counts, never exceptions; bytes that were not verified never reach the engine. Once the store
    closes, every method raises ClosedError, and so it does in a forked process.

    >>> with BlockStore(BlockStoreConfig(warm_bytes=1 << 20), namespace=namespace) as store:
    ...     keys = store.keys([1, 2, 3, 4, 5, 6, 7, 8, 9])
    ...     saved = store.save(keys, Buffers([bytes(store.layout.block_bytes) for _ in keys]))
    ...     out = [bytearray(store.layout.block_bytes) for _ in keys]
    ...     load = store.load(store.reserve(keys), Buffers(out))
    ...     saved.num_saved, store.contains(keys), load.num_loaded
    (2, 2, 2)
    """

    def __init__(
        self,
        config: BlockStoreConfig,
        *,
        namespace: Namespace,
        cold: ColdStore | None = None,
        clock: Callable[[], float] = time.monotonic,
        hash_function: HashFunction = hash_block,
    ) -> None:
        self.config = config
        self.layout: BlockLayout = namespace.layout
        self.calls: ActiveCalls = ActiveCalls("the block store")
        self._hash = hash_function
        self._is_digest = is_digest_namespace(namespace)
        self._changed = OwnedCondition()
        self._stats = StatsRecorder(self._changed)
        self._tiers: BlockTiers
        if config.socket is not None:
            if cold is not None:
                raise ConfigError("a block store uses a store of this process, or the daemon's, not both")
            self.namespace: Namespace = namespace
            self._tiers = DaemonBlockTiers(
                config, config.socket, namespace, stats=self._stats, changed=self._changed, clock=clock
            )
        else:
            codec = codec_of(config.codec, namespace)
            self.namespace = namespace_of(namespace, codec)
            self._tiers = OwnTiers(
                config, self.namespace, codec, cold=cold, stats=self._stats, changed=self._changed, clock=clock
            )
        self._root = self.namespace.digest
        self._costs: CostFile | None = None
        self._measuring: Future[None] | None = None

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def block_size(self) -> int:
        """Tokens of a block. Rows that are named by digests have no tokens: it says nothing about them."""
        return self.layout.block_size

    @property
    def cold(self) -> ColdStore | None:
        """The store on disk that this process has open, if there is one."""
        return self._tiers.cold

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether the GPU of a registered engine decodes cold blocks, as far as they were coded for that."""
        return self._tiers.decodes_on_gpu

    def keys(self, token_ids: TokenIds = ()) -> BlockKeys:
        """Return the keys of a token sequence's whole blocks. The engine keeps them, and extends them.

        Raises ConfigError in a namespace of digests.
        """
        if self._is_digest:
            raise ConfigError("this namespace names its rows by digests: use key_of_digest")
        keys = BlockKeys(self._root, self.block_size, hash_function=self._hash)
        keys.extend(token_ids)
        return keys

    def key_of_digest(self, digest: bytes, group: int = 0) -> BlockKey:
        """Return the key of a row that the engine names by a digest; see `digest_key`.

        Raises ConfigError in a namespace of tokens.
        """
        if not self._is_digest:
            raise ConfigError("this namespace names its blocks by tokens", hint="make it with digest_namespace")
        return digest_key(self._root, digest, group)

    def register(self, layers: Sequence[Sequence[torch.Tensor]], *, pages_per_block: int = 1) -> EngineMemory:
        """Return the engine's tensors as memory that blocks are copied to and from; see `EngineMemory`.

        The store closes it. Raises ShapeError for tensors that do not fit the layout, StoreError where CUDA refuses.
        """
        self._require_memory()
        return self._tiers.register(layers, pages_per_block=pages_per_block)

    @while_open
    def contains(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks are there, in the warm memory or on disk. Reads none of them."""
        return self._tiers.contains(keys)

    @while_open
    def origin(self, keys: Sequence[BlockKey]) -> Origin:
        """Return where blocks that are there would come from, for `LoadOrCompute`. Reads none of them."""
        return self._tiers.origin(keys)

    @while_open
    def reserve(self, keys: Sequence[BlockKey], start: int = 0) -> Reservation:
        """Hold the blocks of `keys` from `start` on, up to the first that is not there; begin to read the cold ones.

        The blocks before `start` need not be there: the engine has them. Returns at once; see `Reservation`.
        """
        self._require_memory()
        if start < 0:
            raise ConfigError(f"start must not be negative, got {start}")
        return self._tiers.reserve(keys, start)

    @while_open
    def load(self, reservation: Reservation, targets: Placement) -> Load:
        """Copy reserved blocks into the engine's memory. Returns at once unless the targets are `Buffers`.

        targets: places for the leading blocks of the reservation, which this call takes over; blocks without a place
        are released. What the engine has queued on the current stream is done before a place is overwritten. Blocks
        that cannot be had are `failed_keys`. Raises ShapeError for places that do not fit.
        """
        self._require_memory()
        return self._tiers.load(reservation, targets)

    @while_open
    def save(self, keys: Sequence[BlockKey], sources: Placement, *, start: int = 0) -> Save:
        """Take over the blocks of `keys` from `start` on, and write them to the disk in the background.

        sources: a place for each of them; what the engine has queued on the current stream is done before it is read.
        The blocks before `start` are not touched. Known blocks are not copied. A block for which there is no room
        is skipped with those after it, and counted. Raises ShapeError for places that do not fit.
        """
        self._require_memory()
        return self._tiers.save(keys, sources, start)

    @while_open
    def keep_costs(self, costs: LoadOrCompute, *, process: str = "") -> None:
        """Restore what earlier processes measured with this namespace; keep beside the store what is measured from now.

        process: names the file's writer, in letters and digits, where two processes of an engine have one namespace.

        A store with `warm_bytes` measures in the background what no process has measured yet, until the first request:
        up to 16 blocks are read a few times, from disk and out of the page cache, so that a request need not find out.
        Does nothing without a `cold_path`: a daemon keeps no costs. May be called once.
        """
        if self.config.cold_path is None or self.config.socket is not None:
            return
        if self._costs is not None:
            raise ConfigError("this block store keeps costs already")
        if process and not (process.isascii() and process.isalnum()):
            raise ConfigError(f"process must be of letters and digits, got {process!r}")
        name = f"{self._root.hex()}-{process}" if process else self._root.hex()
        self._costs = CostFile(self.config.cold_path, name, costs, is_kept=not self.config.read_only)
        self._measuring = self._tiers.calibrate(costs)

    @while_open
    def wait_for_costs(self, timeout_s: float = 5.0) -> bool:
        """Wait until what `keep_costs` began to measure is known, at most `timeout_s` seconds. Return whether it is.

        If not, measuring ends. For an engine that takes long to start in any case; nothing to measure is known at once.
        """
        measuring = self._measuring
        if measuring is None or not wait([measuring], check_seconds("timeout_s", timeout_s)).not_done:
            return True
        self._tiers.end_calibration()
        return False

    @while_open
    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Record a use of blocks, so that they are evicted later."""
        self._tiers.touch(keys)

    @while_open
    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None = None) -> int:
        """Keep blocks in the warm memory for `ttl_s` seconds; without a time also on disk, and for good.

        Return how many of them were there. Over a daemon a pin with a time is a lease: it ends with this process,
        counts to the half of the memory that a client may lease, and another pin of the block replaces it. The daemon
        refuses a pin for good beyond its share: then 0 are pinned.
        """
        return self._tiers.pin(keys, None if ttl_s is None else check_seconds("ttl_s", ttl_s))

    @while_open
    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """Let blocks be evicted again. Return how many of them were there."""
        return self._tiers.unpin(keys)

    @while_open
    def clear(self) -> int:
        """Evict all blocks of this namespace, but pinned ones on disk. Return how many went, the copies counted once.

        Raises StoreError where the disk does not answer.
        """
        return self._tiers.clear()

    @while_open
    def stats(self) -> CacheStats:
        """Return the counters so far. A request is a reservation; the hot tier is the engine's, and not counted."""
        tiers = self._tiers.sizes()
        with self._changed:
            remotes = self._tiers.remote_stats()
            return self._stats.snapshot(tiers, avg_shared_blocks=0.0, fragmentation_ratio=0.0, remotes=remotes)

    @while_open
    def flush(self) -> None:
        """Wait until every saved block lies on the disk, synced. Raises StoreError where that cannot be."""
        self._tiers.flush()

    def close(self) -> None:
        """Write what was saved, end all copies, free the memory. What cannot be written is logged."""
        if not self.calls.close():
            return
        self.calls.wait(_CALLS_WAIT_S)
        hangs = self._tiers.close()
        if self._costs:
            self._costs.close()
        if hangs:
            _log.warning("the disk hangs: the memory and the store of the block store stay open")

    def _require_memory(self) -> None:
        if not self.config.warm_bytes:
            raise ConfigError("this block store only looks up", hint="open it with warm_bytes")
