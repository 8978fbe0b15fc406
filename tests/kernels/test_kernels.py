"""Each kernel equals a few lines of plain torch; each launcher refuses what the kernel would trust."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton has no wheel for this machine")

from tierkv.errors import ShapeError
from tierkv.kernels.pages import LayerPages, gather_blocks, scatter_blocks


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


@pytest.mark.parametrize("page_size", [2, 16])
@pytest.mark.parametrize("dims", [(2, 8, 8), (3, 20, 12)])
def test_blocks_gathered_from_pages_and_scattered_again(
    device: str, page_size: int, dims: tuple[int, int, int]
) -> None:
    heads, k_dim, v_dim = dims
    pages_per_block, num_blocks, num_pages = 3, 4, 16
    layers = [
        random((num_pages, page_size, heads, d), torch.bfloat16, device, i) for i, d in enumerate([k_dim, v_dim] * 2)
    ]
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1))[: num_blocks * pages_per_block]
    page_ids = order.view(num_blocks, pages_per_block).to(device)
    parts = [t[page_ids].flatten(1).contiguous().view(torch.uint8).view(num_blocks, -1) for t in layers]
    want = torch.cat(parts, dim=1)
    blocks = torch.zeros_like(want)
    gather_blocks(LayerPages(layers), page_ids, blocks, num_programs=5)
    assert torch.equal(blocks, want)
    emptied = [torch.zeros_like(t) for t in layers]
    scatter_blocks(LayerPages(emptied), page_ids, blocks, num_programs=7)
    for before, after in zip(layers, emptied, strict=True):
        assert torch.equal(after[page_ids], before[page_ids])
        untouched = [page for page in range(num_pages) if page not in order.tolist()]
        assert not after[untouched].any()


def test_a_page_that_is_left_out_stays_as_it_is(device: str) -> None:
    layers = [random((6, 2, 1, 4), torch.bfloat16, device, seed) for seed in range(2)]
    before = [layer.clone() for layer in layers]
    blocks = torch.zeros(2, 2 * layers[0][0].numel() * 2 * 2, dtype=torch.uint8, device=device)
    scatter_blocks(LayerPages(layers), torch.tensor([[3, -1], [-1, 0]], device=device), blocks)
    for layer, old in zip(layers, before, strict=True):
        assert not layer[[0, 3]].any()
        assert torch.equal(layer[[1, 2, 4, 5]], old[[1, 2, 4, 5]])


def test_gathering_into_blocks_of_another_size_is_refused(device: str) -> None:
    layers = [random((4, 2, 1, 4), torch.bfloat16, device)] * 2
    page_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(ShapeError, match="do not fit"):
        gather_blocks(LayerPages(layers), page_ids, torch.zeros(1, 24, dtype=torch.uint8, device=device))
    with pytest.raises(ShapeError, match="page_ids"):
        gather_blocks(LayerPages(layers), page_ids.int(), torch.zeros(1, 32, dtype=torch.uint8, device=device))
