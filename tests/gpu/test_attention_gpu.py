"""The choice among attention backends in a runner on a GPU: compiled beside requests, then captured in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from tierkv.config import CacheConfig
from tierkv.engine.backends.flashinfer import _GraphPlan
from tierkv.engine.backends.measured import AttentionTable, MeasuredPoint, save_table
from tierkv.engine.graph_inputs import GraphShape
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner

PAST, NEW = 17 * 256, 10  # whole blocks, so that only the new tokens are computed
FASTER = MeasuredPoint(
    heads=4,
    kv_heads=2,
    head_dim=64,
    sequences=1,
    new=16,
    kv=4096,
    us={"flash-attn": 100.0, "flashinfer-fa2": 1.0},
    plan_us={"flashinfer-fa2": 1.0},
)


@contextmanager
def opened(folder: Path, attention: str, table: Path | None = None) -> Iterator[Runner]:
    model = make_model("llama", block_size=256, device="cuda", dtype=torch.bfloat16)
    config = CacheConfig(cold_path=folder, hot_bytes=256 << 20, warm_bytes=64 << 20, min_free_bytes=0)
    loaded = LoadedModel(model, None, "tiny")
    with open_runner(loaded, config, attention=attention, attention_table=table) as runner:
        yield runner


def logits_of(runner: Runner, number: int) -> torch.Tensor:
    """Return the logits of a request with a few new tokens behind a long prefix."""
    prompt = [i % 500 for i in range(PAST)] + [number + i for i in range(NEW)]
    options = GenerationOptions(max_new_tokens=1, keep_logits=True, store_partial=False)
    (answer,) = runner.generate([prompt], options)
    assert answer.logits is not None
    return answer.logits


def test_a_backend_is_compiled_beside_requests_and_then_in_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer")
    table = tmp_path / "table.json"
    save_table(AttentionTable(device=torch.cuda.get_device_name(), points=(FASTER,)), table)
    with opened(tmp_path / "flash", "flash-attn") as runner:
        wanted = [logits_of(runner, number) for number in range(6)]
    with opened(tmp_path / "auto", "auto", table) as runner:
        found = [logits_of(runner, 0), logits_of(runner, 1)]
        runner.wait_for_kernels()
        found += [logits_of(runner, number) for number in range(2, 6)]
        assert runner._pass.graphs is not None
        graph = runner._pass.graphs._graphs[GraphShape(1, 16, 32)]
        (plan,) = graph.inputs.batch.plans.values()
        assert isinstance(plan, _GraphPlan)
        runner.cache.check()
    for got, want in zip(found, wanted, strict=True):
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert float(error) <= 4e-2


@pytest.mark.parametrize("name", ["torch", "flashinfer-fa2", "flashinfer-fa3"])
def test_a_forced_backend_has_the_logits_of_flash_attn(name: str, tmp_path: Path) -> None:
    if name != "torch":
        pytest.importorskip("flashinfer")
    with opened(tmp_path / "flash", "flash-attn") as runner:
        wanted = [logits_of(runner, number) for number in range(4)]
    with opened(tmp_path / name, name) as runner:
        found = [logits_of(runner, number) for number in range(4)]
        assert runner._pass.graphs is not None
        assert bool(runner._pass.graphs._graphs) == (name != "torch")
        runner.cache.check()
    for got, want in zip(found, wanted, strict=True):
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert float(error) <= 4e-2
