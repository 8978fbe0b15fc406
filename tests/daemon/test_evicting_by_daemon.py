"""What is evicted through the daemon is served by nobody: not by it, its store, its clients, or the next daemon."""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path

import pytest
from daemon_process import Daemon, OpenCache, Start
from one_command import Command
from pattern_engine import PatternEngine
from raw_client import LAYOUT, NAMESPACE, chain_of, connect, tokens_of, write_prompt
from test_commands import tierkv
from test_life_and_death import eventually, is_served

from tierkv.cache import TierCache
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.eviction_log import EvictionLog
from tierkv.daemon.eviction_messages import (
    EvictBlocks,
    EvictedBlocks,
    Eviction,
    EvictionDone,
    Evictions,
    EvictionsSince,
)
from tierkv.daemon.messages import Chain, Done, Flush, Found, Match, Publish, Published, Release, Reserve, Reserved
from tierkv.daemon.protocol import frame
from tierkv.errors import DaemonError
from tierkv.storage.cold import ColdStore
from tierkv.tools import evict as tool
from tierkv.values.block import Tier

__all__ = ["tierkv"]  # a fixture

PROMPT = list(range(13))
OTHER = list(range(100, 113))
TOKENS = tokens_of(16)


def evict(daemon: Daemon, **conditions: object) -> EvictedBlocks:
    with DaemonClient(daemon.socket) as client:
        return client.call(EvictBlocks(**conditions), EvictedBlocks)  # type: ignore[arg-type]


def keep(cache: TierCache, *prompts: list[int]) -> PatternEngine:
    engine = PatternEngine(cache)
    for prompt in prompts:
        cache.release(engine.start(prompt))
    cache.flush()
    return engine


def hot(cache: TierCache) -> int:
    return cache.stats().tiers[Tier.HOT].blocks


def cached(cache: TierCache, prompt: list[int]) -> int:
    return cache.match(prompt).num_cached_tokens


