"""The three usage examples of the project's plan, nearly as they are written there; and decoding over moved blocks.

What differs: a controller is attached to the cache that it steers, and a profiler is told which cache to watch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from tierkv import CacheConfig, EvictionPolicy, MemoryController, MemoryProfiler
from tierkv.eviction import CacheBlock
from tierkv.models import LoadedModel
from tierkv.runner import GenerationOptions, Runner, open_runner

OPTIONS = GenerationOptions(max_new_tokens=8, stop_ids=frozenset())
PROMPTS = [[*range(1, 41), number] for number in range(3)]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    loaded = LoadedModel(make_model("qwen3", block_size=16), None, "tiny")
    config = CacheConfig(
        cold_path=tmp_path / "store", block_size=16, hot_bytes=1 << 20, warm_bytes=1 << 20, min_free_bytes=0
    )
    with open_runner(loaded, config) as runner:
        yield runner


def test_example_1_manual_cache_control(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    memory_ctrl = MemoryController()
    memory_ctrl.set_memory_budget(8 * 1024**3)  # 8GB
    memory_ctrl.set_eviction_policy("adaptive_lru")
    memory_ctrl.attach(runner.cache)

    with memory_ctrl.profile() as prof:
        for prompt in PROMPTS:
            runner.generate([prompt], OPTIONS)

    stats = memory_ctrl.get_memory_stats()
    print(f"Cache hit rate: {stats['cache_hit_rate']:.2%}")
    print(f"Memory fragmentation: {stats['fragmentation']:.2%}")
    assert capsys.readouterr().out == f"Cache hit rate: {stats['cache_hit_rate']:.2%}\nMemory fragmentation: 0.00%\n"
    assert stats["cache_hit_rate"] > 0.4
    assert prof.generate_report()

    ids = [state.block_id for state in runner.cache.blocks.inspect()]
    done = memory_ctrl.manual_cache_management(evict_blocks=ids[-1:], pin_blocks=ids[:1], offload_blocks=ids[-2:-1])
    assert (done.evicted, done.pinned, done.offloaded) == (tuple(ids[-1:]), tuple(ids[:1]), tuple(ids[-2:-1]))
    runner.cache.check()


def test_example_2_custom_eviction_policy(runner: Runner) -> None:
    class PrefixAwarePolicy(EvictionPolicy):
        """Keep common prefixes in cache."""

        def score_block(self, block: CacheBlock) -> float:
            if block.is_prefix_block:
                return -1.0  # Never evict
            return super().score_block(block)

    memory_ctrl = MemoryController(runner.cache)
    memory_ctrl.set_eviction_policy(PrefixAwarePolicy())
    memory_ctrl.set_memory_budget(4 * runner.cache.layout.block_bytes)
    first = [7] * 17
    runner.generate([first], OPTIONS)
    for number in range(6):  # each a chain of its own, whose end goes before any beginning
        runner.generate([[100 + number] * 34], OPTIONS)
    left = [state.depth for state in runner.cache.blocks.inspect()]
    assert left and all(depth == 0 for depth in left[:-1])
    runner.cache.check()


def test_example_3_memory_profiling(runner: Runner, tmp_path: Path) -> None:
    profiler = MemoryProfiler(runner.cache)

    for batch in ([prompt] for prompt in PROMPTS):
        profiler.start_iteration()
        runner.generate(batch, OPTIONS)
        profiler.end_iteration()

    report = profiler.generate_report()
    report.save_html(tmp_path / "memory_profile.html")
    report.export_trace(tmp_path / "trace.json")  # For Chrome Tracing
    profiler.close()
    assert "<svg" in (tmp_path / "memory_profile.html").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_defragmentation_during_decoding_leaves_logits_unchanged(runner: Runner) -> None:
    options = GenerationOptions(max_new_tokens=24, stop_ids=frozenset(), keep_logits=True)
    want = [result.logits for result in runner.generate(PROMPTS, options)]
    controller = MemoryController(runner.cache)
    runner.cache.evict(runner_tier := next(iter(runner.cache.stats().tiers)), 3)  # holes in the pool
    assert runner_tier.value == "hot"
    moved = 0
    events = runner.stream(PROMPTS, options)
    tokens: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    for number, event in enumerate(events):
        tokens[event.prompt].append(event.token_id)
        if number % 9 == 8:
            runner.cache.evict(runner_tier, 1)
            moved += len(controller.optimize_memory_layout().moved)
    assert moved, "nothing was moved"
    for number, logits in enumerate(want):
        assert logits is not None
        assert tokens[number] == logits.argmax(-1).tolist()
    again = [result.logits for result in runner.generate(PROMPTS, options)]
    for before, after in zip(want, again, strict=True):
        assert before is not None and after is not None
        assert torch.allclose(before, after, atol=1e-4)
    runner.cache.check()
