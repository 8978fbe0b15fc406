"""A prompt that several processes want is computed once; nobody waits for one who is dead, or too slow."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_process import OpenCache, Start
from pattern_engine import PatternEngine
from raw_client import chain_of, connect, tokens_of, write_prompt
from test_life_and_death import client_process, eventually

from tierkv.cache import TierCache
from tierkv.daemon.messages import Found, Match, Prefetch, Release
from tierkv.errors import DaemonError
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier

PROMPT = list(range(17))


class InThread:
    """Runs a call beside the test, and gives its result or its exception."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._call()

    def join(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.result

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()


def waiting(cache: TierCache) -> InThread:
    return InThread(lambda: PatternEngine(cache).start(PROMPT))


def test_the_second_waits_for_the_blocks_of_the_first(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    sequence = first.acquire(PROMPT)
    assert daemon.status().claims == 4
    other = waiting(second)
    eventually(lambda: second._daemon is not None and second._daemon.blocks.num_waits == 1)
    engine = PatternEngine(first)
    engine.compute(sequence, 0)
    assert other.is_running
    first.commit(sequence, 8)
    first.flush()
    assert other.is_running, "half of it is there, the rest is being computed"
    first.commit(sequence, 17)
    first.release(sequence)
    found: Sequence = other.join()
    assert found.cached_tokens[Tier.WARM] == 16
    assert daemon.status().claims == 0
    second.release(found)


def test_who_waits_holds_neither_leases_nor_cursors(start_daemon: Start, open_cache: OpenCache) -> None:
    """The other one may need just that room to write what is waited for."""
    daemon = start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    first.release(PatternEngine(first).start(PROMPT[:9]))  # two blocks are there
    first.flush()
    sequence = first.acquire(PROMPT)  # and promises the other two
    other = waiting(second)
    eventually(lambda: second._daemon is not None and second._daemon.blocks.num_waits == 1)
    eventually(lambda: daemon.status().leased_slots == 0)
    assert other.is_running
    first.release(sequence)
    second.release(other.join())


def test_who_waits_goes_on_when_the_other_gives_up(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    sequence = first.acquire(PROMPT)
    other = waiting(second)
    eventually(lambda: second._daemon is not None and second._daemon.blocks.num_waits == 1)
    first.release(sequence)
    assert other.join().num_cached_tokens == 0


def test_who_waits_goes_on_when_the_other_is_killed(start_daemon: Start) -> None:
    daemon = start_daemon()
    with client_process("compute", daemon.socket) as process, connect(daemon.socket) as client:
        ask = Match(hashes=chain_of(tokens_of(16)), tokens=tokens_of(16), wants_claim=True)
        assert client.call(ask, Found).is_computing
        process.kill()
        eventually(lambda: client.call(ask, Found).claim != 0)


def test_after_the_deadline_everybody_computes(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=0.2)
    sequence = first.acquire(PROMPT)
    found = PatternEngine(second).start(PROMPT)
    assert found.num_cached_tokens == 0
    second.release(found)
    first.release(sequence)


def test_who_computes_something_waits_for_nobody(start_daemon: Start, open_cache: OpenCache) -> None:
    """Two processes that wait for each other's blocks would both wait until the deadline."""
    start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    mine, yours = first.acquire(PROMPT), second.acquire([*PROMPT[::-1]])
    crossed = second.acquire(PROMPT)
    assert crossed.num_cached_tokens == 0
    for cache, sequence in ((first, mine), (second, yours), (second, crossed)):
        cache.release(sequence)


def test_an_announced_prompt_is_brought_up_from_disk(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache()
    cache.release(PatternEngine(cache).start(PROMPT, partial_block=True))
    cache.flush()
    cache.close()
    daemon.kill()
    daemon.start()
    cache = open_cache()
    assert cache.match(PROMPT).tokens[Tier.COLD] == 17
    assert cache.prefetch(PROMPT).result() == 4
    eventually(lambda: cache.match(PROMPT).tokens[Tier.WARM] == 17)
    assert daemon.status().counters["prefetched_blocks"] == 5


def test_a_prompt_announced_with_too_few_hashes_is_refused(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as client, pytest.raises(DaemonError, match="block hashes for"):
        client.call(Prefetch(hashes=b"", tokens=tokens_of(16)), Found)


def test_a_tenant_may_pin_its_share_and_no_more(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon(slots=64, store=False, pin_share=0.01)  # of 256 KiB, in blocks of 256 bytes: ten
    cache, other = open_cache(hot=64), open_cache(hot=64, salt="other")
    for each in (cache, other):
        each.release(PatternEngine(each).start(list(range(65))))
        each.flush()
    assert cache.pin(list(range(40))) == 10
    with pytest.raises(DaemonError, match="one tenant may pin"):
        cache.pin(list(range(48)))
    assert other.pin(list(range(40))) == 10
    assert cache.unpin(list(range(40))) == 10
    assert cache.pin(list(range(24, 40))) == 0


def test_the_slab_is_kept_a_little_free(start_daemon: Start, tmp_path: Path) -> None:
    """The order is LRU's: hit-density learns here, where no block is used twice, that new ones are worth less."""
    daemon = start_daemon(slots=100, store=False, eviction_policy="lru")
    with connect(daemon.socket) as client:
        for start in range(0, 4000, 40):
            write_prompt(client, tokens_of(40, start=start))
        eventually(lambda: daemon.status().warm_free_bytes >= 0.04 * daemon.status().warm_bytes)
        found = client.call(
            Match(hashes=chain_of(tokens_of(40, start=3960)), tokens=tokens_of(40, start=3960), lease=True), Found
        )
        assert len(np.frombuffer(found.slots, dtype="<u4")) == 10, "what came last is still there"
        client.post(Release(slots=found.slots))
