"""Caches of several machines over one remote tier: what one has computed another finds, and no fault costs a token.

A PatternEngine compares every cached token with what it must be, so a wrong hit fails whatever its cause.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pattern_engine import PatternEngine, open_tiny, record_passes
from remote_servers import Redis, SlowProxy, start_redis, wait_until

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.transfer.recompute_or_load import LoadKind, RecomputeOrLoad
from tierkv.values.block import Tier
from tierkv.values.remote_stats import RemoteStats

PROMPT = list(range(100, 140))  # ten blocks
SECRET = "pass-word-42"


class Machines:
    """Opens caches, each with a store of its own, over one remote tier."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._opened: list[TierCache] = []

    def open(self, name: str, **options: Any) -> TierCache:
        cache = open_tiny(self._folder / name, **{"remote": self.url, **options})
        self._opened.append(cache)
        remotes = cache._tiers.remotes
        assert remotes is not None and remotes.flush(timeout_s=20)  # the first connection
        return cache

    def close(self) -> None:
        for cache in self._opened:
            cache.close()


def settled(cache: TierCache) -> RemoteStats:
    """Wait for all that runs in the background; return the counters of the remote tier."""
    cache.flush()
    assert cache._tiers.remotes is not None and cache._tiers.remotes.flush(timeout_s=20)
    return cache.stats().remotes[0]


def run(cache: TierCache, prompt: list[int] = PROMPT) -> int:
    """Run a prompt; return how many of its tokens were cached. The engine compares them."""
    sequence = PatternEngine(cache).start([*prompt, 99])
    cached = sequence.num_cached_tokens
    cache.release(sequence)
    return cached


@pytest.fixture(params=["redis", "dir"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "shared").mkdir()
    is_redis = request.param == "redis"
    url = request.getfixturevalue("redis_server").url if is_redis else f"dir://{tmp_path / 'shared'}"
    url += "?base_s=2"  # a machine that runs other tests may be slow
    opened = Machines(tmp_path, url)
    yield opened
    opened.close()


@pytest.fixture
def on_own_redis(own_redis: Redis, tmp_path: Path) -> Iterator[Machines]:
    opened = Machines(tmp_path, own_redis.url)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cold_path": None},
        {"hot": 12, "warm": 4},
        {"compute_or_load": False},
        {"num_io_threads": 1},
    ],
)
def test_what_one_machine_has_computed_another_finds_also_when_the_first_is_gone(
    machines: Machines, options: dict[str, Any]
) -> None:
    first = machines.open("first", **options)
    assert run(first) == 0
    assert settled(first).counters["written"] == 10
    first.close()
    second = machines.open("second", **options)
    assert second.match(PROMPT).num_cached_tokens == 40
    assert run(second) == 40
    assert settled(second).counters["read_hits"] >= 10
    second.check()


def test_hits_are_kept_in_the_store_of_this_machine(machines: Machines) -> None:
    run(machines.open("first"))
    machines.close()
    second = machines.open("second")
    assert run(second) == 40
    counters = settled(second).counters
    second.close()
    with open_tiny(machines._folder / "second") as alone:
        assert run(alone) == 40
    assert counters.get("written", 0) == 0, "what came from the remote tier is not sent back"


def test_a_prompt_that_this_machine_has_costs_no_call(machines: Machines) -> None:
    first = machines.open("first")
    run(first)
    assert run(first) == 40
    before = settled(first).latencies["prefix"].count
    for _ in range(5):
        assert run(first) == 40
    assert settled(first).latencies["prefix"].count == before


def test_a_longer_prompt_is_found_in_both_places(machines: Machines) -> None:
    first = machines.open("first")
    run(first, [*PROMPT, *range(200, 240)])
    settled(first)
    second = machines.open("second")
    run(second, PROMPT[:20])
    assert run(second, [*PROMPT, *range(200, 240), *range(500, 520)]) == 80
    assert settled(second).counters["read_hits"] == 20, "five blocks at the first prompt, the rest at the second"
    second.check()  # what was pinned before the remote tier was asked is unpinned


def test_a_store_that_is_older_than_the_remote_tier_is_published_when_it_is_used(machines: Machines) -> None:
    with open_tiny(machines._folder / "first") as alone:
        run(alone)
    first = machines.open("first")
    assert run(first) == 40
    assert settled(first).counters["published"] == 10
    assert run(machines.open("second")) == 40


def test_prefetching_reads_from_the_remote_tier(machines: Machines) -> None:
    first = machines.open("first")
    run(first)
    settled(first)
    second = machines.open("second", warm=32)
    assert second.prefetch(PROMPT).result() == 10
    assert second.match(PROMPT).blocks[Tier.WARM] == 10
    assert run(second) == 40


