"""Factory: opens the tiers of one cache from its config and the model's namespace."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from tierkv.background.work_queue import PriorityThreadPool
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.index.index import Index
from tierkv.policies import EvictionPolicy, make_policy
from tierkv.ranks.group import RankGroup
from tierkv.ranks.hosts import is_first_with, place_of
from tierkv.readers.choice import choose_num_readers
from tierkv.remote_tiers.remotes import Remotes
from tierkv.remote_tiers.urls import remote_urls
from tierkv.storage.codecs import Codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.hot import HotPool, hot_pool_blocks
from tierkv.transfer.codec_choice import codec_of, namespace_of
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.memory import TierMemory, WarmMemory, no_warm_memory, open_warm_memory
from tierkv.transfer.observers import Observers
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import HashFunction
from tierkv.values.locks import OwnedCondition
from tierkv.values.namespace import Namespace
from tierkv.values.stats import StatsRecorder
from tierkv.values.users import user_id

__all__ = ["choose_codec", "close_tiers", "device_of", "open_tiers", "policy_of", "require_observer"]

_NUM_LOADERS = 4
_POLICY_METHODS = ("score_block", "update_on_access", "select_evictions")
_OBSERVER_METHODS = ("on_memory", "on_block", "on_request", "on_use", "on_span")


def choose_codec(config: CacheConfig, namespace: Namespace, ranks: RankGroup) -> tuple[Codec, Namespace]:
    """Return the codec of new blocks, and the namespace that names it where it is lossy.

    Raises ConfigError for a codec that does not fit the dtype or the namespace, for a layout of another block size, and
    for a namespace that is another rank's slice.
    """
    _check_slice(namespace, ranks)
    codec = codec_of(config.codec, namespace)
    if namespace.layout.block_size != config.block_size:
        raise ConfigError(f"block_size is {config.block_size}, but the layout's is {namespace.layout.block_size}")
    return codec, namespace_of(namespace, codec)


def _open_store(config: CacheConfig, shared: ColdStore | None) -> ColdStore | None:
    """Return the store to use: the shared one, that of `config.cold_path`, or none. Raises ConfigError, StoreError."""
    if config.socket is not None:
        if shared is not None:
            raise ConfigError("a cache with a socket uses the daemon's store, not one of its own")
        return None
    if shared is not None or config.cold_path is None:
        return shared
    return ColdStore(
        config.cold_path,
        quota_bytes=config.cold_bytes,
        min_free_bytes=config.min_free_bytes,
        write_wait_s=config.write_wait_s,
        read_only=config.read_only,
    )


def open_tiers(
    config: CacheConfig,
    *,
    namespace: Namespace,
    codec: Codec,
    device: torch.device,
    cold: ColdStore | None,
    policy: EvictionPolicy,
    ranks: RankGroup,
    clock: Callable[[], float],
    hash_function: HashFunction,
) -> tuple[Tiers, Offloader, DaemonTiers | None]:
    """Open a cache's tiers: the store, the memory of the hot and the warm tier, threads, the daemon if there is one.

    cold: an open store to share. Ranks with a replicated namespace call this together. Whatever this raises, all that
    it opened is closed again.
    """
    with ExitStack() as undo:
        store = _open_store(config, cold)
        if store:
            if cold is None:
                undo.callback(store.close)
            store.open_namespace(namespace)
        tiers = _make_tiers(
            config,
            namespace=namespace,
            codec=codec,
            device=device,
            cold=store,
            policy=policy,
            clock=clock,
            hash_function=hash_function,
        )
        undo.callback(tiers.memory.close)
        if config.socket is None and (urls := remote_urls(config.remote)):
            tiers.remotes = Remotes(urls, store=store)
            undo.callback(tiers.remotes.close)
            tiers.remote = tiers.remotes.source(namespace.describe())
        if namespace.is_replicated and ranks.size > 1:
            tiers.stores = _is_first_with_tiers(config, namespace, store, ranks)
        offloader = Offloader(tiers)
        undo.callback(offloader.close)
        daemon = _open_daemon(tiers, config, namespace=namespace, ranks=ranks)
        if daemon:
            daemon.after_writes = offloader.after_writes
        undo.pop_all()
    return tiers, offloader, daemon


def close_tiers(tiers: Tiers, daemon: DaemonTiers | None, *, is_quiet: bool, is_idle: bool, owns_cold: bool) -> None:
    """Close what `open_tiers` opened.

    is_quiet: no thread of the cache uses the memory any more. is_idle: nor does an engine compute with the hot pool;
    otherwise that stays until Python collects it. owns_cold: no other cache uses the store.
    """
    tiers.end_copies()
    tiers.memory.close_readers()
    if daemon:
        daemon.close()
    if is_quiet:
        tiers.memory.close()
        if is_idle:
            tiers.memory.hot.close()
    tiers.states.close()
    is_unused = tiers.remotes is None or tiers.remotes.close()  # by a thread that keeps what came from a remote tier
    if tiers.cold and owns_cold and is_unused:
        tiers.cold.close()


def _make_tiers(
    config: CacheConfig,
    *,
    namespace: Namespace,
    codec: Codec,
    device: torch.device,
    cold: ColdStore | None,
    policy: EvictionPolicy,
    clock: Callable[[], float],
    hash_function: HashFunction,
) -> Tiers:
    """Take the memory of the hot and the warm tier, start the threads that read, and use an open store."""
    layout = namespace.layout
    num_hot = hot_pool_blocks(layout, device, hot_bytes=config.hot_bytes, hot_fraction=config.hot_fraction)
    hot = HotPool(layout, num_hot, device)
    warm = open_warm_memory(hot, config) if config.socket is None else no_warm_memory(hot)
    changed = OwnedCondition()
    index = Index(
        root=namespace.digest,
        num_hot=num_hot,
        num_warm=warm.warm.num_slots,
        policy=policy,
        clock=clock,
        lock=changed,
    )
    memory = TierMemory(
        layout=layout,
        codec=codec,
        hot=hot,
        warm=warm.warm,
        mover=warm.mover,
        compression=warm.compression,
        frames=warm.frames,
        threads=PriorityThreadPool(config.io_threads, name="tierkv-io"),
        num_readers=_num_readers(config, namespace, warm) if cold else 0,
        loaders=ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="tierkv-load"),
    )
    if memory.readers and cold:
        memory.readers.start_for(cold)
    return Tiers(
        layout=layout,
        namespace=namespace.digest,
        changed=changed,
        index=index,
        stats=StatsRecorder(changed),
        observers=Observers(layout, changed),
        hash_function=hash_function,
        min_partial_tokens=config.min_partial_tokens,
        memory=memory,
        cold=cold,
        write_wait_s=config.write_wait_s,
    )


def _num_readers(config: CacheConfig, namespace: Namespace, warm: WarmMemory) -> int:
    """Return how many reader processes a cache with a store has: none by itself where a GPU decodes."""
    if warm.frames and config.num_reader_processes is None:
        return 0
    return choose_num_readers(
        config.num_reader_processes, block_bytes=namespace.layout.block_bytes, ranks=namespace.tp_size
    )


def _open_daemon(tiers: Tiers, config: CacheConfig, *, namespace: Namespace, ranks: RankGroup) -> DaemonTiers | None:
    """Use the daemon's lower tiers if the config names its socket. Raises DaemonError if it refuses."""
    if config.socket is None:
        return None
    daemon = DaemonTiers(
        tiers,
        path=config.socket,
        daemon_user=None if config.daemon_user is None else user_id(config.daemon_user),
        namespace=namespace,
        block_size=config.block_size,
        hash_function=tiers.hash_function,
        # Ranks of two copies of a model would wait for each other: no rank waits.
        wait_s=config.compute_wait_s if ranks.size == 1 else 0.0,
        timeout_s=config.daemon_timeout_s,
        min_partial_tokens=config.min_partial_tokens,
    )
    tiers.lower = daemon.blocks
    return daemon


