"""Numbers, names, tokens and paths that make no sense are refused where they are given, by an error that names them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv import MemoryTransferManager, TransferOp
from tierkv.background.handle import Handle
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.daemon.client import DaemonClient
from tierkv.errors import ConfigError, TierKVError
from tierkv.policies import make_policy
from tierkv.profiling.controller import MemoryController
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.transfer.offload import Offloading
from tierkv.values.block import Tier
from tierkv.values.checks import check_count, check_seconds, check_share
from tierkv.values.namespace import Namespace

NO_TIMES = [math.nan, math.inf, -math.inf, -1, -1e-9, 1e300, True, "3", None, [1], 1j]
NO_COUNTS = [math.nan, math.inf, -1, 2.5, True, "3", [1], 1 << 70]
NO_TOKENS: dict[str, object] = {
    "none": None,
    "a number": 5,
    "text": "abc",
    "bytes": b"abc",
    "nan": [math.nan],
    "nan at the end": [1, 2, math.nan],
    "fractions": [1.5],
    "negative": [3, -1],
    "33 bits": [1 << 32],
    "70 bits": [1 << 70],
    "bools": [True, False],
    "nested": [[1, 2]],
    "ragged": [[1], [1, 2]],
    "words": ["a"],
    "nothings": [None],
    "a set": {1, 2},
    "a dict": {1: 2},
    "a generator": iter([1, 2]),
    "an object": object(),
    "floats": np.array([1.0]),
    "a matrix": np.array([[1]]),
    "objects": np.array([object()]),
    "negative numbers of 64 bits": np.array([-1]),
    "a tensor of floats": torch.tensor([1.5]),
    "a tensor that numpy has not": torch.tensor([1], dtype=torch.bfloat16),
    "a tensor with gradients": torch.ones(1, requires_grad=True),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierCache]:
    with open_tiny(tmp_path_factory.mktemp("nonsense"), hot=32) as opened:
        yield opened
        opened.check()


@pytest.mark.parametrize("tokens", NO_TOKENS)
@pytest.mark.parametrize("name", ["match", "acquire", "pin", "unpin", "prefetch", "append"])
def test_what_are_no_tokens_is_refused(cache: TierCache, name: str, tokens: str) -> None:
    sequence = cache.acquire([7, 8])
    before = ([sequence] if name == "append" else [], cache.stats().requests)
    with pytest.raises(ConfigError, match="token ids must"):
        getattr(cache, name)(*before[0], NO_TOKENS[tokens])
    assert sequence.num_tokens == 2
    assert cache.stats().requests == before[1]
    cache.release(sequence)


def test_tokens_of_any_integer_kind_are_taken(cache: TierCache) -> None:
    for tokens in (
        [1, 2],
        (1, 2),
        range(1, 3),
        np.array([1, 2], dtype=np.int8),
        torch.tensor([1, 2]),
        [np.uint64(1), 2],
    ):
        assert cache.match(tokens).num_tokens == 2


def record(cache: TierCache, seconds: Any, *, num_tokens: Any = None) -> None:
    with cache.acquire([1, 2]) as sequence:
        sequence.overlap.record(seconds, num_tokens=num_tokens)


TIMES: dict[str, Callable[[TierCache, Any], object]] = {
    "record": lambda cache, value: record(cache, value),
    "record a pass": lambda cache, value: record(cache, value, num_tokens=4),
    "write_wait_s": lambda cache, value: CacheConfig(write_wait_s=value),
    "compute_wait_s": lambda cache, value: CacheConfig(compute_wait_s=value),
    "daemon_timeout_s": lambda cache, value: CacheConfig(daemon_timeout_s=value),
    "DaemonClient": lambda cache, value: DaemonClient(Path("/nonexistent"), timeout_s=value),
    "snapshot_every_s": lambda cache, value: MemoryProfiler(snapshot_every_s=value),
}


@pytest.mark.parametrize("value", NO_TIMES, ids=repr)
@pytest.mark.parametrize("name", TIMES)
def test_what_is_no_time_is_refused(cache: TierCache, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"second|must"):
        TIMES[name](cache, value)


@pytest.mark.parametrize("value", [each for each in NO_TIMES if each is not None], ids=repr)
def test_a_wait_for_what_is_no_time_is_refused(value: Any) -> None:
    handle: Handle[int] = Handle()
    with pytest.raises(ConfigError, match="timeout_s"):
        handle.wait(value)
    with MemoryTransferManager("cpu") as manager, pytest.raises(ConfigError, match="timeout_s"):
        manager.bulk_transfer([TransferOp.to_cpu(torch.ones(1))], timeout_s=value)
    assert handle.wait(0) is False
    assert handle.wait(np.float32(0.001)) is False


def test_nonsense_times_leave_what_was_measured_as_it_was(cache: TierCache) -> None:
    overlap, choice = cache.acquire([1, 2]).overlap, cache._acquirer._choice
    assert choice
    overlap.record(0.5, num_tokens=4)
    for value in NO_TIMES:
        with pytest.raises(ConfigError):
            overlap.record(value, num_tokens=4)  # type: ignore[arg-type]
    assert choice.pass_costs.estimate(4) == 0.5


COUNTS: dict[str, Callable[[TierCache, Any], object]] = {
    "record": lambda cache, value: record(cache, 1.0, num_tokens=value),
    "commit": lambda cache, value: cache.commit(cache.acquire([1, 2]), value),
    "evict hot": lambda cache, value: cache.evict(Tier.HOT, value),
    "evict warm": lambda cache, value: cache.evict(Tier.WARM, value),
    "set_limit": lambda cache, value: cache.blocks.set_limit(value),
    "manage evict": lambda cache, value: cache.blocks.manage(evict=[value]),
    "manage pin": lambda cache, value: cache.blocks.manage(pin=[0, value]),
    "manage offload": lambda cache, value: cache.blocks.manage(offload=[value]),
    "unpin": lambda cache, value: cache.blocks.unpin([value]),
    "set_memory_budget": lambda cache, value: MemoryController(cache).set_memory_budget(value),
    "sample_every": lambda cache, value: MemoryProfiler(sample_every=value),
    "pool": lambda cache, value: MemoryTransferManager("cpu", pinned_memory_pool_size=value),
    "waiting": lambda cache, value: MemoryTransferManager("cpu", max_waiting_bytes=value),
    **{
        name: lambda cache, value, name=name: CacheConfig(**{name: value})  # type: ignore[misc]
        for name in ("block_size", "hot_bytes", "warm_bytes", "cold_bytes", "min_free_bytes", "num_io_threads")
    },
    "min_partial_tokens": lambda cache, value: CacheConfig(min_partial_tokens=value),
    "piece_tokens": lambda cache, value: CacheConfig(piece_tokens=value),
}


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_number_of_things_is_refused(cache: TierCache, name: str, value: object) -> None:
    before = cache.blocks.limit
    with pytest.raises(ConfigError):
        COUNTS[name](cache, value)
    assert cache.blocks.limit == before


OPTIONS: dict[str, list[object]] = {
    "cold_path": [3, "", "a\0b", b"a\0", True, []],
    "socket": [3, "", "a\0b", True, "~no-such-user-at-all/d.sock", "a\ud800"],
    "hot_fraction": [0, 1, math.nan, math.inf, True, "0.5", None],
    "gpu_decode": [1, "no", None],
    "write_through": [0, "no", None],
    "compute_or_load": [0, "no", None],
    "codec": ["bogus", None, 3, [], "", "Auto"],
    "warm_codec": ["bogus", None, 3, [], ""],
    "eviction_policy": ["bogus", None, 3, [], "", "learned:", "learned:/nonexistent", "learned:a\0b", "learned:/"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_an_option_that_cannot_be_is_refused_by_name(name: str, value: object) -> None:
    words = r"eviction policy|trained policy|not a path" if name == "eviction_policy" else name
    with pytest.raises(ConfigError, match=words):
        CacheConfig(**{name: value})  # type: ignore[arg-type]


def test_names_that_there_are_are_named() -> None:
    with pytest.raises(ConfigError, match="exponent16"):
        CacheConfig(codec="bogus")
    with pytest.raises(ConfigError, match="hit-density"):
        CacheConfig(eviction_policy="bogus")


def test_a_trained_policy_is_read_from_a_regular_file_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "deep").write_text("[" * 100_000)
    for name in (tmp_path / "fifo", tmp_path / "deep", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="trained policy"):
            CacheConfig(eviction_policy=f"learned:{name}")


@pytest.mark.parametrize("value", [None, 3, "bogus", "learned:", object(), str, EnvironmentError], ids=repr)
def test_what_is_no_policy_is_refused(cache: TierCache, value: Any) -> None:
    with pytest.raises(ConfigError, match="policy"):
        cache.set_eviction_policy(value)
    if value is not None:
        with pytest.raises(ConfigError, match="policy"):
            TierCache(
                CacheConfig(block_size=4, hot_bytes=1 << 12, warm_bytes=1 << 16),
                namespace=Namespace(weights="w", layout=tiny_layout()),
                policy=value if not isinstance(value, str) else make_policy(value),
            )
    cache.release(PatternEngine(cache).start(list(range(9))))


@pytest.mark.parametrize("value", [None, "hot", 3, Tier.COLD], ids=repr)
def test_what_is_no_tier_to_evict_from_is_refused(cache: TierCache, value: Any) -> None:
    with pytest.raises(ConfigError, match="tier"):
        cache.evict(value)


@pytest.mark.parametrize("value", [None, 3, "x", object()], ids=repr)
def test_what_is_no_observer_is_refused(cache: TierCache, value: Any) -> None:
    with pytest.raises(ConfigError, match="an observer has the methods"):
        cache.add_observer(value)
    cache.release(PatternEngine(cache).start(list(range(9))))


@pytest.mark.parametrize("value", [3, "x", 0.5], ids=repr)
def test_what_is_no_offloading_is_refused(cache: TierCache, value: Any) -> None:
    with pytest.raises(ConfigError, match="Offloading"):
        cache.blocks.set_offloading(value)
    with pytest.raises(ConfigError, match="offload_ratio"):
        Offloading(ratio=math.nan)
    with pytest.raises(ConfigError, match="offload_threshold"):
        MemoryController(cache).enable_cpu_offloading(offload_threshold=True)
    cache.release(PatternEngine(cache).start(list(range(9))))


@pytest.mark.parametrize("value", ["bogus", "cuda:x", None, object()], ids=repr)
def test_a_device_that_torch_does_not_know_is_refused(value: Any) -> None:
    config = CacheConfig(block_size=4, hot_bytes=1 << 12, warm_bytes=1 << 16)
    with pytest.raises(ConfigError, match="there is no device"):
        TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device=value)


PATHS: list[Any] = [None, 3, "", "a\0b", "\ud800", b"/tmp/\0", "x" * 5000, "/nonexistent/s.tkv", "/dev/null/s.tkv"]


@pytest.mark.parametrize("path", [*PATHS, "/", "/dev/full", "/proc/self/mem"], ids=lambda path: repr(path)[:20])
def test_a_path_that_cannot_be_a_state_file_is_an_error_of_tierkvs_own(cache: TierCache, path: Any) -> None:
    cache.release(PatternEngine(cache).start(list(range(9))))
    with pytest.raises(TierKVError):
        cache.load_cache_state(path)
    if path != "/dev/full" and path != "/proc/self/mem":
        with pytest.raises(TierKVError):
            cache.save_cache_state(path)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:20])
def test_a_report_that_cannot_be_written_is_an_error_of_tierkvs_own(cache: TierCache, path: Any) -> None:
    with MemoryProfiler(cache) as profiler:
        report = profiler.generate_report()
    for write in (report.save_html, report.export_trace):
        with pytest.raises(TierKVError):
            write(path)


def test_numbers_of_other_libraries_are_numbers() -> None:
    assert check_seconds("s", np.float32(0.5)) == 0.5
    assert check_count("n", np.int64(3)) == 3
    assert check_share("share", np.float64(1.0)) == 1.0
    assert type(CacheConfig(block_size=np.int32(16)).block_size) is int  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="be at least 7"):
        check_count("n", 6, least=7)
