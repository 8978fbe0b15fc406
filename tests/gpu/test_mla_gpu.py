"""MLA on a real GPU: FlashInfer over the strided pool, torch without it, and what is beyond FlashInfer's addresses.

Each result is compared with the definition in float64 on numbers of 16 bits.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import Tensor

from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch
from tierkv.engine.mla.attention import MlaAttention
from tierkv.engine.mla.flashinfer import MAX_SPAN, FlashInferMla, flashinfer_kernel
from tierkv.engine.mla.layers import MlaInput
from tierkv.engine.mla.model import choose_mla
from tierkv.ranks.group import OneRank
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

RANK, ROPE, NOPE, V = 512, 64, 128, 128
NUM_LAYERS, LAYER = 3, 1
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
needs_flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="no flashinfer")

DECODE = [(8191, 1), (1, 1), (256, 1), (300, 1), (2047, 1)]
SHORT = [(8192, 32), (0, 7), (511, 1), (255, 130), (64, 64)]
LONG = [(0, 700), (3000, 400)]


def a_layer(heads: int, dtype: torch.dtype) -> Any:
    layer = SimpleNamespace(
        index=LAYER, heads=heads, rank=RANK, nope_dim=NOPE, rope_dim=ROPE, v_dim=V, latent_dim=RANK + ROPE
    )
    layer.scale = (NOPE + ROPE) ** -0.5
    weight = torch.randn(heads, NOPE + V, RANK, device="cuda", dtype=dtype) * RANK**-0.5
    layer.key_weight, layer.value_weight = weight[:, :NOPE], weight[:, NOPE:]
    return layer


def defined(layer: Any, query: Tensor, rope: Tensor, latents: Tensor) -> Tensor:
    """Causal attention over expanded K and V, in float64."""
    query, rope, latents, keys, values = (
        each.double() for each in (query, rope, latents, layer.key_weight, layer.value_weight)
    )
    past = latents.shape[0] - query.shape[0]
    hidden = torch.ones(query.shape[0], latents.shape[0], dtype=torch.bool, device="cuda").triu(past + 1)
    parts = []
    for head in range(layer.heads):
        whole = torch.cat((latents[:, :RANK] @ keys[head].T, latents[:, RANK:]), dim=-1)
        scores = torch.cat((query[:, head], rope[:, head]), dim=-1) @ whole.T * layer.scale
        parts.append(scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ (latents[:, :RANK] @ values[head].T))
    return torch.stack(parts, dim=1)


def a_pass(
    lengths: list[tuple[int, int]], layer: Any, *, block_size: int, dtype: torch.dtype, num_blocks: int = 0
) -> tuple[MlaInput, HotPool, AttentionBatch, Tensor]:
    """Return a pass over sequences whose blocks lie in any order in the pool, and what it should give."""
    blocks = [-(-(past + new) // block_size) for past, new in lengths]
    name = str(dtype).removeprefix("torch.")
    layout = BlockLayout(block_size=block_size, dtype=name, layers=(LayerLayout.of_latent(RANK + ROPE),) * NUM_LAYERS)
    pool = HotPool(layout, max(num_blocks, sum(blocks) + 3), torch.device("cuda"))
    free = torch.randperm(pool.num_blocks).tolist()
    if num_blocks:
        free = sorted(free)  # the last ones are taken first: they lie beyond 32 bits
    steps, news, wanted = [], [], []
    for (past, new), count in zip(lengths, blocks, strict=True):
        table = [free.pop() for _ in range(count)]
        latents = torch.randn(past + new, layer.latent_dim, device="cuda", dtype=dtype)
        whole = torch.full((count * block_size, layer.latent_dim), torch.nan, device="cuda", dtype=dtype)
        whole[:past] = latents[:past]
        pool.key_cache(LAYER)[table] = whole.view(count, block_size, 1, -1)
        query = torch.randn(new, layer.heads, NOPE, device="cuda", dtype=dtype)
        rope = torch.randn(new, layer.heads, ROPE, device="cuda", dtype=dtype)
        steps.append(SequenceStep(block_table=table, num_past=past, num_new=new))
        news.append((query, rope, latents[past:]))
        wanted.append(defined(layer, query, rope, latents))
    query, rope, latent = (torch.cat(each) for each in zip(*news, strict=True))
    batch = build_batch(pool, steps, block_size=block_size, device=torch.device("cuda"))
    return MlaInput(query=query, query_rope=rope, latent=latent), pool, batch, torch.cat(wanted)


def kernel_of(layer: Any, dtype: torch.dtype) -> FlashInferMla:
    model: Any = SimpleNamespace(device="cuda", dtype=dtype)
    return flashinfer_kernel(model, [layer])


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert torch.isfinite(got).all()
    assert float(error) < TOLERANCE[dtype], f"relative error {float(error):.4f}"


@needs_flashinfer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [256, 64, 16])
@pytest.mark.parametrize("lengths", [DECODE, SHORT], ids=["decode", "short"])
@pytest.mark.parametrize("heads", [16, 128])
def test_flashinfer_reads_the_strided_pool_in_place(
    heads: int, lengths: list[tuple[int, int]], block_size: int, dtype: torch.dtype
) -> None:
    layer = a_layer(heads, dtype)
    kernel = kernel_of(layer, dtype)
    attention = MlaAttention(kernel)
    for _ in range(2):  # the second plan uses the buffers of the first
        new, pool, batch, want = a_pass(lengths, layer, block_size=block_size, dtype=dtype)
        with attention.only("absorbed"):
            check(attention.attend(layer, new, pool, batch), want, dtype)
    assert kernel.copied_passes == 0


@needs_flashinfer
def test_a_pool_beyond_32_bits_is_read_right() -> None:
    dtype = torch.bfloat16
    block_numbers = 256 * (RANK + ROPE) * NUM_LAYERS
    num_blocks = MAX_SPAN // block_numbers + 400
    layer = a_layer(16, dtype)
    kernel = kernel_of(layer, dtype)
    attention = MlaAttention(kernel)
    new, pool, batch, want = a_pass(DECODE, layer, block_size=256, dtype=dtype, num_blocks=num_blocks)
    assert int(batch.block_table[0, 0]) * block_numbers > MAX_SPAN
    with attention.only("absorbed"):
        check(attention.attend(layer, new, pool, batch), want, dtype)
    assert kernel.copied_passes == 1


@needs_flashinfer
def test_many_short_prompts_are_planned_in_groups() -> None:
    dtype = torch.bfloat16
    layer = a_layer(128, dtype)
    attention = MlaAttention(kernel_of(layer, dtype))
    new, pool, batch, want = a_pass([(5, 130)] * 40, layer, block_size=64, dtype=dtype)  # 10,400 tiles
    with attention.only("absorbed"):
        check(attention.attend(layer, new, pool, batch), want, dtype)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
@pytest.mark.parametrize("lengths", [DECODE, SHORT, LONG], ids=["decode", "short", "long"])
def test_torch_computes_the_same_without_a_library(lengths: list[tuple[int, int]], way: str) -> None:
    dtype = torch.bfloat16
    layer = a_layer(16, dtype)
    attention = MlaAttention()
    new, pool, batch, want = a_pass(lengths, layer, block_size=256, dtype=dtype)
    with attention.only(way):
        check(attention.attend(layer, new, pool, batch), want, dtype)


def test_a_model_of_the_kernels_dims_is_opened_with_flashinfer_where_it_is_installed() -> None:
    model = make_model("deepseek_v2 of 512 and 64", block_size=256, device="cuda", dtype=torch.bfloat16)
    choice = choose_mla(model, "latent", block_size=256, ranks=OneRank())
    assert choice.latent is not None and choice.fallbacks == {}
    assert choice.latent.kernel == ("flashinfer" if importlib.util.find_spec("flashinfer") else "torch")
