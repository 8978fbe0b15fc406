"""What a cache asks of a daemon that is stopped, or whose disk hangs, ends in bounded time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_process import Daemon, OpenCache, Start
from pattern_engine import PatternEngine
from raw_client import connect, tokens_of, write_prompt
from test_ending import HangingDaemon, start_hanging, write_and_hang

from tierkv.cache import TierCache
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks
from tierkv.daemon.messages import Count, Done, Flush, Message, Status, StatusReport
from tierkv.errors import DaemonError, DaemonGoneError

__all__ = ["start_hanging"]  # a fixture

PROMPT = list(range(13))
BOUND_S = 10.0

Call = Callable[[TierCache, Path], object]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    before = time.monotonic()
    yield
    assert time.monotonic() - before < seconds


@pytest.fixture
def stopped(start_daemon: Start, open_cache: OpenCache) -> Iterator[TierCache]:
    """Return a cache that has written to a daemon that is stopped now."""
    daemon: Daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.3)
    cache.release(PatternEngine(cache).start(PROMPT))
    cache.flush()
    assert daemon.process
    daemon.process.send_signal(signal.SIGSTOP)
    yield cache
    with within(BOUND_S):
        cache.close()
    daemon.process.send_signal(signal.SIGCONT)


def flush(cache: TierCache, _: Path) -> None:
    cache.flush()


def check(cache: TierCache, _: Path) -> None:
    cache.check()


def save(cache: TierCache, path: Path) -> None:
    with pytest.raises(DaemonGoneError):
        cache.save_cache_state(path / "s.tkv")


def evict(cache: TierCache, _: Path) -> None:
    with pytest.raises(DaemonGoneError):
        cache.evict_everywhere()
    assert cache.match(PROMPT).num_cached_tokens == 0


def close(cache: TierCache, _: Path) -> None:
    cache.close()


@pytest.mark.parametrize("call", [flush, check, save, evict, close])
def test_a_call_to_a_stopped_daemon_ends(stopped: TierCache, tmp_path: Path, call: Call) -> None:
    with within(BOUND_S):
        call(stopped, tmp_path)


def test_blocks_that_are_written_to_a_stopped_daemon_keep_nothing_waiting(stopped: TierCache, tmp_path: Path) -> None:
    with within(BOUND_S):
        stopped.release(PatternEngine(stopped).start(list(range(50, 63))))
        stopped.flush()
        stopped.check()


def test_a_daemon_whose_disk_hangs_says_so_and_the_cache_goes_on(
    start_hanging: HangingDaemon, open_cache: OpenCache, short_path: Path, tmp_path: Path
) -> None:
    start_hanging("put")
    cache = open_cache(daemon_timeout_s=2.0)
    with within(BOUND_S):
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()  # says in the log that it is not flushed
        with pytest.raises(DaemonError, match="nothing was written"):
            cache.save_cache_state(tmp_path / "s.tkv")
        with pytest.raises(DaemonError, match="disk does not answer"):
            cache.evict_everywhere()
        assert cache.match(PROMPT).num_cached_tokens == 0, "memory is evicted all the same"
        cache.check()
        cache.close()


def test_a_call_that_takes_long_goes_on_as_long_as_the_daemon_lives(
    start_hanging: HangingDaemon, short_path: Path
) -> None:
    start_hanging("put")
    write_and_hang(short_path)
    with connect(short_path / "d.sock") as client:
        client._timeout_s = 0.1
        asked: list[Message] = []
        call = client.call

        def ask(message: Message, expected: type, **options: float) -> Message:
            asked.append(message)
            return call(message, expected, **options)  # type: ignore[no-any-return]

        client.call = ask  # type: ignore[method-assign, assignment]
        with pytest.raises(DaemonError, match="nothing was written"):
            client.call_long(Flush(), Done, timeout_s=20)
        assert asked and all(isinstance(each, Status) for each in asked)
        assert client.is_alive and not client._waiting and not client._answers
        with pytest.raises(DaemonGoneError, match="in time"):
            client.call_long(EvictBlocks(to_bytes=0), EvictedBlocks, timeout_s=0.2)


def test_a_long_call_and_short_ones_share_a_connection(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as client:
        client._timeout_s = 0.5
        write_prompt(client, tokens_of(64))
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                for _ in range(50):
                    client.call_long(Flush(), Done, timeout_s=20)
                    client.read_waiting()
            except BaseException as exc:  # noqa: BLE001 - seen below
                failed.append(exc)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            client.call(Status(), StatusReport)
        for thread in threads:
            thread.join(20)
        assert not failed and client.is_alive


def test_count_is_no_answer_to_a_flush(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as client, pytest.raises(DaemonGoneError, match="Done came for Flush"):
        client.call_long(Flush(), Count, timeout_s=5)
