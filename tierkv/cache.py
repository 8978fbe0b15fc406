"""TierCache: the facade over the three tiers. Engines talk to this and to nothing below it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tierkv.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, TokenIds, as_token_array, hash_block, iter_chain
from tierkv.block_control import BlockControl
from tierkv.config import CacheConfig
from tierkv.defragment import Defragmenter, LayoutReport
from tierkv.demotion import Demoter
from tierkv.errors import ConfigError, NamespaceMismatchError
from tierkv.events import BlockName, CacheObserver, EventKind
from tierkv.index import Entry, Index
from tierkv.lookup import Hit, Lookup, find_tail, look_up
from tierkv.movers.mover import Move, Ready
from tierkv.namespace import Namespace, differing_fields
from tierkv.policies import EvictionPolicy, make_policy
from tierkv.promotion import Promoter
from tierkv.ranks.accord import Accord
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.remote.tiers import DaemonTiers, Ticket
from tierkv.sequence import Sequence
from tierkv.split_load import SplitLoad
from tierkv.stats import CacheStats, TierStats
from tierkv.storage.codecs import Codec, codec_by_name, default_codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.float_words import float_format
from tierkv.storage.hot import HotPool, hot_pool_blocks
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, encode_record, read_header
from tierkv.storage.state_file import SavedState, StateFile, write_state_file
from tierkv.tiers import Tiers
from tierkv.warm_memory import no_warm_memory, open_warm_memory
from tierkv.watch import Watch, pool_regions

__all__ = ["Match", "TierCache", "load_cache_state", "save_cache_state"]


_NUM_LOADERS = 4


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt would find: blocks and tokens by the tier that has them. Cold token ids are not yet compared."""

    num_tokens: int
    blocks: dict[Tier, int]
    tokens: dict[Tier, int]
    block_hashes: tuple[BlockHash, ...] = ()

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that some tier has."""
        return sum(self.tokens.values())


class TierCache:
    """Keys and values of one model, kept hot, warm and cold. Context manager; `close` may be called twice.

    namespace: identity of the model and the layout of its blocks; other namespaces in the same store are
    never read. With a lossy codec it becomes one that names the codec: `cache.namespace` is what holds.
    device: where the hot pool lies and the model runs. cold: an open store to share with another cache of this
    process; without one the cache opens `config.cold_path` itself and closes it.
    ranks: of a model that is split over several devices, the others; each rank has a cache of its own, and all may
    have one cold_path.

    Life of a request: `acquire` (or `match` to look first), compute the tokens that were not cached, `commit`
    them, `append` and `commit` while decoding, `release`. Calls are thread-safe; a sequence belongs to one
    thread. Damage, full disks and failed copies are misses that `stats` counts, never exceptions.
    `blocks` acts on blocks of the hot pool by their ids.
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
        _check_slice(namespace, self.ranks)
        codec = _codec_of(config, namespace)
        namespace = replace(namespace, lossy_codec=codec.name if codec.is_lossy else "")
        self.config = config
        self.namespace = namespace
        self.layout = namespace.layout
        if self.layout.block_size != config.block_size:
            raise ConfigError(f"block_size is {config.block_size}, but the layout's is {self.layout.block_size}")
        self.device = torch.device(device)
        self._hash = hash_function
        self._owns_cold = cold is None
        self._sequences: set[Sequence] = set()
        self._is_open = True
        if config.socket is not None:
            if cold is not None:
                raise ConfigError("a cache with a socket uses the daemon's store, not one of its own")
        elif cold is None and config.cold_path is not None:
            cold = ColdStore(config.cold_path, quota_bytes=config.cold_bytes, min_free_bytes=config.min_free_bytes)
        try:
            if cold:
                cold.open_namespace(namespace)
            self._tiers = self._build(cold, codec, policy or make_policy(config.eviction_policy), clock)
            try:
                self._demoter = Demoter(self._tiers)
            except BaseException:
                self._tiers.close()
                raise
        except BaseException:
            if cold and self._owns_cold:
                cold.close()
            raise
        self._daemon = self._join_daemon(config.socket) if config.socket is not None else None
        self._promoter = Promoter(self._tiers, self._demoter)
        self.blocks = BlockControl(self._tiers, self._demoter)
        self._accord = Accord(self.ranks, self._tiers, self._demoter)

    def __enter__(self) -> TierCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def hot(self) -> HotPool:
        """The paged memory that attention reads."""
        return self._tiers.hot

    @property
    def layer_groups(self) -> list[int]:
        """Ends of the groups of layers that are promoted together, lowest first; the last is the layer count."""
        return self._tiers.mover.layer_groups

    @property
    def cold(self) -> ColdStore | None:
        """The store on disk, if there is one."""
        return self._tiers.cold

    def match(self, token_ids: TokenIds) -> Match:
        """Return how many leading tokens are cached, and where. Changes and reads nothing."""
        token_bytes = as_token_array(token_ids).tobytes()
        with self._tiers.changed:
            found = self._look_up(token_bytes, len(token_bytes) // TOKEN_BYTES)
        if self._daemon:
            found, _ = self._daemon.look_further(found, token_bytes, None)
        blocks, tokens = _count_by_tier(len(found.hot), self.config.block_size, found.rest())
        return Match(len(token_bytes) // TOKEN_BYTES, blocks, tokens, tuple(found.block_hashes))

    def acquire(self, token_ids: TokenIds, *, reuse: bool = True, may_split: bool = False) -> Sequence:
        """Return a sequence with room for every token, its cached prefix on the way into the hot pool.

        At least one token is always left to compute. `reuse=False` takes room only and finds nothing. With `may_split`
        many cold blocks come up behind the caller's back, who computes the first of them meanwhile, piece by piece as
        `sequence.split` says, and then calls `join`.
        Raises ConfigError for an empty prompt, CapacityError where the hot pool has no room beside what is in use.
        """
        token_bytes = as_token_array(token_ids).tobytes()
        num_tokens = len(token_bytes) // TOKEN_BYTES
        if not num_tokens:
            raise ConfigError("a prompt needs at least one token")
        with self._tiers.watch.span("acquire") as detail:
            sequence = self._acquire(token_bytes, num_tokens, reuse=reuse, may_split=may_split)
            detail["tokens"], detail["cached tokens"] = num_tokens, sequence.num_cached_tokens
        return sequence

    def _acquire(self, token_bytes: bytes, num_tokens: int, *, reuse: bool, may_split: bool) -> Sequence:
        num_blocks = -(-num_tokens // self.config.block_size)
        with self._tiers.changed:
            found = self._look_up(token_bytes, num_tokens - 1) if reuse else Lookup()
            pinned = self._promoter.pin(found)
        ticket: Ticket | None = None
        if self._daemon and reuse:
            found, ticket = self._daemon.look_further(found, token_bytes[:-TOKEN_BYTES], pinned.rest)
        # Not over ranks: each one's load would meet the engine at another block.
        may_split = may_split and self.ranks.size == 1 and not self._daemon
        later, dropped = self._plan_cold(found, num_tokens) if may_split else ([], [])
        if later or dropped:
            found = replace(found, blocks=found.blocks[: -len(later or dropped)], tail=None)
        try:
            promoted = self._accord.promote(
                lambda: self._promoter.promote(found, pinned, num_blocks=num_blocks), topic=token_bytes
            )
        except BaseException:
            self._end_ticket(ticket)
            raise
        finally:
            if self._daemon:
                self._daemon.end_lookup(found)
        if promoted.failure:
            later = []
        size = self.config.block_size
        blocks, tokens = _count_by_tier(len(promoted.hot), size, promoted.hits)
        num_whole = sum(hit.num_tokens == size and hit is not found.tail for hit in promoted.hits)
        chain = [entry.block_hash for entry in promoted.hot]
        chain += (hit.block_hash for hit in promoted.hits[:num_whole])
        sequence = Sequence(
            token_bytes=bytearray(token_bytes),
            block_table=promoted.block_table,
            num_cached_tokens=sum(tokens.values()),
            cached_tokens=tokens,
            chain=chain,
            loads=promoted.loads,
            ticket=ticket,
            is_cacheable=reuse,
        )
        try:
            if later:
                targets = promoted.block_table[len(chain) : len(chain) + len(later)]
                sequence.split = self._promoter.split(later, targets, num_before=sequence.num_cached_tokens)
            with self._tiers.changed:
                self._sequences.add(sequence)
                num_found = sum(blocks.values()) + len(later) + len(dropped)
                self._tiers.stats.misses += len(dropped)
                self._tiers.stats.miss_reasons[MissReason.RECOMPUTED.value] += len(dropped)
                miss = promoted.failure or found.miss
                missed = self._count(
                    sequence, num_blocks - num_found, num_found, miss, num_surplus=promoted.num_surplus
                )
                if self._tiers.watch:
                    reasons = [MissReason.RECOMPUTED] * len(dropped) + missed
                    names = [*map(BlockName.of, dropped), *self._names(sequence, num_found)]
                    self._tiers.watch.request(
                        num_tokens,
                        tokens,
                        promoted.hot,
                        promoted.hits,
                        zip(names, reasons, strict=True),
                        later=later,
                        hot_blocks=self._tiers.index.hot.used_count,
                    )
                self._tiers.stats.hits.update(blocks)
                self._tiers.stats.hit_tokens.update(tokens)
                self._touch(promoted.hot, promoted.hits)
            if self.cold:
                self.cold.touch([*chain, *(hit.block_hash for hit in promoted.hits[num_whole:])])
        except BaseException:
            self.release(sequence)
            raise
        return sequence

    def join(self, sequence: Sequence) -> int:
        """Wait for the blocks of `sequence.split` and make them part of the sequence.

        Call it once `split.next_piece` has returned 0, with everything it had asked for committed. Return how many
        leading tokens have K and V now, loaded on the way or computed; the engine goes on from there.
        """
        _require_running(sequence)
        split, size = sequence.split, self.config.block_size
        if split is None:
            return sequence.num_cached_tokens
        split.wait()
        sequence.split = None
        sequence.loads += split.loads
        meeting = split.meeting
        if meeting.num_computed < meeting.first_loaded:  # what the engine was to wait for did not come: a gap
            meeting.lose_loaded()
        loaded = split.hits[meeting.first_loaded :]
        sequence.num_cached_tokens += len(loaded) * size
        sequence.cached_tokens[Tier.COLD] += len(loaded) * size
        with self._tiers.changed:
            computed = self._count_split(split)
            written = self._tiers.mover.mark()
            for hit in loaded:
                entry = self._tiers.index.insert(hit.block_hash, hit.parent_hash, hit.token_bytes, seal=hit.seal)
                if entry is None or not sequence.is_cacheable or hit.parent_hash != self._last_hash(sequence):
                    break
                entry.in_cold = True
                self._register(sequence, len(sequence.chain), size, written, kind=EventKind.PROMOTE)
                self._tiers.index.touch(entry)
            if self._tiers.watch:
                self._tiers.watch.rest_of_request(
                    {Tier.COLD: len(loaded) * size},
                    loaded,
                    zip(map(BlockName.of, split.hits), computed, strict=False),
                    hot_blocks=self._tiers.index.hot.used_count,
                )
        if split.failed:
            self._promoter.give_up(*split.failed)
        self._promoter.keep_warm(loaded)
        if self.cold:
            self.cold.touch([hit.block_hash for hit in loaded])
        return split.num_before + (meeting.num_computed + len(loaded)) * size

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Say how long a forward pass of so many new tokens took, from its launch until its result was there.

        What `acquire(may_split=True)` decides by whether to load cold blocks, to compute them, or both.
        """
        with self._tiers.changed:
            self._tiers.step_costs.add(num_tokens, seconds)

    def append(self, sequence: Sequence, token_ids: TokenIds) -> None:
        """Add tokens to a sequence and take the blocks that they need. Raises CapacityError, nothing added."""
        _require_running(sequence)
        token_bytes = as_token_array(token_ids).tobytes()
        num_tokens = sequence.num_tokens + len(token_bytes) // TOKEN_BYTES
        missing = -(-num_tokens // self.config.block_size) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table.extend(self._accord.take_hot(missing, topic=token_bytes))
        sequence.token_bytes += token_bytes

    def commit(self, sequence: Sequence, num_computed_tokens: int, *, tail: bool = False) -> int:
        """Register the blocks whose K and V are now computed, so that others find them. Return how many were new.

        num_computed_tokens: leading tokens of the sequence, cached ones included, whose K and V have been
        written (or queued to be, on the current stream). tail: also store the partly filled block at the end.
        A block whose hash another one has taken stays private, and so does what follows it.
        """
        _require_running(sequence)
        if not 0 <= num_computed_tokens <= sequence.num_tokens:
            raise ConfigError(f"{num_computed_tokens} tokens computed of a sequence of {sequence.num_tokens}")
        size = self.config.block_size
        num_new = 0
        with self._tiers.changed:
            written = self._tiers.mover.mark()
            while len(sequence.chain) < num_computed_tokens // size and sequence.is_cacheable:
                at = len(sequence.chain)
                num_new += self._register(sequence, at, size, written)
            num_tail = num_computed_tokens - len(sequence.chain) * size
            if tail and sequence.is_cacheable and num_tail > 0:
                num_new += self._register(sequence, len(sequence.chain), num_tail, written)
        self._tiers.watch.use(sequence.block_table)
        return num_new

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a second sequence with the same tokens, for parallel sampling.

        Whole blocks are shared; the partly filled last block is copied, so that the two may part ways.
        Raises CapacityError where there is no room for that copy, StoreError where it fails.
        """
        _require_running(sequence)
        if sequence.split:
            raise ConfigError("the sequence's cold blocks are still coming: join them before it is forked")
        size = self.config.block_size
        num_shared = sequence.num_tokens // size
        own = self._accord.take_hot(len(sequence.block_table) - num_shared, topic=b"fork")
        forked = Sequence(
            token_bytes=bytearray(sequence.token_bytes),
            block_table=[*sequence.block_table[:num_shared], *own],
            num_cached_tokens=sequence.num_cached_tokens,
            cached_tokens=dict(sequence.cached_tokens),
            chain=list(sequence.chain),
            is_cacheable=sequence.is_cacheable,
        )
        with self._tiers.changed:
            self._tiers.index.hot.pin_all(sequence.block_table[:num_shared])
            self._sequences.add(forked)
        try:
            sequence.wait_all()
            moves = [Move(s, t) for s, t in zip(sequence.block_table[num_shared:], own, strict=True)]
            forked.loads.append(self._tiers.mover.copy(moves))
        except BaseException:
            self.release(forked)
            raise
        return forked

    def release(self, sequence: Sequence) -> None:
        """End a sequence: registered blocks stay cached, the others are free. May be called twice."""
        if sequence.is_released:
            return
        sequence.is_released = True
        if sequence.split:
            sequence.split.cancel()
        with self._tiers.changed:
            self._sequences.discard(sequence)
        self._tiers.leave(sequence.block_table)
        self._tiers.unpin_all(Tier.HOT, sequence.block_table)
        self._demoter.keep_room()
        self._end_ticket(sequence.ticket)

    def pin(self, token_ids: TokenIds) -> int:
        """Keep a cached prompt's blocks in every tier that has them, on disk also after a restart.

        Return how many blocks that are; `unpin` takes it back. Raises DaemonError where a daemon has the lower
        tiers and this tenant's share of them is used up.
        """
        return self._set_pinned(token_ids, True)

    def unpin(self, token_ids: TokenIds) -> int:
        """Let a prompt's blocks be evicted again. Return how many blocks that are."""
        return self._set_pinned(token_ids, False)

    def prefetch(self, token_ids: TokenIds) -> int:
        """Announce a prompt: a daemon brings its blocks into the warm tier before the request comes.

        Return how many blocks it will look for; 0 without a daemon. Returns at once.
        """
        return self._daemon.prefetch(as_token_array(token_ids).tobytes()) if self._daemon else 0

    def evict(self, tier: Tier, count: int | None = None) -> int:
        """Evict up to `count` blocks (all that may go, if None) from the hot or the warm tier.

        Children go before parents; what nobody has written down yet is written first. Return how many went.
        """
        if tier is Tier.COLD:
            raise ConfigError("the cold tier is evicted through its store: cache.cold.evict(...)")
        if tier is Tier.WARM and self._daemon:
            return self._daemon.evict(count)
        with self._tiers.changed:
            self._tiers.reap()
            pool = self._tiers.index.pool(tier)
            wanted = pool.capacity if count is None else count
            before = pool.used_count
            if tier is Tier.WARM:
                self._tiers.evict_warm(wanted)
            else:
                self._demoter.evict_hot(wanted)
            return before - pool.used_count

    def defragment(self, running: Collection[Sequence] = ()) -> LayoutReport:
        """Lay the hot pool's chains in contiguous runs, no byte changed. Return what was moved: block ids change.

        running: sequences whose block tables may be rewritten, because nothing is computed with them until this
        returns; blocks of all other running sequences stay where they are. Raises StoreError if a copy fails.
        """
        for sequence in running:
            _require_running(sequence)
        return Defragmenter(self._tiers, self._demoter).run(running)

    def flush(self) -> None:
        """Wait until every committed block has been written to the lower tiers and synced to disk."""
        self._demoter.flush()
        if self.cold:
            self.cold.flush()
        if self._daemon:
            self._daemon.flush()

    def save_cache_state(self, path: str | Path) -> SavedState:
        """Write every cached block of this namespace into one file, atomically. Raises StoreError or DaemonError."""
        self.flush()
        if self._daemon:
            saved = self._daemon.save(Path(path))
            return SavedState(blocks=saved.blocks, file_bytes=saved.file_bytes)
        return write_state_file(
            Path(path),
            namespace=self.namespace.digest,
            description=self.namespace.describe(),
            records=self._iter_records(),
        )

    def load_cache_state(self, path: str | Path) -> int:
        """Open a state file as one more source of cold blocks; they come up on demand. Return how many it has.

        Raises NamespaceMismatchError naming what differs, StoreError for a file that is none or not whole.
        """
        state = StateFile(Path(path))
        if state.namespace != self.namespace.digest:
            state.close()
            mine = {"name": self.namespace.name, **self.namespace.identity()}
            names = ", ".join(differing_fields(state.description, mine)) or "salt"
            raise NamespaceMismatchError(f"{path} was saved for another model or setting: {names} differ")
        if self._daemon:
            state.close()
            return self._daemon.load(Path(path))
        with self._tiers.changed:
            self._tiers.states.append(state)
        return len(state)

    def stats(self) -> CacheStats:
        """Return counters and sizes as they are now."""
        tiers, layout = self._tiers, self.layout
        cold = self.cold.stats() if self.cold else None
        lower = self._daemon.sizes() if self._daemon else {}
        with tiers.changed:
            hot, warm = tiers.index.hot, tiers.index.warm
            sizes = {
                tier: TierStats(
                    blocks=pool.used_count,
                    used_bytes=pool.used_count * layout.block_bytes,
                    stored_bytes=pool.used_count * slot_bytes,
                    capacity_bytes=pool.capacity * layout.block_bytes,
                )
                for tier, pool, slot_bytes in (
                    (Tier.HOT, hot, layout.block_bytes),
                    (Tier.WARM, warm, tiers.warm.stride_bytes),
                )
            }
            if cold:
                sizes[Tier.COLD] = TierStats(
                    blocks=cold.blocks,
                    used_bytes=cold.raw_bytes,
                    stored_bytes=cold.live_bytes,
                    capacity_bytes=cold.quota_bytes,
                    evictions=cold.evicted_blocks,
                )
            return tiers.stats.snapshot(
                sizes | lower,
                avg_shared_blocks=self._avg_shared_blocks(),
                fragmentation_ratio=hot.fragmentation(),
            )

    def set_eviction_policy(self, policy: str | EvictionPolicy) -> None:
        """Choose victims by another policy from now on: a name, or any object that satisfies the Protocol."""
        with self._tiers.changed:
            self._tiers.index.set_policy(make_policy(policy) if isinstance(policy, str) else policy)

    def add_observer(self, observer: CacheObserver) -> None:
        """Tell an observer what happens from now on, and first of the memory and the blocks that are there."""
        tiers = self._tiers
        with tiers.changed:
            staging = tiers.compression.staging if tiers.compression else None
            for region in pool_regions(self.hot, tiers.warm, staging, reserved=self._demoter.staging):
                observer.on_memory(region)
            for entry in sorted(tiers.index, key=lambda each: each.depth):  # parents first
                for tier in (Tier.HOT, Tier.WARM):
                    slot = entry.place(tier)
                    if slot is not None:
                        observer.on_block(tiers.watch.event(EventKind.REGISTER, tier, entry, slot=slot))
            tiers.watch.add(observer)

    def remove_observer(self, observer: CacheObserver) -> None:
        """Tell an observer nothing more."""
        with self._tiers.changed:
            self._tiers.watch.remove(observer)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds: no slot leaked or used twice, no child without parent.

        Waits for writes and copies in flight, so that every reference can be accounted for.
        """
        self._demoter.flush()
        for sequence in list(self._sequences):
            if sequence.split:
                sequence.split.wait()
        with self._tiers.changed:
            while self._tiers.in_flight:
                self._tiers.in_flight[0][0].synchronize()
                self._tiers.reap()
            self._tiers.index.check()
            users = [0] * self._tiers.index.hot.capacity
            for sequence in self._sequences:
                for block_id in sequence.block_table:
                    users[block_id] += 1
            for block_id, count in enumerate(users):
                held = self._tiers.index.hot.reference_count(block_id)
                assert held == count, f"block {block_id} has {count} users but a reference count of {held}"
        if self.cold:
            self.cold.check()

    def close(self) -> None:
        """Write what is queued, then give back memory, files and threads. Running sequences become invalid."""
        if not self._is_open:
            return
        self._is_open = False
        self._demoter.close()
        if self._daemon:
            self._daemon.close()
        self._tiers.close()
        for state in self._tiers.states:
            state.close()
        if self.cold and self._owns_cold:
            self.cold.close()

    def _build(self, cold: ColdStore | None, codec: Codec, policy: EvictionPolicy, clock: Callable[[], float]) -> Tiers:
        config, layout = self.config, self.layout
        num_hot = hot_pool_blocks(layout, self.device, hot_bytes=config.hot_bytes, hot_fraction=config.hot_fraction)
        hot = HotPool(layout, num_hot, self.device)
        memory = open_warm_memory(hot, config) if config.socket is None else no_warm_memory(hot)
        index = Index(
            root=self.namespace.digest, num_hot=num_hot, num_warm=memory.warm.num_slots, policy=policy, clock=clock
        )
        return Tiers(
            layout=layout,
            namespace=self.namespace.digest,
            codec=codec,
            index=index,
            hot=hot,
            warm=memory.warm,
            mover=memory.mover,
            compression=memory.compression,
            frames=memory.frames,
            cold=cold,
            threads=ThreadPoolExecutor(config.num_io_threads, thread_name_prefix="tierkv-io"),
            num_threads=config.num_io_threads,
            loaders=ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="tierkv-load"),
            watch=Watch(layout),
        )

    def _join_daemon(self, path: Path) -> DaemonTiers:
        """Use the daemon's lower tiers. Raises DaemonError if it refuses, with this cache's own memory given back."""
        try:
            self._tiers.lower = daemon = DaemonTiers(
                self._tiers,
                path=path,
                namespace=self.namespace,
                block_size=self.config.block_size,
                hash_function=self._hash,
                # Ranks of two copies of a model would wait for each other, crosswise: they compute for themselves.
                wait_s=self.config.compute_wait_s if self.ranks.size == 1 else 0.0,
                timeout_s=self.config.daemon_timeout_s,
                min_tail_tokens=self.config.min_partial_tokens,
            )
        except BaseException:
            self._tiers.close()
            raise
        return daemon

    def _end_ticket(self, ticket: Ticket | None) -> None:
        """End the promise to compute blocks, once those that were computed have been written down."""
        daemon = self._daemon
        if daemon and ticket and not self._demoter.after_writes(partial(daemon.end_ticket, ticket)):
            daemon.end_ticket(ticket)

    def _look_up(self, token_bytes: bytes, max_tokens: int) -> Lookup:
        return look_up(
            self._tiers.index,
            self._tiers.sources,
            token_bytes,
            block_size=self.config.block_size,
            max_tokens=max_tokens,
            min_partial_tokens=self.config.min_partial_tokens,
            hash_function=self._hash,
        )

    def _register(
        self,
        sequence: Sequence,
        at: int,
        num_tokens: int,
        written: Ready,
        *,
        kind: EventKind = EventKind.REGISTER,
    ) -> int:
        """Make one computed block findable. Return 1 if no tier had it. The caller holds the lock.

        kind: how it came to be hot, for observers.
        """
        tiers, index = self._tiers, self._tiers.index
        parent = sequence.chain[at - 1] if at else index.root
        start = at * self.config.block_size * TOKEN_BYTES
        tokens = bytes(sequence.token_bytes[start : start + num_tokens * TOKEN_BYTES])
        block_hash = self._hash(parent, tokens)
        if index.collides(block_hash, parent, tokens):
            tiers.stats.collisions += 1
            sequence.is_cacheable = False
            return 0
        if num_tokens < self.config.block_size:
            if find_tail(index, tiers.sources, parent, tokens, num_tokens):
                return 0
            self._demoter.write_tail(block_hash, parent, tokens, sequence.block_table[at], written)
            return 1
        entry = index.insert(block_hash, parent, tokens)
        if entry is None:
            sequence.is_cacheable = False
            return 0
        sequence.chain.append(block_hash)
        if entry.block_id is not None:
            self._share(sequence, at, entry.block_id)
            return 0
        is_new = entry.warm_slot is None and not entry.in_cold
        tiers.attach(entry, Tier.HOT, sequence.block_table[at], kind)
        if is_new and self.config.write_through:
            self._demoter.write_down(entry, written)
        return int(is_new)

    def _share(self, sequence: Sequence, at: int, block_id: int) -> None:
        """Let a sequence use the block that is registered instead of its own copy of the same tokens."""
        own = sequence.block_table[at]
        if own == block_id:
            return
        self._tiers.index.hot.pin(block_id)
        if arriving := self._tiers.arriving.get(block_id):
            sequence.loads.append(arriving)
        sequence.block_table[at] = block_id
        self._tiers.index.unpin(Tier.HOT, own)

    def _plan_cold(self, found: Lookup, num_tokens: int) -> tuple[list[Hit], list[Hit]]:
        """Return the cold blocks at the end of a lookup as (to load while others are computed, not to load at all).

        One of them is empty, or both: then all is loaded before anything is computed, as long as nothing is known of
        what loading and computing cost, and where a few blocks are cheaper to load.
        """
        cold = list(takewhile(lambda hit: hit.tier is Tier.COLD, reversed(found.blocks)))[::-1]
        costs, load_s = self._tiers.step_costs, self._tiers.block_s(len(cold))
        num_cold, num_rest = len(cold) * self.config.block_size, num_tokens - found.num_tokens
        computing, rest = costs.estimate(num_cold + num_rest), costs.estimate(num_rest)
        if not cold or load_s is None or computing is None or rest is None:
            return [], []
        if num_cold > self.config.piece_tokens and not (found.tail and found.tail.tier is not Tier.COLD):
            return cold, []
        if computing > len(cold) * load_s + rest:
            return [], []
        self._tiers.read_s.forget()  # a little: what is never loaded any more would never be found faster again
        return [], cold

    def _last_hash(self, sequence: Sequence) -> BlockHash:
        return sequence.chain[-1] if sequence.chain else self._tiers.index.root

    def _touch(self, hot: list[Entry], hits: list[Hit]) -> None:
        """Record the use of what was hot, and of hits that were promoted. The caller holds the lock."""
        index = self._tiers.index
        index.touch_all(hot)  # pinned since the lookup, so still the same blocks
        found = (index.get(hit.block_hash, hit.parent_hash, hit.token_bytes, seal=hit.seal) for hit in hits)
        index.touch_all(entry for entry in found if entry)

    def _count(
        self, sequence: Sequence, num_missing: int, num_found: int, miss: MissReason | None, num_surplus: int = 0
    ) -> list[MissReason]:
        """Count a request. Return why each missing block is missing.

        miss: why the block behind the hits was none, if there is more to say than absent. num_surplus: blocks that
        this rank had, right behind those found, and gave up.
        """
        stats = self._tiers.stats
        stats.requests += 1
        stats.prompt_tokens += sequence.num_tokens
        stats.misses += num_missing
        stats.collisions += miss is MissReason.COLLISION
        reasons = self._miss_reasons(sequence, num_found) if sequence.is_cacheable else []
        known = [MissReason.OTHER_RANK] * num_surplus + ([miss] if miss else [])
        reasons = [*known, *reasons[len(known) :]][:num_missing]
        reasons += [MissReason.ABSENT] * (num_missing - len(reasons))
        stats.miss_reasons.update(reason.value for reason in reasons)
        return reasons

    def _names(self, sequence: Sequence, num_found: int) -> list[BlockName]:
        """Name the blocks behind those found. One that nobody can find, or nobody asked after, has no hash."""
        step, done = self.config.block_size * TOKEN_BYTES, len(sequence.chain)
        rest = bytes(sequence.token_bytes[done * step :])
        parent = self._last_hash(sequence)
        named: list[BlockName] = []
        if sequence.is_cacheable:
            for block_hash, tokens in iter_chain(parent, rest, self.config.block_size, self._hash):
                named.append(BlockName(block_hash, parent, tokens))
                parent = block_hash
        unnamed = range(len(named) * step, len(rest), step)
        named += (BlockName(b"", b"", rest[start : start + step]) for start in unnamed)
        return named[num_found - done :]

    def _count_split(self, split: SplitLoad) -> list[MissReason]:
        """Count what became of a request's cold blocks. Return why each was computed that was; the lock is held."""
        stats = self._tiers.stats
        num_computed = split.meeting.first_loaded
        num_loaded = len(split.hits) - num_computed
        stats.hits[Tier.COLD] += num_loaded
        stats.hit_tokens[Tier.COLD] += num_loaded * self.config.block_size
        for tier in (Tier.COLD, Tier.WARM):  # they come by way of a warm slot, as all cold blocks do
            stats.bytes_out[tier] += num_loaded * self.layout.block_bytes
        stats.misses += num_computed
        stats.miss_reasons[MissReason.RECOMPUTED.value] += num_computed - (split.failure is not None)
        if split.failure:
            stats.miss_reasons[split.failure.value] += 1
        reasons = [MissReason.RECOMPUTED] * num_computed
        return [*reasons[:-1], split.failure] if split.failure and reasons else reasons

    def _miss_reasons(self, sequence: Sequence, num_hits: int) -> list[MissReason]:
        """Tell of each whole block behind the hits whether the store remembers to have evicted it."""
        if self.cold is None:
            return []
        size = self.config.block_size
        parent = sequence.chain[-1] if sequence.chain else self._tiers.index.root
        rest = bytes(sequence.token_bytes[len(sequence.chain) * size * TOKEN_BYTES :])
        hashes = [block_hash for block_hash, _ in iter_chain(parent, rest, size, self._hash)]
        evicted = map(self.cold.was_evicted, hashes[num_hits - len(sequence.chain) :])
        return [MissReason.EVICTED if each else MissReason.ABSENT for each in evicted]

    def _set_pinned(self, token_ids: TokenIds, pinned: bool) -> int:
        token_bytes = as_token_array(token_ids).tobytes()
        with self._tiers.changed:
            found = self._look_up(token_bytes, len(token_bytes) // TOKEN_BYTES)
            entries = [*found.hot, *(hit.entry for hit in found.rest())]
            for entry in entries:
                if entry:
                    self._tiers.index.set_pinned(entry, pinned)
        if self.cold:
            self.cold.set_pinned(found.block_hashes, pinned)
        if self._daemon:
            return max(len(entries), self._daemon.set_pinned(token_bytes, pinned))
        return len(entries)

    def _avg_shared_blocks(self) -> float:
        users: Counter[int] = Counter()
        for sequence in self._sequences:
            users.update(sequence.block_table)
        shared = sum(users[block] > 1 for sequence in self._sequences for block in sequence.block_table)
        return shared / len(self._sequences) if self._sequences else 0.0

    def _iter_records(self) -> Iterator[bytes]:
        """Yield the record of every block that some tier has, each once."""
        seen: set[bytes] = set()
        if self.cold:
            for block_hash, _ in list(self.cold.iter_entries(self.namespace.digest)):
                record = self.cold.read_record(block_hash)
                if record is not None:
                    seen.add(block_hash)
                    yield record
        with self._tiers.changed:
            entries = [entry for entry in self._tiers.index if entry.block_hash not in seen]
        for entry in entries:
            block = self._copy_of(entry)
            if block is not None:
                seen.add(entry.block_hash)
                yield self._encode(entry, block)
        for state in self._tiers.states:
            yield from (record for record in state.iter_records() if read_header(record).info.block_hash not in seen)

    def _copy_of(self, entry: Entry) -> npt.NDArray[np.uint8] | None:
        """Return a copy of an entry's bytes from the warm or the hot tier, or None if it has left both."""
        with self._tiers.changed:
            if entry.warm_slot is not None:
                return self._tiers.copy_warm(entry.warm_slot)
            if entry.block_id is not None:
                copied: npt.NDArray[np.uint8] = np.empty(self.layout.block_bytes, dtype=np.uint8)
                torch.from_numpy(copied).copy_(self.hot.bytes_view[entry.block_id])
                return copied
            return None

    def _encode(self, entry: Entry, block: npt.NDArray[np.uint8]) -> bytes:
        with self._tiers.changed:
            seal = self._tiers.index.seal_of(entry)
        info = BlockInfo(
            block_hash=entry.block_hash,
            parent=entry.parent_hash,
            namespace=self.namespace.digest,
            seal=seal,
            token_bytes=entry.token_bytes,
        )
        return encode_record(info, block, layout=self.layout, codec=self._tiers.codec).data.tobytes()


def _require_running(sequence: Sequence) -> None:
    """Raise ConfigError for a released sequence: its blocks may hold another one's K and V by now."""
    if sequence.is_released:
        raise ConfigError("the sequence has been released")


def _check_slice(namespace: Namespace, ranks: RankGroup) -> None:
    """Raise ConfigError unless the namespace is that of this rank's slice: blocks of another are never of use."""
    if (namespace.tp_rank, namespace.tp_size) != (ranks.rank, ranks.size):
        raise ConfigError(
            f"the namespace is slice {namespace.tp_rank} of {namespace.tp_size}, "
            f"but this is rank {ranks.rank} of {ranks.size}"
        )


def _codec_of(config: CacheConfig, namespace: Namespace) -> Codec:
    """Return the codec that is to be used. Raises ConfigError for one that does not fit dtype or namespace."""
    dtype = namespace.layout.dtype
    codec = default_codec(dtype) if config.codec == "auto" else codec_by_name(config.codec)
    if codec.is_lossy:
        float_format(dtype)
    if namespace.lossy_codec not in ("", codec.name):
        raise ConfigError(
            f"the namespace is of blocks that went through {namespace.lossy_codec}, the codec is {codec.name}",
            hint="leave lossy_codec to the cache",
        )
    return codec


def _count_by_tier(num_hot: int, block_size: int, hits: Iterable[Hit]) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Return blocks and tokens of `num_hot` hot blocks and of hits, by tier."""
    blocks = dict.fromkeys(Tier, 0)
    tokens = dict.fromkeys(Tier, 0)
    blocks[Tier.HOT] = num_hot
    tokens[Tier.HOT] = num_hot * block_size
    for hit in hits:
        blocks[hit.tier] += 1
        tokens[hit.tier] += hit.num_tokens
    return blocks, tokens


def save_cache_state(cache: TierCache, path: str | Path) -> SavedState:
    """Write everything that a cache holds into one file, atomically. See `TierCache.save_cache_state`."""
    return cache.save_cache_state(path)


def load_cache_state(cache: TierCache, path: str | Path) -> int:
    """Let a cache find the blocks of a state file; returns at once. See `TierCache.load_cache_state`."""
    return cache.load_cache_state(path)
