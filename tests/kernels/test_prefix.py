"""Attention over a shared prefix equals plain torch, whatever the groups and the parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton has no wheel for this machine")

from tierkv.errors import ShapeError
from tierkv.kernels.prefix import attend_prefix

KV_HEADS, SIZE, COUNT = 2, 32, 7


class Prefixes:
    """Random pages, and `groups` prefixes of them of several lengths."""

    def __init__(self, device: str, dtype: torch.dtype, *, group: int, dim: int, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        pages = random(20, 3, 2, SIZE, KV_HEADS, dim)  # block-major: a page is part of a block
        self.keys, self.values = pages[:, 1, 0], pages[:, 1, 1]
        self.query = random(COUNT, KV_HEADS, group, dim) * 2
        width = max(lengths) // SIZE + 1
        self.table = torch.randperm(20, generator=generator)[: width * len(lengths)].view(len(lengths), width)
        self.table = self.table.int().contiguous().to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def want(self, n: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return the attention and log-sum-exp of some queries over one prefix, in float32."""
        length = int(self.lengths[n])
        blocks = self.table[n, : length // SIZE].long()
        keys, values = (pages[blocks].flatten(0, 1).float() for pages in (self.keys, self.values))
        scores = torch.einsum("bkgd,lkd->bkgl", self.query[rows].float(), keys) * 0.25
        return torch.einsum("bkgl,lkd->bkgd", scores.softmax(-1), values), scores.logsumexp(-1)


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the parts: [S, P, kv, g, dim] and [S, n, m, kv, g]."""
    lses = lse.flatten(1, 2)
    total = lses.logsumexp(0)
    return (out * (lses - total).exp().nan_to_num(0.0).unsqueeze(-1)).sum(0), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (4, 32), (3, 64), (40, 16)])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_one_group_of_the_first_queries(device: str, dtype: torch.dtype, group: int, dim: int, parts: int) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    given = Prefixes(device, dtype, group=group, dim=dim, lengths=[4 * SIZE])
    out = torch.full((parts, 5, KV_HEADS, group, dim), 9.0, device=device)
    lse = torch.full((parts, 1, 5, KV_HEADS, group), 9.0, device=device)
    attend_prefix(
        given.query, given.keys, given.values, given.table, given.lengths, out, lse, members=5, scale=0.25, key_tile=16
    )
    want, want_lse = given.want(0, list(range(5)))
    got, got_lse = merged(out, lse)
    # On a GPU float32 is multiplied as tf32; in bfloat16 the weights are rounded before they meet V.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 and device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(got_lse, want_lse, **close)


def test_several_groups_of_any_queries_and_an_empty_one(device: str) -> None:
    given = Prefixes(device, torch.float16, group=4, dim=32, lengths=[2 * SIZE, 5 * SIZE, 0])
    groups = [[6, 1], [0, 3, 4], []]
    gather = torch.tensor([6, 1, 0, 0, 3, 4, 0, 0, 0], dtype=torch.int32, device=device)
    out = torch.full((3, 9, KV_HEADS, 4, 32), 9.0, device=device)
    lse = torch.full((3, 3, 3, KV_HEADS, 4), 9.0, device=device)
    attend_prefix(
        given.query,
        given.keys,
        given.values,
        given.table,
        given.lengths,
        out,
        lse,
        members=3,
        scale=0.25,
        gather=gather,
        key_tile=32,
    )
    got, got_lse = merged(out, lse)
    for n, rows in enumerate(groups):
        want, want_lse = given.want(n, rows) if rows else (torch.zeros(0), torch.zeros(0))
        at = slice(3 * n, 3 * n + len(rows))
        torch.testing.assert_close(got[at], want if rows else got[at], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got_lse[at], want_lse if rows else got_lse[at], rtol=2e-2, atol=2e-2)
    assert not out[:, 6:].any()
    assert (lse[:, 2] == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_tile": 24}, "not made of tiles"),
        ({"members": 8}, "out must be"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths must be"),
        ({"table": torch.zeros(1, 5, dtype=torch.int64)}, "int32"),
        ({"gather": torch.zeros(4, dtype=torch.int32)}, "gather must be"),
        ({"out_lse": torch.zeros(1, 1, 5, 2, 3)}, "out_lse must be"),
    ],
)
def test_what_the_kernel_would_trust_is_refused(change: dict[str, object], message: str) -> None:
    given = Prefixes("cpu", torch.float32, group=4, dim=16, lengths=[4 * SIZE])
    asked = {
        "query": given.query,
        "keys": given.keys,
        "values": given.values,
        "table": given.table,
        "lengths": given.lengths,
        "out": torch.zeros(1, 5, KV_HEADS, 4, 16),
        "out_lse": torch.zeros(1, 1, 5, KV_HEADS, 4),
        "members": 5,
        "scale": 1.0,
        "key_tile": 16,
    }
    with pytest.raises(ShapeError, match=message):
        attend_prefix(**{**asked, **change})
