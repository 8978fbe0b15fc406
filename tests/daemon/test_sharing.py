"""Several caches over one daemon: what one computes the others find, byte for byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from daemon_process import BLOCK_BYTES, OpenCache, Start
from one_command import run_command
from pattern_engine import PatternEngine

from tierkv.profiling.tracker import MemoryTracker
from tierkv.values.block import Tier, hash_block
from tierkv.values.events import EventKind


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def test_what_one_cache_computes_another_finds_in_the_warm_tier(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    first, second = open_cache(), open_cache()
    first.release(PatternEngine(first).start(ids(14), partial_block=True))
    first.flush()
    found = PatternEngine(second).start([*ids(14), 99])
    assert found.cached_tokens == {Tier.HOT: 0, Tier.WARM: 14, Tier.COLD: 0}
    second.release(found)
    for cache in (first, second):
        cache.check()
        cache.close()
    status = daemon.status()
    assert (status.leased_slots, status.reserved_slots, status.clients) == (0, 0, 1)


def test_a_new_daemon_on_the_same_store_serves_from_the_cold_tier(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    cache.release(PatternEngine(cache).start(ids(14), partial_block=True))
    cache.flush()
    cache.close()
    daemon.kill()
    daemon.start()
    again = open_cache()
    found = PatternEngine(again).start([*ids(14), 99])
    assert found.cached_tokens[Tier.COLD] == 14
    again.release(found)
    third = open_cache()
    found = PatternEngine(third).start([*ids(14), 98])
    assert found.cached_tokens[Tier.WARM] == 14
    third.release(found)


def test_match_pin_evict_and_stats_go_through_the_daemon(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    cache, other = open_cache(), open_cache()
    cache.release(PatternEngine(cache).start(ids(12)))
    cache.flush()
    assert other.match(ids(12)).blocks == {Tier.HOT: 0, Tier.WARM: 3, Tier.COLD: 0}
    assert other.stats().tiers[Tier.WARM].blocks == 3
    assert other.stats().tiers[Tier.COLD].blocks == 3
    assert other.pin(ids(8)) == 2
    assert other.evict(Tier.WARM) == 1
    assert other.match(ids(12)).blocks == {Tier.HOT: 0, Tier.WARM: 2, Tier.COLD: 1}
    assert other.unpin(ids(8)) == 2
    assert other.evict(Tier.WARM) == 2


def test_a_state_file_is_saved_and_loaded_by_the_daemon(
    start_daemon: Start, open_cache: OpenCache, tmp_path: Path
) -> None:
    daemon = start_daemon(store=False)
    cache = open_cache()
    cache.release(PatternEngine(cache).start(ids(14), partial_block=True))
    assert cache.save_cache_state(tmp_path / "state").blocks == 4
    cache.close()
    daemon.kill()
    daemon.start()
    cache = open_cache()
    assert cache.match(ids(14)).num_cached_tokens == 0
    assert cache.load_cache_state(tmp_path / "state") == 4
    assert cache.load_cache_state(tmp_path / "state") == 4
    assert cache.save_cache_state(tmp_path / "again").blocks == 4
    found = PatternEngine(cache).start([*ids(14), 1])
    assert found.cached_tokens[Tier.COLD] == 14
    cache.release(found)


@pytest.mark.parametrize("other", [{"weights": "x"}, {"salt": "tenant"}, {"block_size": 8}])
def test_another_model_salt_or_block_size_has_its_own_blocks(
    start_daemon: Start, open_cache: OpenCache, other: dict[str, object]
) -> None:
    daemon = start_daemon()
    cache, stranger = open_cache(), open_cache(**other)
    cache.release(PatternEngine(cache).start(ids(16)))
    cache.flush()
    assert stranger.match(ids(16)).num_cached_tokens == 0
    stranger.release(PatternEngine(stranger).start(ids(16)))
    stranger.flush()
    assert len(daemon.status().tenants) == 2
    for each in (open_cache(), open_cache(**other)):
        assert each.match(ids(16)).tokens[Tier.WARM] == 16
        each.release(PatternEngine(each).start([*ids(16), 5]))


def cut_to_8_bits(parent: bytes, tokens: bytes) -> bytes:
    return hash_block(parent, tokens)[:1] * 16


@pytest.mark.parametrize("has_store", [True, False])
def test_forced_hash_collisions_cost_misses_and_never_a_wrong_block(
    start_daemon: Start, open_cache: OpenCache, has_store: bool
) -> None:
    daemon = start_daemon(slots=24, store=has_store)
    for _ in range(2):
        caches = [open_cache(hot=12, hash_function=cut_to_8_bits) for _ in range(2)]
        engines = [PatternEngine(cache) for cache in caches]
        for i in range(200):
            engine = engines[i % 2]
            sequence = engine.start(
                [i % 5, i % 3, i % 7, i % 2, i % 5, i % 3, 1, 2, i % 2, 3, 3, 3, 3], partial_block=True
            )
            engine.check(sequence)
            engine.cache.release(sequence)
            engine.cache.flush()
        for cache in caches:
            cache.check()
            assert cache.stats().hits > 0
            cache.close()
    status = daemon.status()
    assert (status.leased_slots, status.reserved_slots) == (0, 0)


FIRST, FORGED, NEXT = [1, 2, 3, 4], [1, 6, 7, 8], [9, 9, 9, 9]


def first_token_alone(parent: bytes, tokens: bytes) -> bytes:
    """FIRST and FORGED have one hash."""
    return hash_block(parent, tokens[:4] + len(tokens).to_bytes(4, "little"))


@pytest.mark.parametrize("rest", [[*NEXT, 0], [9, 9]])
def test_a_forged_block_gets_no_other_ones_children_from_slab_or_store(
    start_daemon: Start, open_cache: OpenCache, rest: list[int]
) -> None:
    daemon = start_daemon()

    def serve(*prompts: list[int]) -> None:
        """Let a new cache serve prompts; every byte that it is given is checked."""
        cache = open_cache(hash_function=first_token_alone)
        for prompt in prompts:
            cache.release(PatternEngine(cache).start(prompt, partial_block=True))
            cache.flush()
        cache.check()
        cache.close()

    def restart() -> None:
        daemon.kill()
        daemon.start()

    serve([*FORGED, 0])
    restart()  # the store has FORGED, the slab nothing
    serve([*FIRST, *rest], [*FIRST, *rest, 0])
    serve([*FORGED, *rest, 0])
    restart()
    serve([*FIRST, 0], [*FIRST, *rest, 0])
    serve([*FORGED, *rest, 0])


def test_a_daemon_and_a_cache_without_one_read_each_others_stores(
    start_daemon: Start, open_cache: OpenCache, short_path: Path
) -> None:
    daemon = start_daemon()
    cache = open_cache()
    cache.release(PatternEngine(cache).start(ids(14), partial_block=True))
    cache.flush()
    cache.close()
    daemon.kill()
    alone = open_cache(socket=None, cold_path=short_path / "store", warm_bytes=16 * BLOCK_BYTES)
    found = PatternEngine(alone).start([*ids(14), 99, 98, 97, 96], partial_block=True)
    assert found.cached_tokens[Tier.COLD] == 14
    alone.release(found)
    alone.close()
    daemon.start()
    again = open_cache()
    found = PatternEngine(again).start([*ids(14), 99, 98, 97, 96, 95])
    assert found.cached_tokens[Tier.COLD] == 18
    again.release(found)


def test_more_blocks_than_the_slab_holds_pass_through_it(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon(slots=16)
    caches = [open_cache(hot=8), open_cache(hot=8)]
    seen = dict.fromkeys(Tier, 0)
    for round_number in range(3):
        for step, i in enumerate([*range(12), 11, 10]):
            cache = caches[(step + round_number) % 2]
            sequence = PatternEngine(cache).start([*ids(12, start=100 * i), 7], partial_block=True)
            for tier, tokens in sequence.cached_tokens.items():
                seen[tier] += tokens
            cache.release(sequence)
            cache.check()
            cache.flush()
    assert seen[Tier.WARM] and seen[Tier.COLD]
    assert daemon.status().counters["evicted_blocks"] > 0


def test_top_shows_a_daemon_and_its_store(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    cache.release(PatternEngine(cache).start(list(range(13))))
    cache.flush()
    shown = run_command("top", "--socket", daemon.socket, "--once").out
    assert "a daemon with 1 clients" in shown and "published blocks" in shown
    assert "cold" in shown and "12" in shown


def test_an_observer_of_a_cache_over_a_daemon_counts_as_the_cache_does(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    start_daemon(slots=8)
    cache = open_cache(hot=8)
    tracker = MemoryTracker()
    tracker.observe(cache)
    engine = PatternEngine(cache)
    for _ in range(2):
        for start in range(0, 400, 100):
            cache.release(engine.start(ids(13, start)))
            cache.flush()
    seen = Counter((event.kind, event.tier) for event in tracker.allocation_history)
    stats = cache.stats()
    assert {tier: seen[EventKind.HIT, tier] for tier in Tier} == {t: each.hits for t, each in stats.tiers.items()}
    assert seen[EventKind.MISS, None] == stats.misses and seen[EventKind.SKIP, None] == stats.skipped_writes
    assert seen[EventKind.EVICT, Tier.HOT] == stats.tiers[Tier.HOT].evictions > 0
    assert seen[EventKind.DEMOTE, Tier.WARM] > 0