def test_partial_blocks_stay_local(machines: Machines) -> None:
    first = machines.open("first")
    first.release(PatternEngine(first).start(PROMPT[:10], partial_block=True))
    assert settled(first).counters["written"] == 2
    assert first.match(PROMPT[:10]).num_cached_tokens == 10
    assert machines.open("second").match(PROMPT[:10]).num_cached_tokens == 8


def second_machine(machines: Machines) -> tuple[TierCache, RecomputeOrLoad]:
    """Have one machine compute the prompt; open the cache of another, and return it with its choice."""
    first = machines.open("first")
    run(first)
    settled(first)
    second = machines.open("second", piece_tokens=8)
    choice = second._acquirer._choice
    assert choice
    return second, choice


def test_loads_from_a_remote_tier_are_measured_apart(machines: Machines) -> None:
    second, choice = second_machine(machines)
    record_passes(second, {4: 1e-6, 40: 1e-5})
    choice.load_costs[LoadKind(in_memory=False, is_remote=True)].add(10, 100.0)
    choice.load_costs[LoadKind(in_memory=False, overlaps=True, is_remote=True)].add(10, 100.0)
    sequence = second.acquire([*PROMPT, 99], overlap=True)
    assert sequence.num_cached_tokens == 0, "computing is faster than this network"
    second.release(sequence)
    choice.load_costs.clear()
    assert run(second) == 40


def test_a_remote_tier_that_is_slower_than_computing_is_not_asked_until_that_was_long_ago(machines: Machines) -> None:
    second, choice = second_machine(machines)
    record_passes(second, {4: 1e-3, 40: 1e-2})

    def asked() -> int:
        prefix = settled(second).latencies.get("prefix")
        return prefix.count if prefix else 0

    for overlaps in (False, True):
        choice.load_costs[LoadKind(in_memory=False, overlaps=overlaps, is_remote=True)].add(10, 0.02)
    before = asked()
    second.release(second.acquire([*PROMPT, 99], overlap=True))
    assert asked() == before
    for _ in range(60):
        second.release(second.acquire([*PROMPT, 99], overlap=True))
    assert asked() > before, "it may be faster now"


def test_overlapping_loads_and_computing_compares_equal(machines: Machines) -> None:
    second, choice = second_machine(machines)
    choice.load_costs[LoadKind(in_memory=False, is_remote=True)].add(10, 5.0)
    sequence = PatternEngine(second).start([*PROMPT, 99], overlap=True)
    assert choice.load_costs[LoadKind(in_memory=False, overlaps=True, is_remote=True)].points()
    second.release(sequence)
    settled(second)
    second.check()
    assert run(second) == 40


def zeros(server: Redis) -> None:
    for name in server.command("KEYS", "*"):
        server.command("SET", name, bytes(server.command("STRLEN", name)))


def cut(server: Redis) -> None:
    for name in server.command("KEYS", "*"):
        server.command("SET", name, server.command("GETRANGE", name, 0, 300))


def swap(server: Redis) -> None:
    names = sorted(server.command("KEYS", "*"))
    values = [server.command("GET", name) for name in names]
    for name, value in zip(names, values[1:] + values[:1], strict=True):
        server.command("SET", name, value)


def flip(server: Redis) -> None:
    for name in server.command("KEYS", "*"):
        value = np.frombuffer(server.command("GET", name), dtype=np.uint8).copy()
        value[-3] ^= 4
        server.command("SET", name, value.tobytes())


def other_types(server: Redis) -> None:
    for name in server.command("KEYS", "*"):
        server.command("DEL", name)
        server.command("RPUSH", name, "a")


def drop_parents(server: Redis) -> None:
    for name in sorted(server.command("KEYS", "*"))[::2]:
        server.command("DEL", name)


def grow(server: Redis) -> None:
    for name in server.command("KEYS", "*"):
        server.command("SETRANGE", name, 8 << 20, "x")


@pytest.mark.parametrize("fault", [zeros, cut, swap, flip, other_types, drop_parents, grow])
def test_values_that_lie_cost_misses_and_are_replaced(
    redis_server: Redis, tmp_path: Path, fault: Callable[[Redis], None]
) -> None:
    machines = Machines(tmp_path, redis_server.url)
    try:
        first = machines.open("first")
        run(first)
        settled(first)
        fault(redis_server)
        second = machines.open("second")
        assert run(second) in (range(0, 40, 4) if fault is drop_parents else [0])
        counters = settled(second).counters
        misses = sum(count for name, count in counters.items() if name.startswith("miss_"))
        assert misses >= (0 if fault is drop_parents else 1)
        third = machines.open("third")  # the second has read as many blocks as its warm tier holds, and replaced those
        assert run(third) >= 28
        settled(third)
        fourth = machines.open("fourth")
        assert run(fourth) == 40, "what was damaged has been replaced"
        fourth.check()
    finally:
        machines.close()


