"""Daemons of two machines over one remote tier: what the clients of one compute the clients of the other find."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_fixtures import short_path, start_daemon
from daemon_process import Daemon, Start
from pattern_engine import PatternEngine, tiny_layout
from remote_servers import Redis, wait_until
from stored_blocks import NAMESPACE, TOKENS, load, save

from tierkv import BlockStore, BlockStoreConfig
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.messages import Done, Flush
from tierkv.errors import ConfigError
from tierkv.values.namespace import Namespace

__all__ = ["short_path", "start_daemon"]

PROMPT = list(range(100, 140))  # ten blocks


def open_client(daemon: Daemon) -> TierCache:
    layout = tiny_layout()
    config = CacheConfig(socket=daemon.socket, block_size=4, hot_bytes=32 * layout.block_bytes)
    return TierCache(config, namespace=Namespace(weights="w", layout=layout))


def run(cache: TierCache, prompt: list[int] = PROMPT) -> int:
    """Run a prompt; return how many of its tokens were cached. The engine compares them."""
    sequence = PatternEngine(cache).start([*prompt, 99])
    cached = sequence.num_cached_tokens
    cache.release(sequence)
    return cached


def counter(daemon: Daemon, name: str) -> int:
    return daemon.status().counters.get(name, 0)


def two(start_daemon: Start, url: str, short_path: Path) -> tuple[Daemon, Daemon]:
    """Start the daemons of two machines. The caller ends the second."""
    first = start_daemon(remote=url, socket="a.sock")
    second = Daemon(short_path / "b.sock", short_path / "other", 64, {"remote": url}).start()
    wait_until(lambda: counter(first, "remotes_up") == counter(second, "remotes_up") == 1)
    return first, second


def test_two_daemons_share_blocks(start_daemon: Start, short_path: Path, redis_server: Redis) -> None:
    first, second = two(start_daemon, redis_server.url, short_path)
    try:
        with open_client(first) as cache:
            assert run(cache) == 0
            cache.flush()
        wait_until(lambda: counter(first, "remote_written") == 10)
        first.kill()
        with open_client(second) as cache:
            assert cache.match(PROMPT).num_cached_tokens == 40
            assert run(cache) == 40
        assert counter(second, "remote_read_hits") == 10
        with open_client(second) as cache:
            assert run(cache) == 40
        assert counter(second, "remote_read_hits") == 10, "they are in its own tiers by now"
        redis_server.command("FLUSHALL")
        with DaemonClient(second.socket) as client:
            client.call(Flush(), Done)
        second.kill()
        second.start()
        with open_client(second) as cache:
            assert run(cache) == 40, "what came over the network lies in the store"
    finally:
        second.kill()


def test_block_stores_over_two_daemons_share_blocks(start_daemon: Start, short_path: Path, redis_server: Redis) -> None:
    first, second = two(start_daemon, redis_server.url, short_path)
    try:
        with BlockStore(BlockStoreConfig(socket=first.socket), namespace=NAMESPACE) as store:
            keys = list(store.keys(TOKENS))[:16]  # a client may reserve a quarter of the memory
            assert save(store, keys) == 16
            store.flush()
        wait_until(lambda: counter(first, "remote_written") == 16)
        with BlockStore(BlockStoreConfig(socket=second.socket), namespace=NAMESPACE) as store:
            assert store.contains(keys) == 16
            assert load(store, keys) == (16, [])
    finally:
        second.kill()


def test_a_prefetch_reads_from_the_remote_tier(start_daemon: Start, short_path: Path, redis_server: Redis) -> None:
    first, second = two(start_daemon, redis_server.url, short_path)
    try:
        with open_client(first) as cache:
            run(cache)
            cache.flush()
        wait_until(lambda: counter(first, "remote_written") == 10)
        with open_client(second) as cache:
            cache.prefetch(PROMPT)
            wait_until(lambda: counter(second, "prefetched_blocks") == 10)
            assert run(cache) == 40
    finally:
        second.kill()


def test_a_stopped_remote_server_costs_the_clients_misses(
    start_daemon: Start, short_path: Path, own_redis: Redis
) -> None:
    first, second = two(start_daemon, own_redis.url, short_path)
    try:
        with open_client(first) as cache:
            run(cache)
            cache.flush()
        wait_until(lambda: counter(first, "remote_written") == 10)
        own_redis.pause()
        with open_client(second) as cache:
            for number in range(4):
                assert run(cache, [number, *PROMPT]) == 0
            assert run(cache, [0, *PROMPT]) == 40
        wait_until(lambda: counter(second, "remotes_up") == 0)
        own_redis.resume()
        wait_until(lambda: counter(second, "remotes_up") == 1)
        with open_client(second) as cache:
            assert run(cache) == 40
    finally:
        second.kill()


def test_a_daemon_with_remote_tiers_needs_a_store(short_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a store"):
        DaemonConfig(socket=short_path / "d.sock", store=None, warm_bytes=1 << 20, remote="redis://host")
