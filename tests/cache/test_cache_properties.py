"""Thousands of random requests against pools far too small: every cached byte is checked, and every invariant."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pattern_engine import PatternEngine, tiny_warm

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError
from tierkv.profiling.tracker import MemoryTracker
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.transfer.offload import Offloading
from tierkv.values.block import HashFunction, Tier, hash_block
from tierkv.values.events import EventKind
from tierkv.values.namespace import Namespace

BLOCKS = ([0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1])  # the first two are forgeries of each other, see `forged_hash`
chains = st.builds(
    lambda blocks, rest: [token for block in blocks for token in block] + rest,
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3),
    st.sampled_from([[0], [0, 0]]),
)
prompts = chains | st.lists(st.integers(0, 2), min_size=1, max_size=22)  # three token ids: prefixes are shared often


def weak_hash(parent: bytes, tokens: bytes) -> bytes:
    """A hash of 5 bits, so that collisions happen all the time."""
    return bytes([hash_block(parent, tokens)[0] & 31]) * 16


def forged_hash(parent: bytes, tokens: bytes) -> bytes:
    """A hash of which forgeries are known: of a block's tokens it takes the first alone.

    So other blocks of one hash meet in all places of a chain, and everything else is as it is with a good hash.
    (With `weak_hash` nearly all that is stored collides: chains behind a forged block hardly come to be.)
    """
    return hash_block(parent, tokens[:4] + len(tokens).to_bytes(4, "little"))


class CacheMachine(RuleBasedStateMachine):
    """Acquire, decode, fork, commit, release, pin, evict and reopen, in any order."""

    @initialize(
        hot=st.integers(6, 11),
        warm=st.integers(4, 8),
        has_cold=st.booleans(),
        write_through=st.booleans(),
        hash_function=st.sampled_from([hash_block, weak_hash, forged_hash]),
        warm_codec=st.sampled_from(["raw", "windows"]),
    )
    def start(
        self, hot: int, warm: int, has_cold: bool, write_through: bool, hash_function: HashFunction, warm_codec: str
    ) -> None:
        self.layout, warm_bytes = tiny_warm(warm, warm_codec)
        self.directory = tempfile.TemporaryDirectory()
        self.config = CacheConfig(
            cold_path=Path(self.directory.name) / "store" if has_cold else None,
            block_size=4,
            hot_bytes=hot * self.layout.block_bytes,
            warm_bytes=warm_bytes,
            warm_codec=warm_codec,
            piece_tokens=4,
            cold_bytes=16 << 20,
            min_free_bytes=0,
            write_through=write_through,
        )
        self.hash_function = hash_function
        self.open()

    def open(self) -> None:
        namespace = Namespace(weights="w", layout=self.layout)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cache = TierCache(self.config, namespace=namespace, device=device, hash_function=self.hash_function)
        self.watcher = MemoryTracker(history_size=100_000, sample_every=1)
        self.watcher.observe(self.cache)
        self.engine = PatternEngine(self.cache)
        self.running: list[Sequence] = []

    @rule(prompt=prompts, partial_block=st.booleans(), overlap=st.booleans())
    def request(self, prompt: list[int], partial_block: bool, overlap: bool) -> None:
        try:
            self.running.append(self.engine.start(prompt, partial_block=partial_block, overlap=overlap))
        except CapacityError:
            assert self.running or self.cache.stats().tiers[Tier.HOT].blocks

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), tokens=prompts, partial_block=st.booleans())
    def decode(self, which: int, tokens: list[int], partial_block: bool) -> None:
        sequence = self.running[which % len(self.running)]
        before = sequence.num_tokens
        try:
            self.engine.decode(sequence, tokens, partial_block=partial_block)
        except CapacityError:
            assert sequence.num_tokens == before

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        try:
            self.running.append(self.cache.fork(self.running[which % len(self.running)]))
        except CapacityError:
            pass

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        self.cache.release(self.running.pop(which % len(self.running)))

    @rule(prompt=prompts)
    def pin(self, prompt: list[int]) -> None:
        self.cache.flush()  # or a block may arrive below between the two calls
        pinned = self.cache.pin(prompt)
        assert pinned == sum(self.cache.match(prompt).blocks.values())

    @rule(prompt=prompts)
    def prefetch(self, prompt: list[int]) -> None:
        self.cache.prefetch(prompt).result()

    @rule(prompt=prompts)
    def unpin(self, prompt: list[int]) -> None:
        self.cache.unpin(prompt)

    @rule(tier=st.sampled_from([Tier.HOT, Tier.WARM]), count=st.integers(1, 4))
    def evict(self, tier: Tier, count: int) -> None:
        self.cache.evict(tier, count)

    @rule(num_blocks=st.integers(6, 11))
    def limit(self, num_blocks: int) -> None:
        excess = self.cache.blocks.set_limit(num_blocks)
        hot = self.cache.stats().tiers[Tier.HOT]
        assert hot.blocks <= self.cache.blocks.limit + excess

    @rule(threshold=st.floats(0.1, 1), ratio=st.floats(0.1, 1), is_wanted=st.booleans())
    def offload(self, threshold: float, ratio: float, is_wanted: bool) -> None:
        self.cache.blocks.set_offloading(Offloading(threshold=threshold, ratio=ratio) if is_wanted else None)

    @rule(which=st.sets(st.integers(0, 9)))
    def defragment(self, which: set[int]) -> None:
        """Move blocks below some of the running sequences: every byte of all is checked afterwards."""
        between = [sequence for at, sequence in enumerate(self.running) if at in which]
        others = {id(each): list(each.block_table) for each in self.running if each not in between}
        report = self.cache.defragment(between)
        assert report.breaks_after <= report.breaks_before or report.num_fixed
        assert all(list(each.block_table) == others[id(each)] for each in self.running if id(each) in others)

    @rule()
    def forget(self) -> None:
        """Leave nothing in memory that may go: what comes next meets the store's blocks with an empty index."""
        while self.running:
            self.cache.release(self.running.pop())
        self.cache.flush()
        for tier in (Tier.HOT, Tier.WARM):
            self.cache.evict(tier)

    @precondition(lambda self: self.config.cold_path)
    @rule()
    def reopen(self) -> None:
        for sequence in self.running:
            self.cache.release(sequence)
        self.cache.close()
        self.open()

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for sequence in self.running:
            self.engine.check(sequence)
        self.check_watcher()

    def check_watcher(self) -> None:
        """Raise AssertionError unless an observer knows which block lies where, and has counted as the cache has."""
        for tier in (Tier.HOT, Tier.WARM):
            owners = enumerate(self.cache._tiers.index.pool(tier).owners)
            there = {f"{tier.value}:{slot}": owner.block_hash for slot, owner in owners if owner}
            blocks = self.watcher.allocations.values()
            assert there == {
                each.allocation_id: each.block_hash for each in blocks if each.purpose == f"{tier.value} block"
            }
        stats = self.cache.stats()
        seen = Counter((event.kind, event.tier) for event in self.watcher.allocation_history)
        assert not self.watcher.dropped_events
        assert seen[EventKind.MISS, None] == stats.misses
        assert seen[EventKind.SKIP, None] == stats.skipped_writes
        for tier in Tier:
            assert tier not in stats.tiers or seen[EventKind.HIT, tier] == stats.tiers[tier].hits
        for tier in (Tier.HOT, Tier.WARM):
            assert seen[EventKind.EVICT, tier] == stats.tiers[tier].evictions

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            self.directory.cleanup()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class SharedStoreMachine(RuleBasedStateMachine):
    """Two caches on one store, whose memories come to differ: each holds forgeries of what the other one stored."""

    @initialize(write_through=st.booleans())
    def start(self, write_through: bool) -> None:
        layout, warm_bytes = tiny_warm(8, "raw")
        config = CacheConfig(
            block_size=4, hot_bytes=12 * layout.block_bytes, warm_bytes=warm_bytes, write_through=write_through
        )
        self.directory = tempfile.TemporaryDirectory()
        self.store = ColdStore(Path(self.directory.name), quota_bytes=16 << 20, min_free_bytes=0)
        namespace = Namespace(weights="w", layout=layout)
        self.engines = [
            PatternEngine(TierCache(config, namespace=namespace, cold=self.store, hash_function=forged_hash))
            for _ in range(2)
        ]

    @rule(which=st.integers(0, 1), prompt=chains, partial_block=st.booleans(), overlap=st.booleans())
    def request(self, which: int, prompt: list[int], partial_block: bool, overlap: bool) -> None:
        engine = self.engines[which]
        engine.cache.release(
            engine.start(prompt, partial_block=partial_block, overlap=overlap)
        )  # checks every byte that was cached
        engine.cache.flush()

    @rule(which=st.integers(0, 1))
    def forget(self, which: int) -> None:
        for tier in (Tier.HOT, Tier.WARM):
            self.engines[which].cache.evict(tier)
            self.engines[which].cache.flush()

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "store"):
            return
        for engine in self.engines:
            engine.cache.check()
        self.store.check()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for engine in self.engines:
                engine.cache.close()
            self.store.close()
            self.directory.cleanup()


TestSharedStoreMachine = SharedStoreMachine.TestCase
TestSharedStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
