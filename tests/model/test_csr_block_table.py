"""Flat block tables (CSR) against their definition, and smaller pages of the pool's blocks against its tokens."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from fake_flashinfer import PrefillWrapper
from places import Place

from tierkv import CsrBlockTable, csr_block_table, page_view
from tierkv.errors import ShapeError
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout


def flat(table: list[list[int]], lengths: list[int], block: int, page: int, step: int) -> tuple[list[int], ...]:
    """Return what csr_block_table returns, page by page."""
    starts, pages, last = [0], [], []
    for row, length in zip(table, lengths, strict=True):
        for first in range(0, length, page):
            pages.append(row[first // block] * step + first % block // page)
        starts.append(len(pages))
        last.append((length - 1) % page + 1 if length else 0)
    return starts, pages, last


def assert_is(csr: CsrBlockTable, want: tuple[list[int], ...]) -> None:
    starts, pages, last = want
    assert csr.kv_indptr.tolist() == starts
    assert csr.kv_indices[: len(pages)].tolist() == pages
    assert not csr.kv_indices[len(pages) :].any()
    assert csr.kv_last_page_len.tolist() == last
    assert {each.dtype for each in (csr.kv_indptr, csr.kv_indices, csr.kv_last_page_len)} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("step", [None, 100])
def test_each_page_of_each_sequence_is_named_in_order(
    place: Place, page: int, step: int | None, dtype: torch.dtype
) -> None:
    dice, block = random.Random(page), 16
    for _ in range(20):
        count, width = dice.randint(1, 6), dice.randint(1, 5)
        table = [[dice.randrange(1000) for _ in range(width)] for _ in range(count)]
        lengths = [dice.randint(0, width * block) for _ in range(count)]
        want = flat(table, lengths, block, page, step or block // page)
        tensors = (torch.tensor(each, dtype=dtype, device=place.device) for each in (table, lengths))
        for num_pages in (None, len(want[1])):
            given = torch.tensor(table, dtype=dtype, device=place.device), torch.tensor(lengths, device=place.device)
            csr = csr_block_table(*given, block_size=block, page_size=page, pages_per_block=step, num_pages=num_pages)
            assert_is(csr, want)
            assert len(csr.kv_indices) == (num_pages if num_pages is not None else count * width * block // page)
        del tensors


def test_a_page_is_a_block_unless_told_otherwise() -> None:
    csr = csr_block_table(torch.tensor([[7, 3], [5, 0]]), torch.tensor([20, 16]), block_size=16, num_pages=3)
    assert_is(csr, ([0, 2, 3], [7, 3, 5], [4, 16]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_table_on_the_device_is_turned_without_a_wait() -> None:
    table = torch.tensor([[7, 3], [5, 0]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([20, 16], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        csr = csr_block_table(table, lengths, block_size=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert csr.kv_indices.tolist() == [7, 3, 5, 0]


@pytest.mark.parametrize(
    ("table", "lengths", "options"),
    [
        ([[1, 2]], [33], {}),
        ([[1, 2]], [-1], {}),
        ([[1, 2]], [3, 4], {}),
        ([[1, 2]], [3], {"page_size": 5}),
        ([[1, 2]], [3], {"page_size": 0}),
        ([[1, 2]], [3], {"page_size": 4, "pages_per_block": 3}),
        ([[1, 2]], [3], {"num_pages": 2}),
        ([[]], [0], {}),
        ([[1.0, 2.0]], [3], {}),
    ],
)
def test_what_does_not_fit_is_refused(table: list[list[float]], lengths: list[int], options: dict[str, int]) -> None:
    with pytest.raises(ShapeError):
        csr_block_table(torch.tensor(table), torch.tensor(lengths), block_size=16, **options)


def pool_of(block: int = 32) -> HotPool:
    layout = BlockLayout.uniform(num_layers=3, block_size=block, kv_heads=2, head_dim=4, dtype="float32")
    pool = HotPool(layout, 6, torch.device("cpu"))
    pool.blocks.copy_(torch.arange(pool.blocks.numel(), dtype=torch.float32).view(pool.blocks.shape))
    return pool


@pytest.mark.parametrize("page", [4, 16, 32])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_pools_blocks_are_seen_as_small_pages(page: int, layer: int) -> None:
    pool = pool_of()
    for cache in (pool.key_cache(layer), pool.value_cache(layer)):
        view, per_block = page_view(cache, page)
        assert view.shape[1:] == (page, 2, 4)
        csr = csr_block_table(
            torch.tensor([[4, 1]]), torch.tensor([50]), block_size=32, page_size=page, pages_per_block=per_block
        )
        pages = csr.kv_indices[: int(csr.kv_indptr[-1])].long()
        assert torch.equal(view[pages].flatten(0, 1)[:50], cache[[4, 1]].flatten(0, 1)[:50])


def test_the_last_page_of_the_last_block_is_the_last_of_the_view() -> None:
    cache = pool_of().value_cache(2)
    view, per_block = page_view(cache, 16)
    assert torch.equal(view[-1], cache[-1, 16:])
    assert view.shape[0] == 6 * per_block + 2


def test_heads_before_tokens_are_seen_as_small_pages_too() -> None:
    heads_first = torch.arange(5 * 2 * 32 * 4.0).view(5, 2, 32, 4)  # "HND"
    view, per_block = page_view(heads_first.transpose(1, 2), 8)
    csr = csr_block_table(
        torch.tensor([[3, 0]]), torch.tensor([40]), block_size=32, page_size=8, pages_per_block=per_block
    )
    want = heads_first[[3, 0]].transpose(1, 2).flatten(0, 1)[:40]
    assert torch.equal(view[csr.kv_indices[:5].long()].flatten(0, 1), want)


@pytest.mark.parametrize("page", [5, 0, 64])
def test_pages_that_do_not_divide_a_block_are_refused(page: int) -> None:
    with pytest.raises(ShapeError):
        page_view(pool_of().key_cache(0), page)


def test_a_stride_that_no_page_divides_is_refused() -> None:
    memory = torch.zeros(1000)
    with pytest.raises(ShapeError, match="apart"):
        page_view(memory.as_strided((3, 32, 1, 4), (130, 4, 4, 1)), 16)


def test_pages_beyond_int32_are_refused() -> None:
    cache = torch.empty(1 << 26, 32, 1, 4, device="meta").expand(-1, -1, -1, -1)
    with pytest.raises(ShapeError, match="int32"):
        page_view(cache, 1)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_an_engine_with_small_pages_attends_by_a_flat_table(layout: str) -> None:
    """The whole use: a padded table of blocks of 32, pages of 8, either order of heads and tokens."""
    torch.manual_seed(1)
    table, lengths = torch.tensor([[2, 0, 9], [1, 4, 3]], dtype=torch.int32), torch.tensor([37, 96], dtype=torch.int32)
    keys, values = (torch.randn(5, 32, 2, 4) for _ in range(2))
    if layout == "HND":
        keys, values = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (keys, values))
    views = [page_view(each, 8) for each in (keys, values)]
    csr = csr_block_table(table, lengths, block_size=32, page_size=8, pages_per_block=views[0][1], num_pages=17)
    query, out = torch.randn(2, 6, 4), torch.empty(2, 6, 4)
    wrapper = PrefillWrapper(torch.zeros(8, dtype=torch.uint8), layout, backend="fa2")
    starts = torch.arange(3, dtype=torch.int32)
    wrapper.plan(
        starts,
        *(csr.kv_indptr, csr.kv_indices, csr.kv_last_page_len),
        *(6, 2, 4, 8),
        causal=True,
        q_data_type=torch.float32,
    )
    pages = tuple(view.transpose(1, 2) if layout == "HND" else view for view, _ in views)
    wrapper.run(query, (pages[0], pages[1]), out=out)
    for row, length in enumerate(lengths.tolist()):
        blocks = table[row, : -(-length // 32)].long()
        k, v = (each[blocks].flatten(0, 1)[:length].repeat_interleave(3, 1) for each in (keys, values))
        weights = (torch.einsum("hd,lhd->hl", query[row], k) / 2).softmax(-1)
        torch.testing.assert_close(out[row], torch.einsum("hl,lhd->hd", weights, v))
