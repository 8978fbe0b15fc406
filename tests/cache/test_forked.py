"""A forked process has none of its parent's threads: every call there ends at once, and the parent notices nothing."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pattern_engine import PatternEngine, open_tiny

from tierkv import MemoryTransferManager, TransferOp
from tierkv.background.handle import Handle
from tierkv.cache import TierCache
from tierkv.errors import ClosedError, TierKVError
from tierkv.profiling.controller import MemoryController
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.requests.block_control import BlockControl
from tierkv.values.block import Tier

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as Python says of threads

PROMPT = list(range(17))
TIMEOUT_S = 20.0


def in_fork(work: Callable[[], Any]) -> Any:
    """Call in a forked process; return what it returns, as JSON, or "it hangs"."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = json.dumps(work())
        except BaseException as exc:  # noqa: BLE001 - told to the parent
            said = json.dumps(f"{type(exc).__name__}: {exc}")
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    is_done = bool(select.select([read], [], [], TIMEOUT_S)[0])
    said = os.read(read, 1 << 16).decode() if is_done else '"it hangs"'
    os.close(read)
    if not is_done:
        os.kill(child, 9)
    os.waitpid(child, 0)
    return json.loads(said)


def outcomes(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Return how each call ends: the name of what it raises, or "done"."""
    ends = {}
    for name, call in calls.items():
        try:
            call()
            ends[name] = "done"
        except Exception as exc:  # noqa: BLE001 - what is raised is what is asked
            ends[name] = type(exc).__name__
    return ends


def public_methods(kind: type) -> set[str]:
    return {name for name, each in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


@pytest.fixture(params=["memory only", "with a store"])
def cache(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TierCache]:
    options = {"cold_path": None} if request.param == "memory only" else {}
    with open_tiny(tmp_path, hot=8, **options) as opened:
        yield opened


def calls_of_a_cache(cache: TierCache, sequence: Any, path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "match": lambda: cache.match(PROMPT),
        "acquire": lambda: cache.acquire(PROMPT),
        "next_piece": sequence.overlap.next_piece,
        "record": lambda: sequence.overlap.record(1.0),
        "append": lambda: cache.append(sequence, [1] * 64),
        "commit": lambda: cache.commit(sequence, 17),
        "fork": lambda: cache.fork(sequence),
        "pin": lambda: cache.pin(PROMPT),
        "unpin": lambda: cache.unpin(PROMPT),
        "prefetch": lambda: cache.prefetch(PROMPT),
        "evict": lambda: cache.evict(Tier.HOT),
        "evict_everywhere": lambda: cache.evict_everywhere(PROMPT),
        "defragment": lambda: cache.defragment([sequence]),
        "flush": cache.flush,
        "save_cache_state": lambda: cache.save_cache_state(path / "s.tkv"),
        "load_cache_state": lambda: cache.load_cache_state(path / "s.tkv"),
        "stats": cache.stats,
        "set_eviction_policy": lambda: cache.set_eviction_policy("lru"),
        "add_observer": lambda: cache.add_observer(MemoryProfiler().tracker),
        "remove_observer": lambda: cache.remove_observer(MemoryProfiler().tracker),
        "check": cache.check,
        "release": lambda: cache.release(sequence),
        "close": cache.close,
    }


def calls_of_blocks(blocks: BlockControl) -> dict[str, Callable[[], Any]]:
    return {
        "inspect": blocks.inspect,
        "manage": lambda: blocks.manage(evict=[0], pin=[1], offload=[2]),
        "set_limit": lambda: blocks.set_limit(1),
        "set_offloading": lambda: blocks.set_offloading(None),
        "unpin": lambda: blocks.unpin([0]),
    }


def calls_of_a_controller(controller: MemoryController) -> dict[str, Callable[[], Any]]:
    return {
        "set_memory_budget": lambda: controller.set_memory_budget(1 << 20),
        "set_eviction_policy": lambda: controller.set_eviction_policy("lru"),
        "enable_cpu_offloading": lambda: controller.enable_cpu_offloading(0.5, 0.5),
        "disable_cpu_offloading": controller.disable_cpu_offloading,
        "get_memory_stats": controller.get_memory_stats,
        "manual_cache_management": lambda: controller.manual_cache_management(evict_blocks=[0]),
        "optimize_memory_layout": controller.optimize_memory_layout,
        "profile": lambda: controller.profile().__enter__(),
    }


def held(cache: TierCache, forked: threading.Event, holding: threading.Event) -> None:
    """Hold every lock that a call of the cache takes while the process is forked, as another thread may."""
    with cache._tiers.changed, cache.calls._changed:
        holding.set()
        forked.wait(TIMEOUT_S)


def test_every_call_in_a_forked_process_ends_at_once_even_if_a_thread_held_the_locks(
    cache: TierCache, tmp_path: Path
) -> None:
    sequence = PatternEngine(cache).start(PROMPT)
    cache.flush()
    of_cache, of_blocks = calls_of_a_cache(cache, sequence, tmp_path), calls_of_blocks(cache.blocks)
    of_controller = calls_of_a_controller(MemoryController(cache))
    assert set(of_cache) == public_methods(TierCache) | {"next_piece", "record"}  # of a sequence's overlap
    assert set(of_blocks) == public_methods(BlockControl)
    assert set(of_controller) == public_methods(MemoryController) - {"attach"}

    forked, holding = threading.Event(), threading.Event()
    holder = threading.Thread(target=held, args=(cache, forked, holding))
    holder.start()
    assert holding.wait(TIMEOUT_S)
    try:
        ends = in_fork(lambda: [outcomes(of_cache), outcomes(of_blocks), outcomes(of_controller)])
    finally:
        forked.set()
        holder.join()
    assert ends != "it hangs"
    silent = {"release": "done", "close": "done"}
    assert ends[0] == dict.fromkeys(of_cache, "ClosedError") | silent
    assert ends[1] == dict.fromkeys(of_blocks, "ClosedError")
    assert ends[2] == dict.fromkeys(of_controller, "ClosedError")

    engine = PatternEngine(cache)  # the parent goes on, with its own blocks
    engine.check(sequence)
    engine.decode(sequence, [1, 2, 3])
    cache.release(sequence)
    cache.release(engine.start(PROMPT))
    cache.flush()
    cache.check()


def test_a_fork_from_inside_a_call_is_turned_away_too(cache: TierCache) -> None:
    """An observer is called inside, where a thread may call further methods without asking at the door."""
    ends: list[Any] = []

    class Forking:
        def on_memory(self, region: object) -> None: ...
        def on_block(self, event: object) -> None: ...
        def on_use(self, block_ids: object) -> None: ...
        def on_span(self, span: object) -> None: ...
        def on_request(self, event: object) -> None:
            ends.append(in_fork(lambda: outcomes({"stats": cache.stats, "flush": cache.flush, "close": cache.close})))

    cache.add_observer(Forking())
    cache.release(cache.acquire(PROMPT))
    assert ends == [{"stats": "ClosedError", "flush": "ClosedError", "close": "done"}]


def test_a_handle_of_the_parents_work_is_of_no_use_in_a_forked_process() -> None:
    handle: Handle[int] = Handle()

    async def awaited() -> int:
        return await handle

    calls: dict[str, Callable[[], Any]] = {
        "done": handle.done,
        "wait": lambda: handle.wait(60),
        "result": handle.result,
        "cancel": handle.cancel,
        "await": lambda: asyncio.run(awaited()),
    }
    assert in_fork(lambda: outcomes(calls)) == dict.fromkeys(calls, "ClosedError")
    assert not handle.is_cancelled
    handle.succeed(3)
    assert handle.result() == 3


def test_a_transfer_manager_is_of_no_use_in_a_forked_process() -> None:
    with MemoryTransferManager("cpu") as manager:
        op = TransferOp.to_cpu(torch.ones(4))
        assert manager.bulk_transfer([op])[0].wait(10)
        calls: dict[str, Callable[[], Any]] = {
            "bulk": lambda: manager.bulk_transfer([op])[0].wait(10),
            "to_cpu": lambda: asyncio.run(manager.async_to_cpu(torch.ones(4))),
            "to_gpu": lambda: asyncio.run(manager.async_to_gpu(torch.ones(4))),
            "close": manager.close,
        }
        assert in_fork(lambda: outcomes(calls)) == {**dict.fromkeys(calls, "ClosedError"), "close": "done"}
        assert manager.bulk_transfer([op])[0].result().equal(torch.ones(4))


def test_an_overlapped_load_is_not_waited_for_in_a_forked_process(tmp_path: Path) -> None:
    with open_tiny(tmp_path, hot=64, piece_tokens=4) as cache:
        cache.release(PatternEngine(cache).start(list(range(65))))
    with open_tiny(tmp_path, hot=64, piece_tokens=4) as cache:
        engine = PatternEngine(cache)
        sequence = None
        for _ in range(4):  # until both ways are measured
            sequence = engine.cache.acquire(list(range(65)), overlap=True)
            if sequence.overlap.is_loading:
                break
            sequence.overlap.record(1e-3, num_tokens=1)
            sequence.overlap.record(0.1, num_tokens=64)
            sequence.overlap.record(0.05)
            cache.release(sequence)
            for tier in (Tier.HOT, Tier.WARM):
                cache.evict(tier)
        assert sequence and sequence.overlapped_load
        load = sequence.overlapped_load
        assert in_fork(lambda: outcomes({"wait": load.wait})) == {"wait": "ClosedError"}
        cache.release(sequence)


def test_the_error_says_what_to_do(cache: TierCache) -> None:
    said = in_fork(cache.stats)
    assert said.startswith("ClosedError: the cache belongs to the process that made it")
    assert "spawn" in said
    assert issubclass(ClosedError, TierKVError)