def test_a_stopped_server_costs_misses_then_nothing_and_is_used_again(own_redis: Redis, on_own_redis: Machines) -> None:
    first = on_own_redis.open("first")
    run(first)
    settled(first)
    second = on_own_redis.open("second")
    own_redis.pause()
    for number in range(3):
        begin = time.monotonic()
        assert run(second, [number, *PROMPT]) == 0
        assert time.monotonic() - begin < 5
    wait_until(lambda: not second.stats().remotes[0].is_up)
    asked = second.stats().remotes[0].latencies["prefix"].count
    assert run(second, [7, *PROMPT]) == 0
    assert second.stats().remotes[0].latencies["prefix"].count == asked, "no request waits for a server that is down"
    own_redis.resume()
    wait_until(lambda: second.stats().remotes[0].is_up)
    assert run(second) == 40


def test_a_server_that_was_killed_and_comes_back_empty_is_filled_again(
    own_redis: Redis, on_own_redis: Machines
) -> None:
    first = on_own_redis.open("first")
    run(first)
    settled(first)
    own_redis.kill()
    for number in range(4):
        run(first, [number, *PROMPT])
    own_redis.start()
    wait_until(lambda: first.stats().remotes[0].is_up)
    assert run(first, [50, *PROMPT]) == 0
    settled(first)
    assert run(on_own_redis.open("second"), [50, *PROMPT]) == 40


def test_a_server_that_stops_between_lookup_and_read_costs_misses(own_redis: Redis, on_own_redis: Machines) -> None:
    first = on_own_redis.open("first")
    run(first)
    settled(first)
    second = on_own_redis.open("second")
    assert second.match(PROMPT).num_cached_tokens == 40
    own_redis.pause()
    begin = time.monotonic()
    assert run(second) == 0
    assert time.monotonic() - begin < 10
    assert second.stats().miss_reasons.get("remote", 0) > 0
    own_redis.resume()
    second.check()


def test_a_network_that_delays_and_drops_costs_no_token(redis_server: Redis, tmp_path: Path) -> None:
    proxy = SlowProxy(redis_server.port, delay_s=0.01, bytes_per_s=125e6)
    machines = Machines(tmp_path, f"redis://127.0.0.1:{proxy.port}")
    try:
        first = machines.open("first")
        run(first)
        settled(first)
        second = machines.open("second")
        assert run(second) == 40
        third = machines.open("third")
        proxy.drops = True
        assert run(third) == 0
        proxy.drops = False
        wait_until(lambda: third.stats().remotes[0].is_up)
        assert run(third, [*PROMPT, *range(60, 72)]) == 40
        third.check()
    finally:
        machines.close()
        proxy.close()


def test_a_full_server_takes_no_writes_and_costs_nothing(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis", "--maxmemory-policy", "noeviction") as server:
        machines = Machines(tmp_path, server.url)
        first = machines.open("first")
        server.command("CONFIG", "SET", "maxmemory", 1)
        assert run(first) == 0 and run(first) == 40
        counters = settled(first).counters
        assert counters["failed_oom"] == 1 and counters["dropped_write_full"] >= 1
        assert first.stats().remotes[0].is_up
        machines.close()


def test_a_server_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    machines = Machines(tmp_path, "redis://127.0.0.1:1")
    first = machines.open("first")
    assert run(first) == 0 and run(first) == 40
    assert not settled(first).is_up and "prefix" not in settled(first).latencies
    machines.close()


def test_no_password_is_in_a_repr_a_log_or_a_message(
    redis_server: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://user:{SECRET}@127.0.0.1:{redis_server.port}"
    config = CacheConfig(remote=url)
    assert SECRET not in repr(config) + str(config)
    machines = Machines(tmp_path, url)
    cache = machines.open("first")
    run(cache)
    stats = settled(cache)
    machines.close()
    assert not stats.is_up and SECRET not in repr(stats)
    assert "is not asked for a while" in caplog.text and SECRET not in caplog.text


def test_a_url_that_cannot_be_used_is_refused_at_opening(tmp_path: Path) -> None:
    for url in ("ftp://host", "redis://host:${NO_SUCH_VARIABLE}x", "redis://u:${NO_SUCH_VARIABLE}@host"):
        with pytest.raises(ConfigError), contextlib.closing(open_tiny(tmp_path, remote=url)):
            pass
    with open_tiny(tmp_path) as cache:
        run(cache)  # nothing of the failed openings is left open
