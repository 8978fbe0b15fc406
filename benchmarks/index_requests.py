"""Requests of 128 blocks against a full table, timed step by step; and the same against a whole cache."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.index_tables import BLOCK_SIZE, BlockTable, Prompts
from tierkv import CacheConfig, Namespace, TierCache
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.layout import BlockLayout

__all__ = ["Times", "time_cache", "time_table"]

_BLOCKS = 128
_STEP = BLOCK_SIZE * TOKEN_BYTES
_NUM_NEW = (0, 16, _BLOCKS)
_CACHE_BLOCKS = 32_768


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one operation. cpu_p99_us leaves out when the machine did something else."""

    median_us: float
    p99_us: float
    cpu_p99_us: float


class Timer:
    """Collects wall and CPU time of this thread."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def run(self, work: Callable[[Any], Any], argument: object) -> Any:
        """Return what the work returns, and remember how long it took."""
        wall, cpu = time.perf_counter(), time.thread_time()
        result = work(argument)
        self._cpu.append(time.thread_time() - cpu)
        self._wall.append(time.perf_counter() - wall)
        return result

    def add(self, other: Timer) -> Timer:
        """Return the sums of this timer's runs and another's, run by run."""
        both = Timer()
        both._wall = [a + b for a, b in zip(self._wall, other._wall, strict=True)]
        both._cpu = [a + b for a, b in zip(self._cpu, other._cpu, strict=True)]
        return both

    def times(self) -> Times:
        """Summarize."""
        last = int(len(self._wall) * 0.99)
        return Times(statistics.median(self._wall) * 1e6, sorted(self._wall)[last] * 1e6, sorted(self._cpu)[last] * 1e6)


def time_table(table: BlockTable, num_blocks: int, num_requests: int) -> dict[str, Times]:
    """Fill a table with `num_blocks` blocks, which is all that it has places for, and return what requests cost.

    The older half are chains of 128 blocks, which will be evicted. Among the newer ones are chains of which every
    block has a sibling.
    """
    prompts = Prompts()
    num_forked = min(num_requests, num_blocks // (8 * _BLOCKS))
    num_plain = num_blocks // _BLOCKS - 2 * num_forked
    forked: list[bytes] = []
    plain: list[bytes] = []
    for number in range(num_plain):
        prompt = prompts.tokens(_BLOCKS)
        _run(table, prompt)
        if number >= num_plain // 2 and len(plain) < num_requests:
            plain.append(prompt)
        if number >= num_plain - num_forked:
            forked.append(prompts.tokens(_BLOCKS))
            for depth in range(_BLOCKS):
                _run(table, forked[-1][: depth * _STEP] + prompts.tokens(1))
            _run(table, forked[-1])
    gc.collect()
    rows: dict[str, Times] = {}
    for name, chosen in (("every block among siblings", forked), ("only children", plain)):
        timer = Timer()
        found = [timer.run(table.match, table.prepare(prompt)) for prompt in chosen]
        assert min(found) >= _BLOCKS - 1, "a prompt is not in the table"
        rows[f"match, {name}"] = timer.times()
    return rows | _time_requests(table, plain, prompts)


def time_cache(num_requests: int) -> dict[str, Times]:
    """Return what requests cost a whole cache on the CPU, whose blocks have 2 KiB so that copies cost little.

    It has 32,768 hot blocks, full of cached ones, and twice as many warm ones; writes to the warm tier are waited
    for between requests. Prompts are arrays of uint32; once also a list, which has to be converted.
    """
    layout = BlockLayout.uniform(num_layers=1, block_size=BLOCK_SIZE, kv_heads=1, head_dim=2, dtype="float16")
    config = CacheConfig(
        block_size=BLOCK_SIZE,
        hot_bytes=_CACHE_BLOCKS * layout.block_bytes,
        warm_bytes=2 * _CACHE_BLOCKS * layout.block_bytes,
    )
    prompts = Prompts()
    with TierCache(config, namespace=Namespace(weights="bench", layout=layout)) as cache:
        table = _CacheTable(cache)
        known = [prompts.tokens(_BLOCKS) for _ in range(_CACHE_BLOCKS // _BLOCKS)]
        for prompt in known:
            _run(table, prompt)
        chosen = known[-min(num_requests, len(known) // 2) :]
        arrays, lists = Timer(), Timer()
        for prompt in chosen:
            array = table.prepare(prompt)
            assert arrays.run(table.match, array) == _BLOCKS, "a prompt is not in the cache"
            lists.run(cache.match, array.tolist())
        rows = {"match, an array of token ids": arrays.times(), "match, a list of token ids": lists.times()}
        rows |= _time_requests(table, chosen, prompts)
        assert cache.stats().tiers[Tier.HOT].evictions, "nothing was evicted"
    return rows


class _CacheTable:
    """A cache as a table. `acquire` reuses all but the last block, of which one token is left to compute."""

    def __init__(self, cache: TierCache) -> None:
        self._cache = cache

    def prepare(self, prompt: bytes) -> npt.NDArray[np.uint32]:
        return np.frombuffer(prompt, dtype="<u4")

    def match(self, prompt: npt.NDArray[np.uint32]) -> int:
        return sum(self._cache.match(prompt).blocks.values())

    def acquire(self, prompt: npt.NDArray[np.uint32]) -> Any:
        return self._cache.acquire(prompt)

    def commit(self, request: Any) -> None:
        self._cache.commit(request, request.num_tokens)

    def release(self, request: Any) -> None:
        self._cache.release(request)

    def settle(self) -> None:
        """Wait until what was committed is in the warm tier."""
        self._cache.flush()


def _time_requests(table: BlockTable, known: Iterable[bytes], prompts: Prompts) -> dict[str, Times]:
    """Return what requests cost that end in 0, 16 and 128 blocks which the full table does not have."""
    rows: dict[str, Times] = {}
    for num_new in _NUM_NEW:
        acquire, commit, release = Timer(), Timer(), Timer()
        for prompt in known:
            changed = prompt[: (_BLOCKS - num_new) * _STEP] + prompts.tokens(num_new)
            request = acquire.run(table.acquire, table.prepare(changed))
            commit.run(table.commit, request)
            release.run(table.release, request)
            if isinstance(table, _CacheTable):
                table.settle()
        what = f"{num_new} of 128 new, {num_new} evicted" if num_new else "all cached"
        rows[f"acquire + release, {what}"] = acquire.add(release).times()
        if num_new:
            rows[f"commit of {num_new}"] = commit.times()
    return rows


def _run(table: BlockTable, prompt: bytes) -> None:
    request = table.acquire(table.prepare(prompt))
    table.commit(request)
    table.release(request)
    if isinstance(table, _CacheTable):
        table.settle()
