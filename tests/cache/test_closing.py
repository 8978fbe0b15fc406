"""Closing a cache while other threads use it: their calls end, later ones say so, and nothing is left pinned."""

from __future__ import annotations

import inspect
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ClosedError, TierKVError
from tierkv.requests.block_control import BlockControl
from tierkv.transfer.block_writer import Batch
from tierkv.transfer.memory import TierMemory
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

NAMESPACE = Namespace(weights="w", layout=tiny_layout())
BLOCK_BYTES = tiny_layout().block_bytes
HANG_S = 30.0
PROMPT = list(range(12))


def open_cache(path: Path, **options: object) -> TierCache:
    config = CacheConfig(
        cold_path=path,
        block_size=4,
        hot_bytes=16 * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        min_free_bytes=0,
        **{"write_wait_s": 1.0, **options},  # type: ignore[arg-type]
    )
    return TierCache(config, namespace=NAMESPACE)


def assert_nothing_pinned(cache: TierCache) -> None:
    index = cache._tiers.index
    with cache._tiers.changed:
        index.check()
    assert index.hot.referenced_count == 0
    assert index.warm.referenced_count == cache._tiers.memory.reserved_raw


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "match": (PROMPT,),
    "acquire": (PROMPT,),
    "pin": (PROMPT,),
    "unpin": (PROMPT,),
    "prefetch": (PROMPT,),
    "evict": (Tier.HOT,),
    "save_cache_state": ("/nowhere",),
    "load_cache_state": ("/nowhere",),
    "set_eviction_policy": ("lru",),
    "add_observer": (None,),
    "remove_observer": (None,),
}
OF_A_SEQUENCE: dict[str, tuple[object, ...]] = {"append": ([1],), "commit": (12,), "fork": ()}
ALLOWED = {"close", "release"}  # both may be called twice


