"""The kernels of sparse decode against the same in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tierkv.engine.backends.protocol import PagedQuery
from tierkv.engine.sparse import torch_pages
from tierkv.engine.sparse.bounds import bound_pages_cpu
from tierkv.engine.sparse.options import PageCounts, SparseDecode
from tierkv.errors import ShapeError
from tierkv.kernels import page_attention, page_scores
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

BLOCK, LAYERS = 32, 2


class Case:
    """Random K and V of three sequences in a strided pool, and a query of each."""

    def __init__(
        self,
        device: str,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 64,
        page: int = 8,
        lengths: tuple[int, ...] = (201, 1, 128),
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.counts = SparseDecode(budget=0.25, min_tokens=1, recent_tokens=9, page_tokens=page).counts(BLOCK)
        width = -(-max(lengths) // BLOCK)
        layout = BlockLayout.uniform(
            num_layers=LAYERS, block_size=BLOCK, kv_heads=kv_heads, head_dim=dim, dtype=str(dtype).split(".")[1]
        )
        self.pool = HotPool(layout, width * len(lengths), torch.device(device))
        generator = torch.Generator().manual_seed(3)
        self.pool.blocks.copy_(torch.randn(self.pool.blocks.shape, generator=generator))
        places = torch.randperm(width * len(lengths), generator=generator, dtype=torch.int64)
        self.table = places.view(len(lengths), width).to(device, torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.per_block = BLOCK // page
        offsets = [layout.layer_offsets[layer] // layout.item_bytes for layer in range(LAYERS)]
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device=device)
        shape = (LAYERS, self.pool.num_blocks + 1, kv_heads, self.per_block, 2, dim)
        self.bounds = torch.zeros(shape, dtype=dtype, device=device)
        query = torch.randn(len(lengths), heads, dim, generator=generator).to(device, dtype) * 2
        self.paged = PagedQuery(
            query=query,
            new_keys=query,
            new_values=query,
            keys=self.pool.key_cache(1),
            values=self.pool.value_cache(1),
            scale=dim**-0.5,
            layer=1,
            **options,
        )

    def pages(self) -> torch.Tensor:
        return torch.arange(self.pool.num_blocks * self.per_block, dtype=torch.int32, device=self.bounds.device)

    def bound(self) -> None:
        bounds = self.bounds.cpu()
        bound_pages_cpu(self.pool.blocks.cpu(), self.offsets, self.pages().cpu(), bounds, page=self.counts.page)
        self.bounds.copy_(bounds)

    def score(self) -> torch.Tensor:
        pages = self.table.shape[1] * self.per_block
        scores = torch.full((*self.paged.query.shape[:2], pages), 77.0, device=self.bounds.device)
        page_scores.score_pages(
            self.paged.query,
            self.bounds[1],
            self.table,
            self.lengths,
            scores,
            scale=self.paged.scale,
            choice=self.counts,
        )
        return scores

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        kv_heads, sequences = self.bounds.shape[2], len(self.lengths)
        most = max(self.counts.read(int(length)) for length in self.lengths)
        chosen = torch.full((sequences, kv_heads, most + 3), -5, dtype=torch.int32, device=self.bounds.device)
        page_scores.choose_pages(
            scores,
            self.table,
            self.lengths,
            chosen,
            kv_heads=kv_heads,
            per_block=self.per_block,
            choice=self.counts,
        )
        return chosen

    def attend(self, chosen: torch.Tensor, *, most_tokens: int = 64) -> torch.Tensor:
        sequences, heads, _ = self.paged.query.shape
        v_dim = self.paged.values.shape[3]
        space = page_attention.PartSpace.of(
            sequences=sequences,
            heads=heads,
            kv_heads=self.bounds.shape[2],
            v_dim=v_dim,
            most_tokens=most_tokens,
            device=self.table.device,
        )
        out = torch.full_like(self.paged.query[..., :v_dim], float("nan"))
        page_attention.attend_pages(
            self.paged.query,
            self.paged.keys,
            self.paged.values,
            self.lengths,
            chosen,
            out,
            space,
            choice=self.counts,
            scale=self.paged.scale,
            softcap=self.paged.softcap,
            sinks=self.paged.sinks,
        )
        return out

    def on_cpu(self) -> tuple[PagedQuery, torch.Tensor, list[int]]:
        moved = {
            name: value.cpu() if isinstance(value := getattr(self.paged, name), torch.Tensor) else value
            for name in PagedQuery.__slots__
        }
        return PagedQuery(**moved), self.table.cpu(), self.lengths.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "page"), [(64, 8), (128, 32), (24, 4)])
def test_bounds_are_the_smallest_and_largest_keys(device: str, dtype: torch.dtype, dim: int, page: int) -> None:
    case = Case(device, dim=dim, page=page, dtype=dtype, lengths=(64,))
    case.bound()
    want = case.bounds.cpu()
    case.bounds.zero_()
    page_scores.bound_pages(case.pool.blocks, case.offsets, case.pages(), case.bounds, page=page)
    assert torch.equal(case.bounds.cpu(), want)
    keys = case.pool.key_cache(1)[1, BLOCK - page :].cpu()
    assert torch.equal(want[1, 1, :, -1, 0], keys.amin(0))
    assert torch.equal(want[1, 1, :, -1, 1], keys.amax(0))


def test_only_the_named_pages_are_written(device: str) -> None:
    case = Case(device)
    page_scores.bound_pages(case.pool.blocks, case.offsets, case.pages()[5:6], case.bounds, page=case.counts.page)
    touched = case.bounds.flatten(4).abs().sum(-1) > 0  # [layers, blocks, heads, pages]
    assert touched[:, 1, :, 1].all()
    assert int(touched.sum()) == LAYERS * case.bounds.shape[2]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 1, 128), (3, 3, 24)])
def test_no_token_scores_above_its_page(device: str, heads: int, kv_heads: int, dim: int) -> None:
    case = Case(device, heads=heads, kv_heads=kv_heads, dim=dim)
    case.bound()
    scores = case.score().cpu()
    paged, table, lengths = case.on_cpu()
    for row, length in enumerate(lengths):
        scored = case.counts.scored(length)
        blocks = table[row].long()
        want = torch_pages.score_pages(
            paged.query[row], case.bounds[1].cpu(), blocks, length, case.counts, scale=paged.scale
        )
        torch.testing.assert_close(scores[row, :, :scored], want, atol=1e-4, rtol=1e-4)
        assert (scores[row, :, scored:] == 77.0).all()
        keys = paged.keys[blocks].flatten(0, 1)[: scored * case.counts.page].repeat_interleave(heads // kv_heads, 1)
        exact = torch.einsum("hd,thd->ht", paged.query[row], keys) * paged.scale
        pages = exact.unflatten(1, (scored, case.counts.page)) if scored else exact.new_empty(heads, 0, 1)
        assert (pages.amax(-1) <= want + 1e-4).all()


@pytest.mark.parametrize("lengths", [(201, 1, 128), (9, 10, 40, 41), (1024,)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (2, 2)])
def test_the_pages_of_most_weight_are_chosen(device: str, lengths: tuple[int, ...], heads: int, kv_heads: int) -> None:
    case = Case(device, lengths=lengths, heads=heads, kv_heads=kv_heads)
    case.bound()
    scores = case.score()
    check_choice(case, scores)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
def test_of_equal_weights_the_earlier_pages_are_chosen(device: str, value: float) -> None:
    case = Case(device)
    scores = torch.full((3, 4, 28), value, device=device)
    check_choice(case, scores)


def test_weights_far_apart_are_told_apart(device: str) -> None:
    case = Case(device, lengths=(256,))
    scores = torch.linspace(-900, 900, 32, device=device).roll(11).expand(1, 4, 32).contiguous()
    check_choice(case, scores)


def check_choice(case: Case, scores: torch.Tensor) -> None:
    chosen = case.choose(scores).cpu()
    kv_heads = chosen.shape[1]
    for row, length in enumerate(case.lengths.tolist()):
        scored, count = case.counts.scored(length), case.counts.read(length)
        want = torch_pages.choose_pages(scores[row, :, :scored].cpu(), length, case.counts, kv_heads)
        assert want.shape == (kv_heads, count)
        blocks = case.table[row].cpu()[want // case.per_block]
        assert torch.equal(chosen[row, :, :count], (blocks * case.per_block + want % case.per_block).int())
        assert (chosen[row, :, count:] == -5).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"heads": 8, "kv_heads": 1, "dim": 128},
        {"heads": 3, "kv_heads": 3, "dim": 24},
        {"page": 32},
    ],
)
@pytest.mark.parametrize("most_tokens", [64, 4000])
def test_attention_over_chosen_pages_is_that_of_torch(device: str, options: dict[str, Any], most_tokens: int) -> None:
    case = Case(device, **options)
    case.bound()
    got = case.attend(case.choose(case.score()), most_tokens=most_tokens)
    paged, table, lengths = case.on_cpu()
    want = torch_pages.attend_sparsely(paged, case.bounds[1].cpu(), table, lengths, case.counts)
    torch.testing.assert_close(got.cpu(), want, atol=2e-5, rtol=2e-4)


def test_sinks_take_part_in_the_softmax_once(device: str) -> None:
    case = Case(device, sinks=torch.tensor([2.0, -1.0, 0.5, 4.0], device=device))
    case.bound()
    got = case.attend(case.choose(case.score()), most_tokens=4000)
    paged, table, lengths = case.on_cpu()
    want = torch_pages.attend_sparsely(paged, case.bounds[1].cpu(), table, lengths, case.counts)
    torch.testing.assert_close(got.cpu(), want, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_attended_within_their_rounding(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as whole numbers")
    case = Case(device, dtype=dtype)
    case.bound()
    got = case.attend(case.choose(case.score())).cpu().float()
    paged, table, lengths = case.on_cpu()
    want = torch_pages.attend_sparsely(paged, case.bounds[1].cpu(), table, lengths, case.counts).float()
    assert float((got - want).norm() / want.norm()) < 2e-2


def test_shapes_that_do_not_fit_are_refused_before_a_launch(device: str) -> None:
    case = Case(device)
    case.bound()
    scores = case.score()
    with pytest.raises(ShapeError, match="bounds"):
        page_scores.bound_pages(case.pool.blocks[:-1], case.offsets, case.pages(), case.bounds, page=case.counts.page)
    with pytest.raises(ShapeError, match="float32"):
        page_scores.score_pages(
            case.paged.query, case.bounds[1], case.table, case.lengths, scores.double(), scale=1.0, choice=case.counts
        )
    counts = PageCounts(page=8, share=100, least=1, sinks=1, recent=9)
    chosen = torch.empty(3, 2, 9, dtype=torch.int32, device=device)
    with pytest.raises(ShapeError, match="always"):
        page_scores.choose_pages(scores, case.table, case.lengths, chosen, kv_heads=2, per_block=4, choice=counts)
    with pytest.raises(ShapeError, match="contiguous"):
        case.attend(case.choose(scores).transpose(0, 1).contiguous().transpose(0, 1))
