"""The three usage examples that this project began with, nearly as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place
from tiny_models import VOCABULARY, make_model

from tierkv import CacheConfig, EvictionPolicy, MemoryController, MemoryProfiler
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.policies import CacheBlock
from tierkv.values.block import Tier

NUM_HOT = 32


@pytest.fixture
def model(place: Place, tmp_path: Path) -> Iterator[Runner]:
    """Return a runner of a tiny model: what `model` is in the examples."""
    plain: Any = make_model("qwen3", block_size=place.block_size, device=place.device, dtype=place.dtype)
    block_bytes = probe_layout(plain, block_size=place.block_size).block_bytes
    config = CacheConfig(
        cold_path=tmp_path / "store",
        block_size=place.block_size,
        hot_bytes=NUM_HOT * block_bytes,
        warm_bytes=NUM_HOT * block_bytes,
        min_free_bytes=0,
    )
    with open_runner(LoadedModel(plain, None, "tiny"), config) as runner:
        yield runner


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def test_example_1_manual_cache_control(
    model: Runner, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [tokens(8 * place.block_size, seed=seed) for seed in range(3)]
    max_new_tokens = 4

    # Initialize with custom configuration
    memory_ctrl = MemoryController()
    memory_ctrl.set_memory_budget(8 * 1024**3)  # 8GB
    memory_ctrl.set_eviction_policy("adaptive_lru")
    memory_ctrl.attach(model)

    # Run inference with monitoring
    with memory_ctrl.profile() as prof:
        output = model.generate(prompts, GenerationOptions(max_new_tokens=max_new_tokens))
        again = model.generate(prompts, GenerationOptions(max_new_tokens=max_new_tokens))

    # Inspect memory state
    stats = memory_ctrl.get_memory_stats()
    print(f"Cache hit rate: {stats['cache_hit_rate']:.2%}")
    print(f"Memory fragmentation: {stats['fragmentation']:.2%}")

    # Manual cache management
    model.cache.flush()
    done = memory_ctrl.manual_cache_management(
        evict_blocks=[1, 5, 7],  # Evict specific blocks
        pin_blocks=[10, 11, 12],  # Pin important blocks
        offload_blocks=[20, 21],  # Offload to CPU
    )

    assert [len(each.token_ids) for each in output] == [max_new_tokens] * 3
    assert [each.token_ids for each in again] == [each.token_ids for each in output]
    asked = 2 * 3 * 8
    found = 3 * 8  # the second time every block, the last of each but for its last token
    assert stats["cache_hit_rate"] == found / asked
    assert "Cache hit rate: 50.00%" in capsys.readouterr().out
    assert stats["budget_bytes"] == NUM_HOT * model.cache.layout.block_bytes  # what the pool has
    assert done.pinned == (10, 11, 12)
    for block_id in (1, 5, 7, 20, 21):  # a chain is given up from its end only: the others say why they stayed
        gone = block_id in (*done.evicted, *done.offloaded)
        assert gone or done.refused[block_id] in ("blocks that continue it are hot", "it is pinned")
    states = {state.block_id: state for state in model.cache.blocks.inspect()}
    assert all(states[block_id].pinned for block_id in done.pinned)
    assert not {*done.evicted, *done.offloaded} & set(states)
    assert prof.generate_report().save_html(tmp_path / "run.html").stat().st_size > 0
    model.cache.check()


class PrefixAwarePolicy(EvictionPolicy):
    """Keep common prefixes in cache"""

    def score_block(self, block: CacheBlock) -> float:
        if block.is_prefix_block:
            return -1.0  # Never evict
        return super().score_block(block)


def test_example_2_custom_eviction_policy(model: Runner, place: Place) -> None:
    memory_ctrl = MemoryController(model)
    memory_ctrl.set_eviction_policy(PrefixAwarePolicy())

    size = place.block_size
    common = tokens(2 * size, seed=1)
    one_token = GenerationOptions(max_new_tokens=1, store_partial=False)  # partial blocks take warm slots
    for seed in (2, 3):
        model.generate([[*common, *tokens(size, seed=seed), 1]], one_token)
    for seed in range(10, 40):  # none of them begins with it: by LRU it would go first
        model.generate([tokens(3 * size, seed=seed)], one_token)
        assert model.cache.match(common).blocks[Tier.HOT] == 2
    assert memory_ctrl.get_memory_stats()["tiers"]["hot"]["evictions"] > 0

    memory_ctrl.set_eviction_policy("lru")
    for seed in range(50, 80):
        model.generate([tokens(3 * size, seed=seed)], one_token)
    assert model.cache.match(common).blocks[Tier.HOT] == 0
    model.cache.check()


def test_example_3_memory_profiling(model: Runner, place: Place, tmp_path: Path) -> None:
    prompts = [tokens(2 * place.block_size + n, seed=n % 2) for n in range(4)]
    dataloader = [prompts[:2], prompts[2:], prompts]

    profiler = MemoryProfiler()
    profiler.observe(model.cache)

    # Run workload
    for batch in dataloader:
        profiler.start_iteration()
        model.generate(batch, GenerationOptions(max_new_tokens=2))
        profiler.end_iteration()

    # Generate report
    report = profiler.generate_report()
    page = report.save_html(tmp_path / "memory_profile.html")
    trace = report.export_trace(tmp_path / "trace.json")  # For Chrome Tracing

    assert len(report.run.iterations) == len(dataloader)
    assert [each.requests for each in report.run.iterations] == [len(batch) for batch in dataloader]
    assert "<html" in page.read_text("utf-8")
    assert json.loads(trace.read_text("utf-8"))["traceEvents"]
