"""Latents go through every tier and feature that K and V go through, and come back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_model import CachedModel
from daemon_fixtures import short_path, start_daemon
from daemon_process import Start
from engine_requests import greedy, tokens
from places import Place
from tiny_models import make_model

from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace, NamespaceMismatchError, Strided
from tierkv.config import CacheConfig
from tierkv.engine.engine import Engine
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Runner, open_runner
from tierkv.values.block import Tier
from tierkv.values.layout import LayerLayout

__all__ = ["short_path", "start_daemon"]

SIZE = 16
BLOCK_BYTES = 3 * SIZE * 64 * 4  # of tiny_models' DeepSeek models: 3 layers, latents of 48 and 16 float32
CPU = Place("cpu", torch.float32, SIZE)
Open = Callable[..., Runner]


@pytest.fixture
def v2() -> Any:
    return make_model("deepseek_v2 with q_lora and yarn", block_size=SIZE)


@pytest.fixture
def open_one() -> Iterator[Open]:
    opened: list[Any] = []

    def open_runner_of(model: Any, *, hot: int = 64, mla: str = "latent", **options: Any) -> Runner:
        config = CacheConfig(block_size=SIZE, hot_bytes=hot * BLOCK_BYTES, min_free_bytes=0, **options)
        opened.append(open_runner(LoadedModel(model, None, "tiny"), config, mla=mla))
        runner: Runner = opened[-1].__enter__()
        return runner

    yield open_runner_of
    for context in opened:
        context.__exit__(None, None, None)


def test_preempted_requests_go_on_with_the_same_tokens(v2: Any, open_one: Open, tmp_path: Path) -> None:
    runner = open_one(v2, hot=9, warm_bytes=64 * BLOCK_BYTES, cold_path=tmp_path)
    prompts = [tokens(20 + i, seed=i) for i in range(5)]
    want = [runner.generate([each], greedy(40))[0].token_ids for each in prompts]
    runner.cache.evict_everywhere()
    with Engine(runner) as engine:
        streams = [engine.submit(each, greedy(40), priority=i) for i, each in enumerate(prompts)]
        assert [each.result().token_ids for each in streams] == want
        assert engine.stats().preempted
    runner.cache.check()


def test_a_fork_has_a_latent_of_its_own_from_there_on(v2: Any, tmp_path: Path) -> None:
    prompt = tokens(2 * SIZE + 5)
    with CachedModel(v2, tmp_path, block_size=SIZE, hot=16, warm=8) as cached:
        (first,), _ = cached.start([prompt])
        second = cached.cache.fork(first)
        for seed in range(2):
            new = [tokens(3, seed=10 + seed), tokens(3, seed=20 + seed)]
            for sequence, added, got in zip([first, second], new, cached.decode([first, second], new), strict=True):
                CPU.assert_logits(got, v2, sequence.token_ids.tolist(), first=sequence.num_tokens - len(added))
        cached.release([first, second])


def test_a_state_file_brings_latents_back_and_is_refused_for_k_and_v(v2: Any, open_one: Open, tmp_path: Path) -> None:
    prompt = tokens(3 * SIZE + 4)
    runner = open_one(v2, warm_bytes=32 * BLOCK_BYTES)
    (want,) = runner.generate([prompt], greedy(3, keep_logits=True))
    assert runner.cache.save_cache_state(tmp_path / "state").blocks >= 3
    again = open_one(v2, warm_bytes=32 * BLOCK_BYTES)
    again.cache.load_cache_state(tmp_path / "state")
    (got,) = again.generate([prompt], greedy(3, keep_logits=True))
    assert got.cached_tokens[Tier.COLD] >= 3 * SIZE and got.token_ids == want.token_ids
    assert got.logits is not None and want.logits is not None
    assert float((got.logits - want.logits).abs().max()) <= 1e-4
    expanded = open_one(v2, hot=320, warm_bytes=160 * BLOCK_BYTES, mla="expanded")
    with pytest.raises(NamespaceMismatchError, match=r"architecture\.mla"):
        expanded.cache.load_cache_state(tmp_path / "state")


def test_a_daemon_holds_latents_for_the_next_process(v2: Any, open_one: Open, start_daemon: Start) -> None:
    daemon = start_daemon(warm_bytes=1 << 20)
    prompt = tokens(3 * SIZE + 4)
    results = []
    for _ in range(2):
        runner = open_one(v2, socket=daemon.socket)
        (got,) = runner.generate([prompt], greedy(3, keep_logits=True))
        runner.cache.flush()
        runner.cache.close()
        results.append(got)
    first, second = results
    assert sum(first.cached_tokens.values()) == 0 and second.cached_tokens[Tier.WARM] >= 3 * SIZE
    assert second.token_ids == first.token_ids
    CPU.assert_logits(second.logits, v2, [*prompt, *second.token_ids[:-1]], first=len(prompt) - 1)


def test_a_compressed_warm_tier_holds_latents_exactly(tmp_path: Path) -> None:
    model = make_model("deepseek_v3", block_size=SIZE, dtype=torch.bfloat16)
    block_bytes = BLOCK_BYTES // 2
    config = CacheConfig(
        block_size=SIZE,
        hot_bytes=9 * block_bytes,
        warm_bytes=64 * block_bytes,
        warm_codec="windows",
        min_free_bytes=0,
    )
    prompts = [tokens(3 * SIZE + 4, seed=i) for i in range(5)]
    with open_runner(LoadedModel(model, None, "tiny"), config) as runner:
        assert runner.cache.layout.is_latent and runner.cache.layout.dtype == "bfloat16"
        wanted = runner.generate(prompts, greedy(1, keep_logits=True))
        runner.cache.flush()
        sequence = runner.cache.acquire(prompts[4])
        before = runner.cache.hot.blocks[sequence.block_table[:3]].clone()
        runner.cache.release(sequence)
        runner.cache.evict(Tier.HOT)
        sequence = runner.cache.acquire(prompts[4])
        sequence.wait_layer(2)
        assert sequence.cached_tokens[Tier.WARM] >= 3 * SIZE
        assert torch.equal(runner.cache.hot.blocks[sequence.block_table[:3]], before)
        runner.cache.release(sequence)
        found = 0  # a block of random numbers may have too many escapes, and is not kept
        for prompt, want in zip(prompts, wanted, strict=True):
            (got,) = runner.generate([prompt], greedy(1, keep_logits=True))
            found += got.cached_tokens[Tier.WARM]
            assert got.logits is not None and want.logits is not None
            error = (got.logits - want.logits).float().square().mean() / want.logits.float().square().mean()
            assert float(error.sqrt()) < 0.3  # experts may differ by a rounding
        assert found > 10 * SIZE


def test_a_block_store_takes_and_gives_an_engines_latents(tmp_path: Path) -> None:
    """An engine's own tensors, one a layer: [pages, tokens, latent]."""
    layout = BlockLayout(block_size=8, dtype="bfloat16", layers=(LayerLayout.of_latent(40),) * 3)
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=32 * layout.block_bytes)
    namespace = Namespace(weights="w", layout=layout)
    layers = [[torch.randn(12, 4, 40).bfloat16()] for _ in range(3)]
    before = [layer[0].clone() for layer in layers]
    with BlockStore(config, namespace=namespace) as store:
        memory = store.register(layers, pages_per_block=2)
        keys = store.keys(range(5 * 8))
        assert store.save(keys, Strided(memory, [[0, 7], [1, 8], [2, 9], [3, 4], [11, 10]])).num_saved == 5
    for (tensor,) in layers:
        tensor.zero_()
    with BlockStore(config, namespace=namespace) as store:
        load = store.load(store.reserve(keys), Strided(store.register(layers, pages_per_block=2), [[5, 6], [0, 1]]))
        load.synchronize()
        assert load.num_loaded == 2
    for (tensor,), then in zip(layers, before, strict=True):
        assert all(torch.equal(tensor[at], then[was]) for at, was in ((5, 0), (6, 7), (0, 1), (1, 8)))