def test_the_warm_tier_the_store_and_another_processs_hot_tier_forget(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    daemon = start_daemon()
    cache = open_cache()
    engine = keep(cache, PROMPT)
    answer = evict(daemon, to_bytes=0)
    assert (answer.warm, answer.cold, answer.left, answer.stayed) == (3, 3, 0, {})
    assert [(each.has_answered, each.blocks, each.in_use) for each in answer.engines] == [(True, 3, 0)]
    assert hot(cache) == 0
    again = engine.start(PROMPT)
    assert again.num_cached_tokens == 0
    cache.release(again)
    cache.flush()
    assert cached(cache, PROMPT) == 12, "what is computed anew is kept"


def test_a_prompt_that_is_all_hot_is_not_served_either_though_the_daemon_is_not_asked(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    cache = open_cache()
    assert cache._daemon
    engine = keep(cache, PROMPT)
    monkeypatch.setattr(cache._daemon._connector, "_maintain", lambda: None)  # the thread that looks on its own is late
    answer = evict(daemon, to_bytes=0)
    assert not answer.engines[0].has_answered and hot(cache) == 3
    again = engine.start(PROMPT)
    assert again.num_cached_tokens == 0
    cache.release(again)


def test_what_a_request_uses_stays_until_it_ends_and_is_told(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache, other = open_cache(), open_cache()
    engine = PatternEngine(cache)
    running = engine.start(PROMPT)
    cache.flush()
    answer = evict(daemon, namespace=cache.namespace.digest)
    assert sorted((each.blocks, each.in_use) for each in answer.engines) == [(0, 0), (0, 3)]
    engine.check(running, 12)
    engine.decode(running, list(range(12)))
    assert cached(cache, PROMPT) == cached(other, PROMPT) == 0
    cache.release(running)
    cache.flush()
    assert hot(cache) == 0
    assert cached(cache, PROMPT) == cached(other, PROMPT) == 0, "nothing of it was written again"
    cache.check()


def test_a_prompt_goes_and_another_stays(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    keep(cache, PROMPT, OTHER)
    request = tool.request_of(cache.namespace.digest, PROMPT[:10], 4)
    answer = evict(daemon, namespace=request.namespace, hashes=request.hashes, tokens=request.tokens)
    assert (answer.warm, answer.cold, answer.left) == (3, 3, 3)
    assert answer.engines[0].blocks == 3
    assert cached(cache, PROMPT) == 0 and cached(cache, OTHER) == 12


def test_only_what_is_old_goes(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    keep(cache, PROMPT)
    assert evict(daemon, older_than_s=3600.0).warm == 0 and cached(cache, PROMPT) == 12
    answer = evict(daemon, older_than_s=0.0)
    assert (answer.warm, answer.cold, answer.engines[0].blocks) == (3, 3, 3)
    assert cached(cache, PROMPT) == 0


def test_what_goes_by_size_goes_from_memory_too(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache, quiet = open_cache(), open_cache(hot=8)
    keep(cache, PROMPT, OTHER)
    keep(quiet, OTHER)
    answer = evict(daemon, to_bytes=5 * 4096)
    assert answer.cold > 0 and answer.warm == answer.cold and answer.left == 6 - answer.cold
    assert hot(cache) == 6 - answer.cold
    assert cached(cache, PROMPT) + cached(cache, OTHER) == 24 - 4 * answer.cold


def test_without_a_store_a_size_is_that_of_the_warm_tier(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon(store=False)
    cache = open_cache()
    keep(cache, PROMPT, OTHER)
    answer = evict(daemon, to_bytes=4 * LAYOUT.block_bytes)
    assert (answer.warm, answer.cold, answer.left) == (2, 0, 4)
    assert hot(cache) == 4


def test_a_pinned_prompt_stays_everywhere_and_is_told(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    keep(cache, PROMPT, OTHER)
    cache.pin(PROMPT)
    answer = evict(daemon, namespace=cache.namespace.digest)
    assert answer.stayed == {"warm, pinned": 3, "stored, pinned": 3}
    assert answer.engines[0].pinned == 3
    assert cached(cache, PROMPT) == 12 and cached(cache, OTHER) == 0


def test_what_is_leased_serves_nobody_else_and_goes_with_its_last_lease(start_daemon: Start) -> None:
    daemon = start_daemon()
    ask = Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True)
    with connect(daemon.socket) as client, connect(daemon.socket) as other:
        write_prompt(client, TOKENS)
        client.call(Flush(), Done)
        slots = client.call(ask, Found).slots
        answer = evict(daemon, to_bytes=0)
        assert (answer.warm, answer.cold, answer.stayed) == (0, 4, {"warm, leased to clients": 4})
        assert other.call(ask, Found).slots == b""
        assert write_prompt(other, TOKENS) == 0, "its place is taken until then"
        client.post(Release(slots=slots))
        assert daemon.status().tenants[0].warm_blocks == 0
        assert write_prompt(other, TOKENS) == 4


def test_what_is_being_written_is_not_served_when_it_is_published(start_daemon: Start) -> None:
    daemon = start_daemon()
    ask = Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True)
    with connect(daemon.socket) as client:
        chain = Chain(chain_of(TOKENS), TOKENS, array("I", range(4)).tobytes())
        given = client.call(Reserve(chains=[chain]), Reserved).chains[0]
        assert evict(daemon, to_bytes=0).stayed == {"warm, being read or written": 4}
        client.call(Publish(slots=given.slots), Published)
        assert client.call(ask, Found).slots == b""
        client.call(Flush(), Done)
        eventually(lambda: daemon.status().tenants[0].warm_blocks == 0)
        assert daemon.status().cold["blocks"] == 0


def test_an_engine_that_was_away_forgets_when_it_is_back_whatever_daemon_it_finds(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was told, then it ended, and the next one tells the engine that missed it."""
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    keep(cache, PROMPT, OTHER)
    assert cache._daemon
    monkeypatch.setattr(cache._daemon._connector, "_maintain", lambda: None)
    assert not evict(daemon, namespace=cache.namespace.digest).engines[0].has_answered
    daemon.kill()
    daemon.start()
    assert hot(cache) == 6
    eventually(lambda: is_served(cache, daemon))
    assert cached(cache, PROMPT) == 0 and hot(cache) == 0
    monkeypatch.undo()


def test_an_eviction_that_a_busy_daemon_does_not_name_at_once_is_asked_for_again(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    cache = open_cache()
    keep(cache, PROMPT)
    assert cache._daemon and cache._daemon.connection
    connection, refusals = cache._daemon.connection, []

    def refuse(message: object, *_: object, **__: object) -> object:
        refusals.append(message)
        raise DaemonError("more requests at once than this daemon takes")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "call", refuse)
        assert not evict(daemon, to_bytes=0).engines[0].has_answered
        num_asked = len(refusals)
        for _ in range(5):
            cache._daemon.catch_up()
        assert num_asked and len(refusals) - num_asked <= 1, "a busy daemon is not asked at each request"
        assert hot(cache) == 3
    eventually(lambda: hot(cache) == 0)


def test_the_thread_that_maintains_the_connection_outlives_an_unexpected_error(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    assert cache._daemon
    with monkeypatch.context() as patch:
        failed = threading.Event()

        def fail() -> None:
            failed.set()
            raise IndexError("unexpected")

        patch.setattr(cache._daemon._connector, "_maintain", fail)
        assert failed.wait(10)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_served(cache, daemon))


def test_a_daemon_that_was_only_started_again_costs_no_engine_its_hot_blocks(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    keep(cache, PROMPT)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    assert cached(cache, PROMPT) == 12 and hot(cache) == 3


def test_an_eviction_from_the_store_while_no_daemon_runs_reaches_the_engines_of_the_next_one(
    start_daemon: Start, open_cache: OpenCache, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    keep(cache, PROMPT)
    eventually(lambda: cache._daemon is not None and cache._daemon._eviction_log != 0)
    daemon.kill()
    tool.evict(store=short_path / "store", to="0", as_json=True)
    assert '"blocks_evicted": 3' in capsys.readouterr().out
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    assert cached(cache, PROMPT) == 0 and hot(cache) == 0


def test_an_engine_that_has_missed_too_much_drops_all_that_is_not_in_use(
    start_daemon: Start, open_cache: OpenCache, short_path: Path
) -> None:
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    engine = keep(cache, OTHER)
    running = engine.start(PROMPT)
    cache.flush()
    daemon.kill()
    (short_path / "store" / "daemon.evictions").unlink(missing_ok=True)
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    eventually(lambda: hot(cache) == 4)
    engine.check(running, 12)
    cache.release(running)
    assert hot(cache) == 0
    assert cached(cache, OTHER) == 12, "the daemon's store has it"


def test_a_cache_evicts_a_prompt_for_all_clients(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    cache, other = open_cache(), open_cache()
    keep(cache, PROMPT, OTHER)
    keep(other, PROMPT)
    report = cache.evict_everywhere(PROMPT)
    assert report.blocks == {Tier.HOT: 3, Tier.WARM: 3, Tier.COLD: 3} and not report.stayed
    assert hot(other) == 0 and cached(other, PROMPT) == 0 and cached(cache, OTHER) == 12


def test_an_eviction_makes_sense_or_is_refused(start_daemon: Start) -> None:
    daemon = start_daemon()
    for nonsense in (
        EvictBlocks(),
        EvictBlocks(namespace=b"short", to_bytes=0),
        EvictBlocks(tokens=TOKENS, to_bytes=0),
        EvictBlocks(namespace=NAMESPACE.digest, tokens=b"odd"),
        EvictBlocks(namespace=NAMESPACE.digest, hashes=b"odd"),
        EvictBlocks(namespace=NAMESPACE.digest, older_than_s=float("inf")),
        EvictBlocks(namespace=NAMESPACE.digest, older_than_s=float("nan")),
    ):
        with DaemonClient(daemon.socket) as client, pytest.raises(DaemonError):
            client.call(nonsense, EvictedBlocks)


def test_what_an_engine_says_that_cannot_be_reaches_nobody(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as engine:
        write_prompt(engine, TOKENS)
        number = engine.call(EvictionsSince(log=0, number=0), Evictions).number
        for said in ((number + 1, -1, 0, 0), (number + 1, 0, 1 << 63, 0), (-1, 0, 0, 0)):
            engine.post(EvictionDone(*said))
        (told,) = evict(daemon, to_bytes=0).engines
        assert not told.has_answered and daemon.status().counters["refused_messages"] == 3


def test_the_log_fits_one_message_however_long_the_prompts_are(tmp_path: Path) -> None:
    log = EvictionLog(tmp_path / "log")
    for _ in range(5):
        log.add(Eviction(0, time.time(), b"n" * 16, tokens=bytes(4 << 20)))
    assert [each.number for each in log.since(log.log, 3).evictions] == [4, 5]
    assert not log.since(log.log, 2).is_complete
    frame(log.since(log.log, 3), number=1, boot=1)


def test_a_log_of_evictions_that_cannot_be_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EvictionLog(path)
    log.add(Eviction(0, float("nan"), b"n" * 16))
    log.save()
    assert EvictionLog(path).log != log.log


def test_the_log_is_bounded_and_says_who_has_missed_too_much(tmp_path: Path) -> None:
    log = EvictionLog(tmp_path / "log")
    assert log.since(0, 0).is_complete
    for _ in range(100):
        log.add(Eviction(0, time.time(), b"n" * 16))
    log.add(Eviction(0, time.time(), block_hashes=bytes(16) * 100_000))
    log.save()
    again = EvictionLog(tmp_path / "log")
    assert (again.log, again.number) == (log.log, 101)
    answer = again.since(log.log, 99)
    assert answer.is_complete and [each.number for each in answer.evictions] == [100, 101]
    assert answer.evictions[1].block_hashes is None, "so many count as everything"
    assert not again.since(log.log, 10).is_complete
    assert not again.since(log.log, 102).is_complete, "it knows more than the log: that was lost"
    assert not again.since(log.log + 1, 101).is_complete
    (tmp_path / "log").write_bytes(b"nonsense")
    assert EvictionLog(tmp_path / "log").log != log.log
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    log.save()


def test_a_store_names_its_daemon_to_the_command(tierkv: Command, start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as client:
        write_prompt(client, TOKENS)
        client.call(Flush(), Done)
    code, out, err = tierkv("evict", "--to", "0", "--store", short_path / "store")
    assert code == 0 and f"through the daemon at {daemon.socket}" in out and "4 from the warm tier" in out, err
    with ColdStore(short_path / "store", quota_bytes=64 << 20, read_only=True) as store:
        assert store.stats().blocks == 0
    code, _, err = tierkv("evict", "--namespace", "ffffff")
    assert code == 2 and "0 namespaces begin with ffffff" in err
