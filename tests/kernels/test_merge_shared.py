"""The merge of a shared and an own part equals plain torch, for every layout that flash-attn writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton has no wheel for this machine")

from tierkv.engine.attention_merge import merge_shared_reference
from tierkv.errors import ShapeError
from tierkv.kernels.states import merge_shared

COUNT, KV_HEADS, GROUPS, MEMBERS = 7, 2, 2, 4


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def parts(device: str, dtype: torch.dtype, group: int, dim: int, *, packed: bool, splits: int = 1) -> dict[str, Tensor]:
    """Return both parts as flash-attn lays them out, seen as [.., kv, g, dim]."""
    slots = splits * GROUPS * MEMBERS
    own = random(COUNT, group, KV_HEADS, dim, device=device, dtype=dtype, seed=1).transpose(1, 2)
    own_lse = random(COUNT, KV_HEADS, group, device=device, seed=2)
    if packed:
        shared = random(slots, group, KV_HEADS, dim, device=device, dtype=dtype, seed=3).transpose(1, 2)
        shared_lse = random(splits * GROUPS, KV_HEADS, MEMBERS, group, device=device, seed=4).transpose(1, 2)
    else:
        shared = random(slots, KV_HEADS, group, dim, device=device, dtype=dtype, seed=3)
        shared_lse = random(splits * GROUPS, KV_HEADS, group, MEMBERS, device=device, seed=4).permute(0, 3, 1, 2)
    shared, shared_lse = shared.unflatten(0, (splits, -1)), shared_lse.unflatten(0, (splits, -1))
    return {"shared": shared, "shared_lse": shared_lse * 3, "own": own, "own_lse": own_lse * 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (4, 16), (3, 24)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_kernel_equals_plain_torch(
    device: str, dtype: torch.dtype, group: int, dim: int, packed: bool, splits: int, has_sinks: bool
) -> None:
    given = parts(device, dtype, group, dim, packed=packed, splits=splits)
    given["own_lse"][1] = torch.inf  # nothing of its own
    given["shared_lse"][:, 0, 2] = -torch.inf  # nothing shared
    positions = torch.tensor([7, 0, -1, 2, 5, -1, 1], dtype=torch.int32, device=device)
    sinks = random(KV_HEADS * group, device=device, seed=5) if has_sinks else None
    got, want = (torch.full((COUNT, KV_HEADS, group, dim), 9.0, device=device, dtype=dtype) for _ in range(2))
    merge_shared(**given, out=got, positions=positions, sinks=sinks)
    merge_shared_reference(**given, out=want, positions=positions, sinks=sinks)
    torch.testing.assert_close(got, want)
    if sinks is None:
        assert torch.equal(got[2], given["own"][2])
        assert torch.equal(got[3], given["own"][3])
        assert splits > 1 or torch.equal(got[1], given["shared"][0, 0])


def test_sequences_lie_in_order_without_positions(device: str) -> None:
    given = parts(device, torch.float32, 4, 16, packed=False)
    given["shared"], given["shared_lse"] = (
        given["shared"][:, :COUNT],
        given["shared_lse"].flatten(1, 2)[:, None, :COUNT],
    )
    got, want = (torch.empty(COUNT, KV_HEADS, 4, 16, device=device) for _ in range(2))
    merge_shared(**given, out=got)
    merge_shared_reference(**given, out=want, positions=torch.arange(COUNT, dtype=torch.int32, device=device))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_sum_takes_another_part_in_place(device: str, dtype: torch.dtype) -> None:
    """As attention in pieces merges them: [tokens, heads, dim], the part's log-sum-exps [heads, tokens]."""
    tokens, heads, dim = 9, 3, 16
    total = random(tokens, heads, dim, device=device, seed=1)
    total_lse = random(tokens, heads, device=device, seed=2)
    part = random(tokens, heads, dim, device=device, dtype=dtype, seed=3)
    part_lse = random(heads, tokens, device=device, seed=4).T
    weight = torch.sigmoid(total_lse - part_lse).unsqueeze(-1)
    want = total * weight + part.float() * (1 - weight)
    own = total.unsqueeze(2)
    merge_shared(part[None, :, :, None], part_lse[None, None, :, :, None], own, total_lse.unsqueeze(2), own)
    torch.testing.assert_close(total, want)


def test_two_empty_parts_give_zeros(device: str) -> None:
    given = parts(device, torch.float32, 4, 16, packed=False)
    given["own_lse"][:] = torch.inf
    out = torch.full((COUNT, KV_HEADS, 4, 16), 9.0, device=device)
    merge_shared(**given, out=out, positions=torch.full((COUNT,), -1, dtype=torch.int32, device=device))
    assert not out.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": torch.zeros(1, 8, 2, 4, 8)}, "does not fit"),
        ({"shared_lse": torch.zeros(1, 2, 3, 2, 4)}, "does not fit shared"),
        ({"own_lse": torch.zeros(7, 8)}, "own_lse must be"),
        ({"positions": torch.zeros(7, dtype=torch.int64)}, "positions must be"),
        ({"positions": None}, "without positions"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
    ],
)
def test_what_the_kernel_would_trust_is_refused(device: str, change: dict[str, Tensor], message: str) -> None:
    given = parts("cpu", torch.float32, 4, 16, packed=False)
    given |= {"out": torch.zeros(COUNT, KV_HEADS, 4, 16), "positions": torch.zeros(COUNT, dtype=torch.int32)}
    with pytest.raises(ShapeError, match=message):
        merge_shared(**{**given, **change})
