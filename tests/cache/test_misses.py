"""Every block that a cache could not serve is counted under one reason, and no failing disk ends a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from cold_blocks import damage_record
from pattern_engine import PatternEngine, tiny_layout

from tierkv.background.work_queue import WriteBehind
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import ColdEntry, EntryParent
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import BlockHash, Tier, hash_block
from tierkv.values.namespace import Namespace

NAMESPACE = Namespace(weights="w", layout=tiny_layout())
BLOCK_BYTES = tiny_layout().block_bytes
PROMPT = list(range(12))


class FailingStore(ColdStore):
    """A store whose index cannot be read any more once `fails` is set."""

    fails = False

    def lookup_many(self, block_hashes: Iterable[BlockHash]) -> list[ColdEntry | None]:
        self._fail()
        return super().lookup_many(block_hashes)

    def lookup_run(self, block_hashes: Iterable[BlockHash]) -> list[EntryParent | None]:
        self._fail()
        return super().lookup_run(block_hashes)

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        self._fail()
        return super().find_longest_run(parent, token_bytes)

    def _fail(self) -> None:
        if self.fails:
            raise StoreError("the disk is gone")


def open_store(path: Path) -> FailingStore:
    return FailingStore(path, quota_bytes=64 << 20, min_free_bytes=0)


def open_cache(store: ColdStore, *, min_partial_tokens: int = 1) -> TierCache:
    config = CacheConfig(
        block_size=4,
        hot_bytes=16 * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        min_partial_tokens=min_partial_tokens,
    )
    return TierCache(config, namespace=NAMESPACE, cold=store)


def fill(store: ColdStore) -> tuple[BlockHash, ...]:
    """Store the prompt's three blocks; return their hashes."""
    with open_cache(store) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()
        return cache.match(PROMPT).block_hashes


def reasons_of(cache: TierCache) -> dict[MissReason, int]:
    """Return what is not 0; all of them together are the misses."""
    stats = cache.stats()
    assert sum(stats.miss_reasons.values()) == stats.misses
    return {MissReason(name): count for name, count in stats.miss_reasons.items() if count}


