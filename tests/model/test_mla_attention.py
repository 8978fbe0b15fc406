"""Attention over latents against its definition, in both ways."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import Place
from tiny_models import VOCABULARY, make_model
from torch import Tensor

from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.mla import attention as mla_attention
from tierkv.engine.mla.attention import MlaAttention, is_expanding_cheaper
from tierkv.engine.mla.layers import MlaInput
from tierkv.engine.mla.model import LatentAttention
from tierkv.engine.model_support import probe_layout
from tierkv.errors import ShapeError
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

HEADS, RANK, NOPE, ROPE, V = 3, 40, 24, 16, 32
SIZE = 8


def a_layer(**dims: int) -> Any:
    """A layer of random float64 weights; only its projections of the latent are used."""
    found = {"index": 1, "heads": HEADS, "rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "v_dim": V} | dims
    layer = SimpleNamespace(**found, latent_dim=found["rank"] + found["rope_dim"], scale=0.3)
    generator = torch.Generator().manual_seed(1)
    shape = (found["heads"], found["nope_dim"] + found["v_dim"], found["rank"])
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    layer.key_weight, layer.value_weight = weight[:, : layer.nope_dim], weight[:, layer.nope_dim :]
    return layer


def defined(layer: Any, query: Tensor, query_rope: Tensor, latents: Tensor) -> Tensor:
    """Causal attention of the last tokens over expanded K and V, head by head and query by query."""
    out = query.new_empty(query.shape[0], layer.heads, layer.v_dim)
    past = latents.shape[0] - query.shape[0]
    for head in range(layer.heads):
        keys = torch.cat((latents[:, : layer.rank] @ layer.key_weight[head].T, latents[:, layer.rank :]), dim=-1)
        values = latents[:, : layer.rank] @ layer.value_weight[head].T
        for at in range(query.shape[0]):
            whole = torch.cat((query[at, head], query_rope[at, head]))
            weights = torch.softmax(keys[: past + at + 1] @ whole * layer.scale, dim=0)
            out[at, head] = weights @ values[: past + at + 1]
    return out


LENGTHS = [(0, 5), (3, 1), (8, 8), (21, 1), (15, 9), (0, 1), (30, 20)]  # of past and new tokens


@pytest.fixture
def step() -> dict[str, Any]:
    """A packed pass of several sequences over a pool that has their past, and what it should give."""
    layer = a_layer()
    layout = BlockLayout(block_size=SIZE, dtype="float64", layers=(LayerLayout.of_latent(RANK + ROPE),) * 2)
    pool = HotPool(layout, 40, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    free = torch.randperm(40, generator=generator).tolist()
    pool.blocks.fill_(math.nan)  # what no token has written must not be read
    steps, news, wanted = [], [], []
    for past, new in LENGTHS:
        table = [free.pop() for _ in range(-(-(past + new) // SIZE))]
        latents = torch.randn(past + new, layer.latent_dim, dtype=torch.float64, generator=generator)
        for at in range(past):
            pool.key_cache(1)[table[at // SIZE], at % SIZE, 0] = latents[at]
        query = torch.randn(new, HEADS, NOPE, dtype=torch.float64, generator=generator)
        rope = torch.randn(new, HEADS, ROPE, dtype=torch.float64, generator=generator)
        steps.append(SequenceStep(block_table=table, num_past=past, num_new=new))
        news.append((query, rope, latents[past:]))
        wanted.append(defined(layer, query, rope, latents))
    query, rope, latent = (torch.cat(each) for each in zip(*news, strict=True))
    batch = build_batch(pool, steps, block_size=SIZE, device=torch.device("cpu"))
    new = MlaInput(query=query, query_rope=rope, latent=latent)
    return {"layer": layer, "new": new, "pool": pool, "batch": batch, "wanted": torch.cat(wanted)}


@pytest.mark.parametrize("way", ["absorbed", "expanded", "the cheaper"])
def test_both_ways_are_the_definition(step: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MlaAttention()
    attention.always = None if way == "the cheaper" else way
    monkeypatch.setattr(mla_attention, "is_expanding_cheaper", lambda layer, num_new, length: num_new > 5)
    got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
    torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)
    counts = {"absorbed": (7, 0), "expanded": (0, 7), "the cheaper": (4, 3)}
    assert (attention.absorbed, attention.expanded) == counts[way]


def test_heads_are_expanded_a_few_at_a_time(step: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_attention, "_EXPANDED_BYTES", 1)
    attention = MlaAttention()
    with attention.only("expanded"):
        got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
    torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)


def test_the_path_of_a_gpu_without_a_library_is_the_definition(
    step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_attention, "_attend_latents", mla_attention._attend_wide)
    monkeypatch.setattr(mla_attention, "_attend_cpu", mla_attention._attend_gpu)
    for score_bytes in (1 << 20, 1):
        monkeypatch.setattr(mla_attention, "_SCORE_BYTES", score_bytes)
        for way in ("absorbed", "expanded"):
            attention = MlaAttention()
            attention.always = way
            got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
            torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)


def test_values_wider_than_keys_are_attended_too() -> None:
    layer = a_layer(nope_dim=4, v_dim=64)
    generator = torch.Generator().manual_seed(4)
    query, rope, latents = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((5, HEADS, 4), (5, HEADS, ROPE), (11, RANK + ROPE))
    )
    out = torch.empty(5, HEADS, 64, dtype=torch.float64)
    new = MlaInput(query=query, query_rope=rope, latent=latents[6:])
    mla_attention._attend_expanded(layer, new, slice(5), latents, out)
    torch.testing.assert_close(out, defined(layer, query, rope, latents), rtol=1e-9, atol=1e-9)


def test_a_cache_of_another_layout_is_refused(step: dict[str, Any]) -> None:
    step["layer"].latent_dim += 1
    with pytest.raises(ShapeError):
        MlaAttention().attend(step["layer"], step["new"], step["pool"], step["batch"])


@pytest.mark.parametrize(
    ("num_new", "length", "is_expanded"),
    [
        (1, 8192, False),
        (32, 8192, False),
        (128, 32768, False),
        (256, 32768, True),
        (8192, 8192, True),
        (31, 31, False),
        (32, 32, True),
    ],
)
def test_the_arithmetic_decides_with_deepseeks_dims(num_new: int, length: int, is_expanded: bool) -> None:
    layer = SimpleNamespace(rank=512, rope_dim=64, nope_dim=128, v_dim=128)
    assert is_expanding_cheaper(layer, num_new, length) == is_expanded  # type: ignore[arg-type]


class _LateLoad:
    """A load whose bytes of a layer arrive when that layer waits for them."""

    def __init__(self, source: HotPool, target: HotPool) -> None:
        self.waited: list[int] = []
        self._source, self._target = source, target

    def wait_layer(self, layer: int) -> None:
        self.waited.append(layer)
        self._target.key_cache(layer)[:] = self._source.key_cache(layer)


def test_each_layer_waits_for_its_cached_latents() -> None:
    model = make_model("deepseek_v2", block_size=16)
    latent = LatentAttention(model)
    layout = probe_layout(model, block_size=16, latent=latent)
    prompt = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    computed, loaded = (HotPool(layout, 3, torch.device("cpu")) for _ in range(2))
    loaded.blocks.fill_(math.nan)
    load = _LateLoad(computed, loaded)
    with torch.inference_mode(), use_tierkv_attention(model), latent:
        for pool, past, new in ((computed, 0, 32), (loaded, 32, 8)):
            step = SequenceStep(
                block_table=[2, 0, 1], num_past=past, num_new=new, loads=load if pool is loaded else None
            )
            batch = build_batch(pool, [step], block_size=16, device=torch.device("cpu"))
            logits = forward(model, torch.tensor(prompt[past : past + new]), batch)
    Place("cpu", torch.float32, 16).assert_logits(logits, model, prompt, first=32)
    assert load.waited == [0, 1, 2]
