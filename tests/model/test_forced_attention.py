"""Whole models with each attention backend forced give the logits of plain torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forced_attention import force_attention
from tiny_models import FAMILIES, VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionSwitch, PlainModel, SequenceStep, build_batch
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.flashinfer import FlashInferBackend
from tierkv.engine.graph_inputs import GraphInputs
from tierkv.engine.graphs import graph_shape
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Generation, GenerationOptions, Runner, open_runner
from tierkv.errors import ConfigError
from tierkv.storage.hot import HotPool

CPU = torch.device("cpu")
NAMES = ["flash-attn", "flashinfer-fa2", "flashinfer-fa3"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real modules are there: force them instead")


def generate(model: Any, folder: Path, **options: Any) -> tuple[list[Generation], Any]:
    """Return the answers to prompts of one batch, of which two share a prefix, and the backends that gave them."""
    config = CacheConfig(cold_path=folder, hot_bytes=8 << 20, warm_bytes=4 << 20, block_size=16, min_free_bytes=0)
    prompts = [list(range(1, 70)), [*range(1, 50), 7, 8], [300, 4, 9]]
    chosen = GenerationOptions(max_new_tokens=5, keep_logits=True)
    with open_runner(LoadedModel(model, None, "tiny"), config, max_step_tokens=40, **options) as runner:
        first = runner.generate(prompts, chosen)
        again = runner.generate([[*prompts[0], 11, 12, 13]], chosen)
        runner.cache.check()
        return [*first, *again], runner._pass.attention


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_same_logits_with_each_backend(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family in FAMILIES
    wanted, plain = generate(make_model(family, block_size=16), tmp_path / "torch", attention="torch")
    assert plain.is_forced
    force_attention(monkeypatch, name)
    found, choice = generate(make_model(family, block_size=16), tmp_path / "forced", cascade="off")
    (backend,) = choice.backends
    assert (choice.is_forced, backend.name) == (True, name)
    for got, want in zip(found, wanted, strict=True):
        assert got.token_ids == want.token_ids
        torch.testing.assert_close(got.logits, want.logits, atol=2e-4, rtol=1e-4)
    if isinstance(backend, FlashInferBackend):
        shapes = {layer for layer, _ in backend._slots}
        assert len(shapes) == (2 if family == "gemma2" else 1), "one plan for each kind of layer"
        assert all(slot.wrapper.plans == slot.planned for slot in backend._slots.values())
        assert sum(slot.planned for slot in backend._slots.values()) > 8, "one in each pass"


def test_a_forced_backend_that_is_not_there_fails_at_the_first_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"flashinfer-fa2: (flashinfer is not installed|it does not run on cpu)"):
        generate(make_model("llama", block_size=16), tmp_path / "store", attention="flashinfer-fa2")


def test_an_unknown_backend_is_refused_when_the_runner_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention must be one of"):
        generate(make_model("llama", block_size=16), tmp_path / "store", attention="fa2")


@pytest.mark.parametrize("name", ["flashinfer-fa2", "flashinfer-fa3"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("news", [[1, 1, 1], [20, 3], [100], [1, 1, 1, 40]], ids=str)
def test_a_graphs_inputs_are_planned_anew_in_each_step(
    news: list[int], family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph calls no Python: its kernels read the static inputs, and the plans that `fill` has made for them."""
    force_attention(monkeypatch, name)
    monkeypatch.setattr("tierkv.engine.attention.make_attention", lambda *_, **__: make_attention("auto", CPU))
    from tierkv.engine import runner as patched

    attention = patched.make_attention("auto", CPU)
    model = make_model(family, block_size=16)
    pool = HotPool(probe_layout(model, block_size=16), 60, CPU)
    pool.blocks.normal_(generator=torch.Generator().manual_seed(2))
    compute, cache = PlainModel(model), SimpleNamespace(config=SimpleNamespace(block_size=16), hot=pool)
    tables = [list(range(row * 15, row * 15 + 15)) for row in range(len(news))]
    with torch.inference_mode(), AttentionSwitch(model):
        shape = graph_shape(steps_of(tables, [9] * len(news), news), (), block_size=16)
        assert shape is not None
        any_cache: Any = cache
        inputs = GraphInputs(shape, any_cache, CPU, attention=attention)
        compute(inputs.token_ids, inputs.batch, inputs.last)  # as at the capture: nothing is filled in
        plans = [id(plan) for part in parts_of(inputs) for plan in part.plans.values()]
        for past in ([9] * len(news), [70, 33, 17, 90][: len(news)], [3] * len(news)):
            steps, ids = steps_of(tables, past, news), torch.arange(sum(news)) % VOCABULARY
            batch = build_batch(pool, steps, block_size=16, device=CPU)
            before = pool.blocks.clone()
            want = compute(ids, batch, torch.tensor(batch.query_starts[1:]) - 1).clone()
            pool.blocks.copy_(before)
            inputs.fill(steps, ids.tolist(), ())
            inputs.batch.seen_layers.clear()
            got = compute(inputs.token_ids, inputs.batch, inputs.last)
            torch.testing.assert_close(got[: len(news)], want, atol=2e-4, rtol=1e-4)
        assert plans == [id(plan) for part in parts_of(inputs) for plan in part.plans.values()]
        assert len(plans) == len(parts_of(inputs)) * (2 if family == "gemma2" else 1)


def steps_of(tables: list[list[int]], past: list[int], new: list[int]) -> list[SequenceStep]:
    rows = zip(tables, past, new, strict=True)
    return [SequenceStep(block_table=table, num_past=p, num_new=n) for table, p, n in rows]


def parts_of(inputs: GraphInputs) -> Any:
    return inputs.batch.parts or (inputs.batch,)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_a_split_model_wait_for_kernels_and_one_does_not(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks must run the same graphs: none may go on with another backend meanwhile."""
    asked: list[dict[str, Any]] = []

    def make(name: str, device: torch.device, **options: Any) -> Any:
        asked.append({"name": name, **options})
        return make_attention(name, device, **options)

    monkeypatch.setattr("tierkv.engine.runner.make_attention", make)
    config = CacheConfig(cold_path=tmp_path, hot_bytes=8 << 20, warm_bytes=4 << 20, block_size=16, min_free_bytes=0)
    loaded = LoadedModel(make_model("llama", block_size=16), None, "tiny")
    with open_runner(loaded, config) as runner:
        ranks: Any = SimpleNamespace(size=size)
        monkeypatch.setattr(runner.cache, "ranks", ranks)
        asked.clear()
        Runner(loaded, runner.cache, fuse="off", use_graphs=False)
    assert asked == [{"name": "auto", "table": None, "num_layers": 3, "waits": size > 1}]
