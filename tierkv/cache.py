"""TierCache: the facade over the three tiers. Engines talk to this and to nothing below it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from tierkv.background.active_calls import ActiveCalls, while_open
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.policies import EvictionPolicy
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.requests.acquire import Acquirer
from tierkv.requests.batching import Batching
from tierkv.requests.block_control import BlockControl
from tierkv.requests.commit import Committer
from tierkv.requests.consensus import Consensus
from tierkv.requests.defragment import Defragmenter, LayoutReport
from tierkv.requests.evict import EvictedEverywhere, Evictor
from tierkv.requests.prefetch import Prefetcher, PrefetchHandle
from tierkv.requests.prefixes import Match, Prefixes
from tierkv.requests.sequence import BlockUsers, RunningSequences, Sequence
from tierkv.requests.statistics import RequestStatistics, occupancy
from tierkv.storage.cold import ColdStore
from tierkv.storage.hot import HotPool
from tierkv.storage.state_file import SavedState
from tierkv.transfer.cache_state import load_state, open_state, save_state
from tierkv.transfer.cold_reading import ColdReading
from tierkv.transfer.factory import choose_codec, close_tiers, device_of, open_tiers, policy_of, require_observer
from tierkv.transfer.load import Loader
from tierkv.transfer.memory import pool_regions
from tierkv.transfer.recompute_or_load import RecomputeOrLoad
from tierkv.values.block import HashFunction, Tier, TokenIds, as_token_array, as_token_bytes, hash_block
from tierkv.values.checks import check_seconds
from tierkv.values.events import CacheObserver
from tierkv.values.files import check_path
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace
from tierkv.values.stats import CacheStats

__all__ = ["Match", "TierCache", "load_cache_state", "save_cache_state"]

_CALLS_WAIT_S = 10.0  # at the end, for calls that wait for the write thread


class TierCache:
    """Keys and values of one model in three tiers. Context manager; `close` may be called twice.

    namespace: identity of the model and the layout of its blocks; other namespaces of the store are never read. A
    lossy codec adds its name: see `cache.namespace`. device: where the hot pool lies and the model runs. cold: an open
    store to share with another cache of this process; otherwise the cache opens and closes `config.cold_path`.
    ranks: the other ranks of a model that is split over several devices; each rank has a cache of its own, and all may
    have the same cold_path.

    Life of a request: `acquire` (or `match` to look first), compute the tokens that were not cached, `commit`
    them, `append` and `commit` while decoding, `release`. `blocks` acts on blocks of the hot pool by their ids;
    `batching` is for an engine that runs many sequences in one loop.
    Calls are thread-safe; a sequence belongs to one thread. Damage, full disks and failed copies are misses that
    `stats` counts, never exceptions. Once the cache closes, every method raises ClosedError; so it does in a process
    that was forked from this one, where `release` and `close` do nothing.

    >>> with TierCache(config, namespace=namespace) as cache:
    ...     with cache.acquire([1, 2, 3, 4, 5, 6, 7, 8, 9]) as sequence:
    ...         # here: compute K and V of the tokens behind sequence.num_cached_tokens
    ...         new_blocks = cache.commit(sequence, sequence.num_tokens)
    ...     new_blocks, cache.match([1, 2, 3, 4, 5, 6, 7, 8, 10]).num_cached_tokens
    (2, 8)
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        namespace: Namespace,
        device: torch.device | str = "cpu",
        cold: ColdStore | None = None,
        policy: EvictionPolicy | None = None,
        ranks: RankGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
        hash_function: HashFunction = hash_block,
    ) -> None:
        self.ranks: RankGroup = ranks or OneRank()
        self.config = config
        self.namespace: Namespace
        codec, self.namespace = choose_codec(config, namespace, self.ranks)
        self.layout: BlockLayout = self.namespace.layout
        self.device: torch.device = device_of(device)
        self._owns_cold = cold is None
        self.calls: ActiveCalls = ActiveCalls("the cache")
        self._must_end = threading.Event()
        self._tiers, self._offloader, self._daemon = open_tiers(
            config,
            namespace=self.namespace,
            codec=codec,
            device=self.device,
            cold=cold,
            policy=policy_of(config.eviction_policy if policy is None else policy),
            ranks=self.ranks,
            clock=clock,
            hash_function=hash_function,
        )
        self._make_parts()

    def _make_parts(self) -> None:
        """Make the parts of the cache, each from the tiers and the other parts that it uses."""
        config, tiers, offloader, daemon = self.config, self._tiers, self._offloader, self._daemon
        consensus = Consensus(self.ranks, tiers, offloader) if self.ranks.size > 1 else None
        self.blocks: BlockControl = BlockControl(tiers, offloader, calls=self.calls)
        self._prefixes = Prefixes(tiers, daemon)
        self._users = BlockUsers()
        self._committer = Committer(tiers, offloader, users=self._users, write_through=config.write_through)
        self._running = RunningSequences(tiers, offloader, consensus, self._users)
        self.batching: Batching = Batching(tiers, self._running, daemon, calls=self.calls, consensus=consensus)
        reading = ColdReading(tiers)
        loader = Loader(tiers, offloader, reading)
        self._evictor = Evictor(tiers, offloader, daemon)
        self._prefetcher = Prefetcher(tiers, reading, daemon)
        self._acquirer = Acquirer(
            tiers,
            calls=self.calls,
            loader=loader,
            reading=reading,
            offloader=offloader,
            consensus=consensus,
            running=self._running,
            committer=self._committer,
            statistics=RequestStatistics(tiers),
            daemon=daemon,
            choice=RecomputeOrLoad(block_size=config.block_size, piece_tokens=config.piece_tokens)
            if daemon is None
            else None,
        )

    def __enter__(self) -> TierCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def hot(self) -> HotPool:
        """The paged memory that attention reads."""
        return self._tiers.memory.hot

    @property
    def layer_groups(self) -> list[int]:
        """Ends of the groups of layers that are promoted together, lowest first; the last is the layer count."""
        return self._tiers.memory.mover.layer_groups

    @property
    def cold(self) -> ColdStore | None:
        """The store on disk, if there is one."""
        return self._tiers.cold

    @while_open
    def match(self, token_ids: TokenIds) -> Match:
        """Return how many leading tokens are cached, and where. Changes and reads nothing."""
        return self._prefixes.match(as_token_array(token_ids).tobytes())

    @while_open
    def acquire(self, token_ids: TokenIds, *, reuse: bool = True, overlap: bool = False, wait: bool = True) -> Sequence:
        """Return a sequence with room for every token; its cached prefix is being loaded into the hot pool.

        At least one token is always left to compute. `reuse=False` takes room only and finds nothing. overlap: let
        many cold blocks load in the background while the caller computes the first of them, see `sequence.overlap`.
        wait: wait for blocks that another process computes, for `compute_wait_s` at most.
        Raises ConfigError for an empty prompt, CapacityError where the hot pool has no room beside what is in use.
        """
        token_bytes = as_token_array(token_ids).tobytes()
        return self._acquirer.acquire(token_bytes, reuse=reuse, overlap=overlap, wait=wait)

    @while_open
    def append(self, sequence: Sequence, token_ids: TokenIds) -> None:
        """Add tokens to a sequence and take the blocks that they need. Raises CapacityError, nothing added."""
        self._running.require(sequence)
        self._running.append(sequence, as_token_bytes(token_ids))

    @while_open
    def commit(self, sequence: Sequence, num_computed_tokens: int, *, partial_block: bool = False) -> int:
        """Register the blocks whose K and V are now computed, so that others find them. Return how many were new.

        num_computed_tokens: leading tokens of the sequence, cached ones included, whose K and V have been
        written (or queued to be, on the current stream). partial_block: also store the partly filled last block.
        A block whose hash another block has taken stays private, and so do those that follow it.
        """
        self._running.require(sequence)
        return self._committer.commit(sequence, num_computed_tokens, partial_block=partial_block)

    @while_open
    def fork(self, sequence: Sequence) -> Sequence:
        """Return a second sequence with the same tokens, for parallel sampling; the partly filled last block is copied.

        Raises CapacityError where there is no room for that copy, StoreError where it fails.
        """
        self._running.require(sequence)
        if sequence.overlapped_load:
            raise ConfigError("the sequence's cold blocks still load: compute what overlap.next_piece gives first")
        return self._running.fork(sequence)

    def release(self, sequence: Sequence) -> None:
        """End a sequence: registered blocks stay cached, others are free. May be called twice, and after `close`.

        Raises ConfigError for a sequence of another cache.
        """
        self._acquirer.release(sequence)

    @while_open
    def pin(self, token_ids: TokenIds, *, ttl_s: float | None = None) -> int:
        """Keep a cached prompt's blocks in every tier that has them, on disk also after a restart.

        ttl_s: how long; None for good. Another pin of the blocks replaces it.
        Return how many blocks that are; `unpin` takes it back. A block that only a state file has is in no tier and
        is not counted. Raises DaemonError where this tenant's share of a daemon's tiers is used up, StoreBusyError
        where other processes write to the store for too long.
        """
        ttl_s = None if ttl_s is None else check_seconds("ttl_s", ttl_s)
        return self._prefixes.set_pinned(as_token_array(token_ids).tobytes(), True, ttl_s=ttl_s)

    @while_open
    def unpin(self, token_ids: TokenIds) -> int:
        """Let a prompt's blocks be evicted again. Return how many blocks that are."""
        return self._prefixes.set_pinned(as_token_array(token_ids).tobytes(), False)

    @while_open
    def prefetch(self, token_ids: TokenIds) -> PrefetchHandle:
        """Announce a prompt: its cold blocks are read into the warm tier before the request comes. Returns at once.

        Blocks that requests wait for are read first, and at most half of the warm tier is filled. Blocks that cannot be
        read count in `CacheStats.prefetch_misses`. Await the handle, or its `result()`, for the number of blocks.
        """
        return self._prefetcher.submit(as_token_array(token_ids).tobytes())

    @while_open
    def evict_everywhere(
        self, token_ids: TokenIds | None = None, *, older_than_s: float | None = None
    ) -> EvictedEverywhere:
        """Evict a prompt's blocks, or all of this namespace, from every tier; a daemon's other clients drop theirs too.

        token_ids: prompts that begin with this one go, and those of its own blocks that no other prompt continues.
        older_than_s: only blocks that were not used for so long. Blocks of running sequences serve no further request
        and go when these end. Where a lower tier does not answer, StoreError or DaemonError follows the rest.
        """
        return self._evictor.evict_everywhere(token_ids, older_than_s)

    @while_open
    def evict(self, tier: Tier, count: int | None = None) -> int:
        """Evict up to `count` blocks from the hot or the warm tier, all that may go if None. Return how many went.

        Children go before parents; this call waits for blocks that must be written to a lower tier first.
        """
        return self._evictor.evict_tier(tier, count)

    @while_open
    def defragment(self, running: Collection[Sequence] = ()) -> LayoutReport:
        """Lay the hot pool's chains in contiguous runs, no byte changed. Return what was moved: block ids change.

        running: sequences whose block tables may be rewritten, because nothing is computed with them until this
        returns; blocks of all other running sequences stay where they are. Raises StoreError if a copy fails.
        """
        sequences = self._running.require_all(running)
        return Defragmenter(self._tiers, self._offloader, self._users).run(sequences)

    @while_open
    def flush(self) -> None:
        """Wait until every committed block has been written to the lower tiers and synced to disk.

        Raises StoreError if the store cannot be written to.
        """
        self._offloader.flush()
        if self.cold:
            self.cold.flush()
        if self._daemon:
            self._daemon.flush()

    @while_open
    def save_cache_state(self, path: str | Path) -> SavedState:
        """Write every cached block of this namespace into one file, atomically. Damaged blocks are left out.

        The path may be free or a regular file's; anything else, a symbolic link too, is refused.
        Raises StoreError or DaemonError, also where the disk does not answer, and ConfigError for what is no path.
        """
        path = check_path(path)
        self.flush()
        if self._daemon:
            saved = self._daemon.save(path)
            return SavedState(blocks=saved.blocks, file_bytes=saved.file_bytes)
        return save_state(self._tiers, path, self.namespace, must_end=self._must_end.is_set)

    @while_open
    def load_cache_state(self, path: str | Path) -> int:
        """Open a state file as one more source of cold blocks, read on demand. Return how many it has.

        The same file loaded again is the same source; another file that has come to its path replaces it.
        Raises NamespaceMismatchError naming what differs, StoreError for a file that is none or not whole, or on a disk
        that does not answer, CapacityError where too many are loaded, and ConfigError for what is no path.
        """
        path = check_path(path)
        if self._daemon:
            open_state(path, self.namespace, must_end=self._must_end.is_set).close()
            return self._daemon.load(path)
        return len(load_state(self._tiers, path, self.namespace, must_end=self._must_end.is_set))

    @while_open
    def stats(self) -> CacheStats:
        """Return counters and sizes as they are now."""
        cold = self.cold.stats() if self.cold else None
        lower = self._daemon.sizes() if self._daemon else {}
        with self._tiers.changed:
            return self._tiers.stats.snapshot(
                occupancy(self._tiers, cold) | lower,
                avg_shared_blocks=self._running.avg_shared_blocks(),
                fragmentation_ratio=self._tiers.index.hot.fragmentation(),
                state_files=len(self._tiers.states),
                remotes=self._tiers.remotes.stats() if self._tiers.remotes else (),
            )

    @while_open
    def set_eviction_policy(self, policy: str | EvictionPolicy) -> None:
        """Evict by another policy from now on: a name, or any object that satisfies the Protocol."""
        chosen = policy_of(policy)
        with self._tiers.changed:
            self._tiers.index.set_policy(chosen)

    @while_open
    def add_observer(self, observer: CacheObserver) -> None:
        """Notify an observer of the memory and the blocks that are there, and of all that happens from now on."""
        require_observer(observer)
        regions = pool_regions(self._tiers.memory, reserved=self._offloader.writer.staging)
        with self._tiers.changed:
            self._tiers.observers.add(observer, regions, self._tiers.index)

    @while_open
    def remove_observer(self, observer: CacheObserver) -> None:
        """Notify an observer no more."""
        with self._tiers.changed:
            self._tiers.observers.remove(observer)

    @while_open
    def check(self) -> None:
        """Raise AssertionError unless every invariant holds: no slot leaked or used twice, no child without parent.

        Waits for writes and copies in flight, so that every reference can be accounted for.
        """
        self._offloader.flush()
        self._running.wait_for_loads()
        with self._tiers.changed:
            while self._tiers.copies.in_flight:
                self._tiers.copies.in_flight[0][0].synchronize()
                self._tiers.reap()
            self._tiers.index.check()
            self._running.check()
        if self.cold:
            self.cold.check()

    def close(self) -> None:
        """Write what is queued, release the running sequences, then free memory, files and threads.

        Calls of other threads end first, with ClosedError if they wait for room, or save or load for too long. Later
        calls raise ClosedError too. A read or write that hangs (a broken disk, another program that holds the store)
        keeps its thread and the memory that it may still touch. Blocks that were not written are logged.
        """
        if not self.calls.close():
            return
        tiers = self._tiers
        with tiers.changed:
            tiers.is_closing = True
            tiers.changed.notify_all()
        self._running.cancel_loads()
        self._prefetcher.close()
        self.calls.wait(self.config.write_wait_s + _CALLS_WAIT_S)
        self._must_end.set()
        is_quiet = self._offloader.close()  # this ends the calls that wait for writes
        is_quiet &= self.calls.wait(_CALLS_WAIT_S)
        is_idle = self._running.release_all()
        close_tiers(tiers, self._daemon, is_quiet=is_quiet, is_idle=is_idle, owns_cold=self._owns_cold)


def save_cache_state(cache: TierCache, path: str | Path) -> SavedState:
    """Write everything that a cache holds into one file, atomically. See `TierCache.save_cache_state`.

    >>> save_cache_state(cache, "state.tkv").blocks
    2
    """
    return cache.save_cache_state(path)


def load_cache_state(cache: TierCache, path: str | Path) -> int:
    """Let a cache find the blocks of a state file; returns at once. See `TierCache.load_cache_state`.

    >>> saved = save_cache_state(cache, "state.tkv")
    >>> load_cache_state(cache, "state.tkv")
    2
    """
    return cache.load_cache_state(path)