def test_what_was_never_stored_is_absent(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, open_cache(store) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        assert reasons_of(cache) == {MissReason.ABSENT: 3}


def test_what_the_store_evicted_is_told_from_what_it_never_had(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        store.evict(to_bytes=0)
        with open_cache(store) as cache:
            cache.release(PatternEngine(cache).start([*PROMPT, 77, 78, 79, 80]))
            assert reasons_of(cache) == {MissReason.EVICTED: 3, MissReason.ABSENT: 1}


@pytest.mark.parametrize(("cut", "reason"), [(None, MissReason.CORRUPT), (150, MissReason.TRUNCATED)])
def test_a_damaged_block_is_counted_once_and_what_followed_it_is_gone(tmp_path, cut, reason) -> None:
    with open_store(tmp_path) as store:
        hashes = fill(store)
        damage_record(store, hashes[1], cut=cut)
        with open_cache(store) as cache:
            sequence = PatternEngine(cache).start([*PROMPT, 99])
            assert sequence.cached_tokens[Tier.COLD] == 4
            assert reasons_of(cache) == {reason: 1, MissReason.ABSENT: 2}
            cache.release(sequence)
            cache.check()


def test_a_damaged_block_leaves_the_store_behind_a_request_that_writes_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        hashes = fill(store)
        damage_record(store, hashes[1])
        with open_cache(store) as cache:
            cache.release(cache.acquire([*PROMPT, 99]))
            cache._offloader.flush()
            assert store.stats().damaged_blocks == 2 and store.stats().blocks == 1
            assert not store.notes.are_due


def test_a_run_too_short_to_be_worth_loading_is_counted_as_such(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        with open_cache(store, min_partial_tokens=3) as cache:
            sequence = PatternEngine(cache).start([*PROMPT[:6], 70, 71, 72])
            assert sequence.num_cached_tokens == 4
            assert reasons_of(cache) == {MissReason.TOO_SHORT: 1, MissReason.ABSENT: 1}
            cache.release(sequence)


def test_a_store_that_fails_is_a_miss_and_the_request_goes_on(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        with open_cache(store) as cache:
            store.fails = True
            assert cache.match(PROMPT).num_cached_tokens == 0
            cache.release(PatternEngine(cache).start(PROMPT))
            assert reasons_of(cache) == {MissReason.IO_ERROR: 1, MissReason.ABSENT: 2}
            store.fails = False
            cache.check()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_store_that_fails_within_a_run_of_lookups_is_asked_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    def fail_within(_: ColdStore, block_hashes: Iterable[BlockHash]) -> list[EntryParent | None]:
        for _, _ in zip(range(fails_at), block_hashes, strict=False):
            pass
        raise StoreError("the disk is gone")

    with open_store(tmp_path) as store:
        hashes = fill(store)
        with open_cache(store) as cache:
            monkeypatch.setattr(FailingStore, "lookup_run", fail_within)
            assert cache.match([*PROMPT, 99]).block_hashes == hashes, "no block of the chain is lost"


def test_a_request_finds_a_chain_in_one_snapshot_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        hashes = fill(store)
        with open_cache(store) as cache:
            monkeypatch.setattr(FailingStore, "lookup_many", lambda *_: pytest.fail("a snapshot for a single block"))
            found = cache.match([*PROMPT, 99])
            assert found.block_hashes == hashes and found.tokens[Tier.COLD] == len(PROMPT)
            assert cache.match([99, *PROMPT]).num_cached_tokens == 0, "the same for a prompt of which nothing is cached"


def test_a_request_hashes_each_of_its_blocks_once_where_the_store_has_evicted_none(tmp_path: Path) -> None:
    num_hashed = 0

    def count(parent: BlockHash, tokens: bytes) -> BlockHash:
        nonlocal num_hashed
        num_hashed += 1
        return hash_block(parent, tokens)

    config = CacheConfig(block_size=4, hot_bytes=16 * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES)
    with open_store(tmp_path) as store:
        fill(store)
        with TierCache(config, namespace=NAMESPACE, cold=store, hash_function=count) as cache:
            for prompt, num_asked in (([*PROMPT, 99], 3), ([99, *PROMPT], 1)):  # none after the first absent block
                num_hashed = 0
                cache.release(cache.acquire(prompt))
                assert num_hashed == num_asked


def test_the_last_whole_block_that_the_store_evicted_is_counted_so(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        assert store.evict(to_bytes=store.stats().live_bytes - 1).blocks == 1
        with open_cache(store) as cache:
            cache.release(PatternEngine(cache).start([*PROMPT, 99]))
            assert reasons_of(cache) == {MissReason.EVICTED: 1, MissReason.ABSENT: 1}


def test_records_that_lie_in_the_tree_itself_are_read_ahead_again_without_an_error(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        hashes = fill(store)
        damage_record(store, hashes[1], cut=150)
        for _ in range(2):  # the second time looks into the state that was read last
            store.read_ahead(hashes)


def test_a_fork_whose_copy_fails_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store, open_cache(store) as cache:
        sequence = PatternEngine(cache).start([*PROMPT, 99])
        with monkeypatch.context() as patch:
            patch.setattr(cache._tiers.memory.mover, "copy", _raise(StoreError("the copy failed")))
            with pytest.raises(StoreError):
                cache.fork(sequence)
        cache.release(sequence)
        cache.check()


def test_a_request_that_is_interrupted_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store, open_cache(store) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()
        with monkeypatch.context() as patch:
            patch.setattr(store.notes, "touch", _raise(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                cache.acquire([*PROMPT, 99])
        cache.evict(Tier.HOT)
        assert cache.stats().tiers[Tier.HOT].blocks == 0
        cache.check()


def test_a_cache_that_cannot_start_leaves_its_store_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CacheConfig(cold_path=tmp_path, block_size=4, hot_bytes=16 * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(WriteBehind, "__init__", _raise(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            TierCache(config, namespace=NAMESPACE)
    TierCache(config, namespace=NAMESPACE).close()


def _raise(problem: BaseException) -> Callable[..., None]:
    def call(*arguments: object, **options: object) -> None:
        raise problem

    return call


def test_misses_are_logged_by_reason_at_debug_level_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        hashes = fill(store)
        damage_record(store, hashes[1])
        for level, lines in (
            (logging.INFO, []),
            (logging.DEBUG, ["4 of 13 tokens found; blocks that are misses: 2 absent, 1 corrupt"]),
        ):
            with open_cache(store) as cache, caplog.at_level(level, "tierkv.requests"):
                caplog.clear()
                cache.release(cache.acquire([*PROMPT, 99]))
                assert [each.getMessage() for each in caplog.records if "misses" in each.getMessage()] == lines
            fill(store)
            damage_record(store, hashes[1])


def test_a_request_that_misses_nothing_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        with open_cache(store) as cache, caplog.at_level(logging.DEBUG, "tierkv.requests"):
            cache.release(cache.acquire(PROMPT))
            assert "misses" not in caplog.text


def test_no_lock_is_held_while_misses_are_logged(tmp_path: Path) -> None:
    held: list[bool] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            held.append(cache._tiers.changed.is_owned())

    logger, watch = logging.getLogger("tierkv.requests.statistics"), Watch()
    before = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.DEBUG)
    try:
        with open_store(tmp_path) as store, open_cache(store) as cache:
            cache.release(cache.acquire(PROMPT))
    finally:
        logger.removeHandler(watch)
        logger.setLevel(before)
    assert held == [False]
