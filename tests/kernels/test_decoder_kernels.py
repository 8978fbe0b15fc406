"""The fused parts of a decoder layer against Transformers' own operations in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tierkv.engine import fused_ops
from tierkv.engine.fused_ops import Norm, Places
from tierkv.errors import ShapeError
from tierkv.kernels import decoder

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 3e-2, "rtol": 2.5e-2}}


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def on_cpu(norm: Norm) -> Norm:
    return Norm(norm.weight.cpu(), norm.epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "hidden"), [(1, 64), (5, 96), (3, 4096)])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_norm_with_its_residual_is_transformers_own(
    device: str, dtype: torch.dtype, count: int, hidden: int, has_residual: bool
) -> None:
    x = numbers(count, hidden, dtype=dtype, device=device)
    residual = numbers(count, hidden, dtype=dtype, device=device, seed=1) * 3 if has_residual else None
    norm = Norm(numbers(hidden, dtype=dtype, device=device, seed=2), 1e-6)
    want, total = fused_ops.add_norm(x.cpu(), None if residual is None else residual.cpu(), on_cpu(norm))
    normed = torch.empty_like(x)
    decoder.add_rms_norm(x, residual, norm.weight, norm.epsilon, normed)
    torch.testing.assert_close(normed.cpu(), want, **CLOSE[dtype])
    added = (x if residual is None else residual).cpu()
    torch.testing.assert_close(added, total, **CLOSE[dtype])
    if dtype == torch.float32 or device == "cuda":  # Triton's interpreter cuts bfloat16 off instead of rounding
        assert torch.equal(added, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (16, 8, 128), (3, 1, 96), (6, 3, 8)])
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("has_pages", [True, False])
def test_heads_are_normalised_rotated_and_written_into_their_pages(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, has_norms: bool, has_pages: bool
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    count, blocks, size, layers = 5, 4, 6, 2
    qkv = numbers(count, (heads + 2 * kv_heads) * dim, **options)
    angles = numbers(count, dim, dtype=torch.float32, device=device, seed=1)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
    norms = tuple(Norm(numbers(dim, **options, seed=seed), 1e-5) for seed in (2, 3)) if has_norms else None
    pool = numbers(blocks, layers, 2, size, kv_heads, dim, **options, seed=4)
    places = Places(
        pool[:, 1, 0],
        pool[:, 1, 1],
        torch.tensor([3, 0, 0, 2, 1], device=device),
        torch.tensor([5, 0, 1, 3, 2], device=device),
    )
    want_pool = pool.cpu().clone()
    want = fused_ops.heads_of(
        qkv.cpu(),
        (rotary[0].cpu(), rotary[1].cpu()),
        (heads, kv_heads, dim),
        (on_cpu(norms[0]), on_cpu(norms[1])) if norms else None,
        Places(want_pool[:, 1, 0], want_pool[:, 1, 1], places.block_ids.cpu(), places.offsets.cpu())
        if has_pages
        else None,
    )
    query, key = torch.empty(count, heads, dim, **options), torch.empty(count, kv_heads, dim, **options)
    decoder.rotate_heads(
        qkv,
        *rotary,
        query,
        key,
        norms=decoder.HeadNorms(norms[0].weight, norms[1].weight, norms[0].epsilon) if norms else None,
        slots=decoder.PageSlots(places.keys, places.values, places.block_ids, places.offsets) if has_pages else None,
    )
    torch.testing.assert_close(query.cpu(), want[0], **CLOSE[dtype])
    torch.testing.assert_close(key.cpu(), want[1], **CLOSE[dtype])
    torch.testing.assert_close(pool.cpu(), want_pool, **CLOSE[dtype])
    if has_pages:
        assert torch.equal(pool[places.block_ids, 1, 0, places.offsets], key)
    same = pool.cpu() == numbers(blocks, layers, 2, size, kv_heads, dim, dtype=dtype, device="cpu", seed=4)
    changed = 2 * count * kv_heads * dim if has_pages else 0
    assert abs(int((~same).sum()) - changed) <= changed // 20, "other tokens, layers and blocks keep their numbers"
    assert bool(same[:, 0].all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 64), (4, 3000)])
def test_a_gate_is_transformers_own(device: str, dtype: torch.dtype, count: int, width: int) -> None:
    gate_up = numbers(count, 2 * width, dtype=dtype, device=device) * 4
    out = torch.empty(count, width, dtype=dtype, device=device)
    decoder.silu_and_multiply(gate_up, out)
    torch.testing.assert_close(out.cpu(), fused_ops.gate(gate_up.cpu()), **CLOSE[dtype])


def test_what_does_not_fit_is_refused_before_a_launch(device: str) -> None:
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ShapeError):
        decoder.add_rms_norm(x, None, x[0, :4].contiguous(), 1e-6, torch.empty_like(x))
    with pytest.raises(ShapeError):
        decoder.add_rms_norm(x, x[:1], x[0], 1e-6, torch.empty_like(x))
    with pytest.raises(ShapeError):
        decoder.silu_and_multiply(x, torch.empty(2, 3, device=device))
    with pytest.raises(ShapeError):
        decoder.silu_and_multiply(x, torch.empty(2, 4, device=device, dtype=torch.bfloat16))
    query, key = torch.zeros(2, 1, 4, device=device), torch.zeros(2, 1, 4, device=device)
    with pytest.raises(ShapeError):
        decoder.rotate_heads(x, x[:, :4].contiguous(), x[:, :4].contiguous(), query, key)