def device_of(device: torch.device | str) -> torch.device:
    """Return the device of that name. Raises ConfigError."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise ConfigError(f"there is no device {device!r}: {str(exc).splitlines()[0]}") from exc


def policy_of(policy: str | EvictionPolicy) -> EvictionPolicy:
    """Return a policy: an object that is one, or that of a name. Raises ConfigError."""
    if isinstance(policy, str):
        return make_policy(policy)
    _require_methods("an eviction policy", policy, _POLICY_METHODS)
    return policy


def require_observer(observer: object) -> None:
    """Raise ConfigError unless an object has the methods of `CacheObserver`."""
    _require_methods("an observer", observer, _OBSERVER_METHODS)


def _require_methods(what: str, given: object, names: tuple[str, ...]) -> None:
    """Raise ConfigError unless an object has methods of these names; a class is none."""
    missing = [name for name in names if not callable(getattr(given, name, None))]
    if missing or isinstance(given, type):
        raise ConfigError(f"{what} has the methods {', '.join(names)}; {given!r} lacks {', '.join(missing) or 'self'}")


def _check_slice(namespace: Namespace, ranks: RankGroup) -> None:
    """Raise ConfigError unless the namespace is that of this rank's slice: blocks of another are never of use.

    The namespace of blocks that every rank computes as a whole is the same on all of them.
    """
    if namespace.is_replicated and namespace.tp_size == 1:
        return
    if (namespace.tp_rank, namespace.tp_size) != (ranks.rank, ranks.size):
        raise ConfigError(
            f"the namespace is slice {namespace.tp_rank} of {namespace.tp_size}, "
            f"but this is rank {ranks.rank} of {ranks.size}"
        )


def _is_first_with_tiers(config: CacheConfig, namespace: Namespace, store: ColdStore | None, ranks: RankGroup) -> bool:
    """Return whether this rank writes the blocks that all ranks compute: the first one with its lower tiers does.

    Raises ConfigError if the ranks' namespaces differ: then they do not hold the same.
    """
    if config.socket is not None:
        place = place_of(config.socket)
    elif store is not None:
        place = place_of(store.path)
    else:  # nothing is on this machine: the first rank of all writes to remote tiers, if there are any
        place = "remote"
    if len(set(ranks.gather(namespace.digest))) > 1:
        raise ConfigError("the ranks' namespaces differ, although each says that it holds what all others hold")
    return is_first_with(ranks, place)