def methods_of(owner: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", [name for name in methods_of(TierCache) if name not in ALLOWED])
def test_every_method_of_a_closed_cache_raises_one_error(tmp_path: Path, name: str) -> None:
    cache = open_cache(tmp_path)
    sequence = PatternEngine(cache).start(PROMPT)
    cache.close()
    arguments = (sequence, *OF_A_SEQUENCE[name]) if name in OF_A_SEQUENCE else ARGUMENTS.get(name, ())
    with pytest.raises(ClosedError):
        getattr(cache, name)(*arguments)


@pytest.mark.parametrize("name", methods_of(BlockControl))
def test_every_method_of_a_closed_caches_blocks_raises_that_error(tmp_path: Path, name: str) -> None:
    cache = open_cache(tmp_path)
    cache.close()
    arguments = {"set_limit": (1,), "set_offloading": (None,), "unpin": ([],)}.get(name, ())
    with pytest.raises(ClosedError):
        getattr(cache.blocks, name)(*arguments)


def test_closing_releases_the_running_sequences(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = PatternEngine(cache).start(PROMPT)
    cache.close()
    assert sequence.is_released
    cache.release(sequence)
    assert_nothing_pinned(cache)


def test_closing_frees_the_hot_pool_whoever_still_holds_the_cache(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    pool = cache.hot
    views = [weakref.ref(each) for each in (pool.blocks, pool.bytes_view, pool.key_cache(0))]
    cache.close()
    assert not pool.blocks.numel() and not pool.bytes_view.numel()
    assert not any(view() is not None for view in views), "a view would keep the memory"
    cache.close()
    with pytest.raises(ClosedError):
        pool.key_cache(0)


def test_an_engine_that_computes_while_its_cache_closes_keeps_its_memory(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = cache.acquire(PROMPT)
    pool = cache.hot
    cache.close()
    assert sequence.is_released
    pool.key_cache(0)[sequence.block_table[0]] = 1  # a CUDA graph would write there, whatever lies there by then


def test_a_call_that_another_thread_is_inside_of_ends_before_anything_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    PatternEngine(cache).start(PROMPT)
    cache.flush()
    cache.evict(Tier.HOT)
    reading, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()
    too_early: list[bool] = []
    assert cache.cold
    read_into, close = cache.cold.read_into, TierMemory.close

    def slow(*args: Any, **kwargs: Any) -> object:
        reading.set()
        assert may_go_on.wait(HANG_S)
        too_early.append(closed.wait(0.2))  # nobody who waits for this call gets there
        return read_into(*args, **kwargs)

    def note_and_close(self: TierMemory) -> None:
        closed.set()
        close(self)

    monkeypatch.setattr(cache.cold, "read_into", slow)
    monkeypatch.setattr(TierMemory, "close", note_and_close)
    cache.release(next(iter(cache._running._sequences)))
    cache.evict(Tier.HOT)
    cache.evict(Tier.WARM)
    found: list[int] = []
    user = start(lambda: found.append(cache.acquire([*PROMPT, 99]).num_cached_tokens))
    assert reading.wait(HANG_S)
    closer = start(cache.close)
    deadline = time.monotonic() + HANG_S
    while not cache.calls.is_closed:
        assert time.monotonic() < deadline, "it is never closed"
    may_go_on.set()
    assert_ends(user, closer)
    assert found == [12]
    assert closed.is_set() and not any(too_early)
    assert_nothing_pinned(cache)


def test_a_request_that_waits_for_room_ends_with_that_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path, write_wait_s=HANG_S)
    engine = PatternEngine(cache)
    stuck, may_go_on = threading.Event(), threading.Event()
    write = cache._offloader.writer.write

    def slow(batch: Batch) -> None:
        stuck.set()
        assert may_go_on.wait(HANG_S)
        write(batch)

    monkeypatch.setattr(cache._offloader.writer, "write", slow)
    cache.release(engine.start(list(range(64))))
    assert stuck.wait(HANG_S)
    errors: list[Exception] = []

    def wait_for_room() -> None:
        try:
            cache.acquire(list(range(1000, 1064)))
        except ClosedError as exc:
            errors.append(exc)

    user, closer = start(wait_for_room), start(cache.close)
    user.join(HANG_S)
    assert errors, "the request was not ended"
    may_go_on.set()
    assert_ends(user, closer)
    assert_nothing_pinned(cache)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_runs_while_a_cache_is_closed_ends_well(tmp_path: Path, seed: int) -> None:
    with open_cache(tmp_path) as cache:  # something cold for the others to load
        for number in range(6):
            cache.release(PatternEngine(cache).start([number * 100 + token for token in range(16)]))
    cache = open_cache(tmp_path)
    failures: list[BaseException] = []
    rounds = threading.Semaphore(0)

    def use(number: int) -> None:
        rng = random.Random(100 * seed + number)
        engine = PatternEngine(cache)
        works: list[Callable[[], object]] = [
            lambda: cache.release(engine.start(prompt(rng), overlap=rng.random() < 0.5)),
            lambda: cache.release(engine.start(prompt(rng))),
            cache.defragment,
            lambda: cache.evict(Tier.HOT, 3),
            lambda: cache.blocks.manual_cache_management(evict_blocks=[rng.randrange(16)]),
            cache.flush,
            cache.stats,
        ]
        try:
            while True:
                try:
                    rng.choice(works)()
                except CapacityError:
                    pass
                rounds.release()
        except ClosedError:
            pass
        except (AssertionError, RuntimeError, TierKVError) as exc:  # for the main thread to see
            failures.append(exc)

    threads = [start(lambda number=number: use(number)) for number in range(3)]
    for _ in range(random.Random(seed).randrange(1, 30)):
        assert rounds.acquire(timeout=HANG_S)
    assert_ends(start(cache.close), *threads)
    assert not failures, failures
    assert_nothing_pinned(cache)
    with open_cache(tmp_path) as again:
        assert again.cold.damaged is None
        again.cold.check()


def prompt(rng: random.Random) -> list[int]:
    number = rng.randrange(12)
    return [number * 100 + token for token in range(rng.randrange(5, 20))]


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def assert_ends(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive(), "it hangs"


def test_a_thread_that_is_inside_a_call_does_not_wait_for_itself(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)

    def close_inside() -> None:
        cache.calls.enter()  # as an observer that closes the cache when it is told something
        cache.close()
        cache.calls.leave()

    assert_ends(start(close_inside))
    with pytest.raises(ClosedError):
        cache.stats()
