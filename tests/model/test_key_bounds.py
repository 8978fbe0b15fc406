"""Key bounds are always those of the bytes that lie in the hot pool, and are computed no more often than they must."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierkv.engine.attention import SequenceStep, build_batch
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import LayerShape, PagedQuery, attend
from tierkv.engine.graph_inputs import GraphInputs, GraphShape
from tierkv.engine.sparse.attention import SparseAttention, why_not_sparse
from tierkv.engine.sparse.bounds import KeyBounds
from tierkv.engine.sparse.options import SparseDecode
from tierkv.engine.sparse.torch_pages import choose_pages, score_pages
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

BLOCK, PAGE, LAYERS = 16, 4, 3
COUNTS = SparseDecode(budget=0.25, min_tokens=1, recent_tokens=4, page_tokens=PAGE).counts(BLOCK)
CPU = torch.device("cpu")


@dataclass(eq=False)
class Running:
    """A running sequence and its step. chain: hashes of its registered blocks."""

    block_table: list[int]
    num_past: int
    chain: list[bytes] = field(default_factory=list)
    waits: int = 0

    def wait_all(self) -> None:
        self.waits += 1


@pytest.fixture
def pool() -> HotPool:
    """Return a pool whose layers have keys of two shapes."""
    layers = [LayerLayout(kv_heads=heads, k_dim=dim, v_dim=8) for heads, dim in [(2, 8), (1, 4), (2, 8)]]
    found = HotPool(BlockLayout(block_size=BLOCK, dtype="float32", layers=tuple(layers)), 20, CPU)
    found.blocks.normal_(generator=torch.Generator().manual_seed(0))
    return found


def update(bounds: KeyBounds, *running: Running) -> int:
    return bounds.update([(each, each) for each in running])


def assert_right(bounds: KeyBounds, pool: HotPool, running: Running) -> None:
    """Raise AssertionError unless all pages that are scored have the bounds of their keys."""
    for layer in range(LAYERS):
        keys = pool.key_cache(layer)
        for page in range(COUNTS.scored(running.num_past + 1)):
            block, inner = running.block_table[page * PAGE // BLOCK], page % (BLOCK // PAGE)
            of_page = keys[block, inner * PAGE : (inner + 1) * PAGE]
            got = bounds.of(layer)[block, :, inner]
            assert torch.equal(got[:, 0], of_page.amin(0))
            assert torch.equal(got[:, 1], of_page.amax(0))


def test_a_sequence_gets_the_bounds_of_its_whole_pages_in_every_layer(pool: HotPool) -> None:
    bounds, running = KeyBounds(pool, COUNTS), Running([3, 7, 0, 11], 59)
    assert update(bounds, running) == 14, "59 // 4 pages"
    assert running.waits == 1, "its bytes may have been arriving"
    assert_right(bounds, pool, running)


def test_a_decode_step_computes_none_until_a_page_leaves_the_recent_tokens(pool: HotPool) -> None:
    bounds, running = KeyBounds(pool, COUNTS), Running([3, 7, 0, 11], 40)
    update(bounds, running)
    computed = []
    for past in range(41, 60):
        running.num_past = past
        pool.key_cache(0)[running.block_table[past // BLOCK], past % BLOCK] += 1  # the token of the step
        computed.append(update(bounds, running))
        assert_right(bounds, pool, running)
    assert sum(computed) == 4
    assert computed.count(0) == len(computed) - 4


def test_a_shared_prefix_is_computed_once(pool: HotPool) -> None:
    bounds = KeyBounds(pool, COUNTS)
    first = Running([3, 7, 0], 40, [b"a", b"b"])
    second = Running([3, 7, 9], 36, [b"a", b"b"])
    assert update(bounds, first) == 10
    assert update(bounds, first, second) == 1, "the page of its own block"
    assert_right(bounds, pool, second)


def test_blocks_that_got_other_contents_are_computed_again(pool: HotPool) -> None:
    bounds = KeyBounds(pool, COUNTS)
    update(bounds, Running([3, 7], 31, [b"a"]))
    pool.blocks[3].normal_()
    other = Running([3, 5], 31, [b"c"])
    update(bounds, other)
    assert_right(bounds, pool, other)


def test_a_private_block_makes_the_bounds_of_the_block_before_it_void(pool: HotPool) -> None:
    bounds = KeyBounds(pool, COUNTS)
    registered = Running([3, 7], 31, [b"a"])
    update(bounds, registered)
    before = pool.blocks[3].clone()
    pool.blocks[3].normal_()
    private = Running([3, 5], 31)  # never registered, as all that is decoded sparsely
    update(bounds, private)
    assert_right(bounds, pool, private)
    pool.blocks[3].copy_(before)  # the registered block is loaded again, into the same place
    again = Running([3, 7], 31, [b"a"])
    update(bounds, again)
    assert_right(bounds, pool, again)


def test_a_block_table_that_is_rewritten_is_followed(pool: HotPool) -> None:
    bounds, running = KeyBounds(pool, COUNTS), Running([3, 7, 0, 11], 59)
    update(bounds, running)
    pool.blocks[15] = pool.blocks[7]  # as a defragmentation moves a block, and another takes its place
    pool.blocks[7].normal_()
    running.block_table[1] = 15
    assert update(bounds, running) == 10, "from the block that has moved on"
    assert_right(bounds, pool, running)


def test_a_sequence_that_was_left_out_of_a_pass_is_looked_at_anew(pool: HotPool) -> None:
    bounds, running, other = KeyBounds(pool, COUNTS), Running([3, 7], 31), Running([5, 6], 31)
    update(bounds, running)
    update(bounds, other)
    pool.blocks[3].normal_()
    assert update(bounds, running) == 7
    assert_right(bounds, pool, running)


def make_query(pool: HotPool, layer: int, rows: int, **options: Any) -> PagedQuery:
    keys = pool.key_cache(layer)
    query = torch.randn(rows, 4, keys.shape[3], generator=torch.Generator().manual_seed(7)) * 2
    new = (query[:, : keys.shape[2]], torch.zeros(rows, keys.shape[2], 8))
    return PagedQuery(
        query=query,
        new_keys=new[0],
        new_values=new[1],
        keys=keys,
        values=pool.value_cache(layer),
        scale=0.5,
        layer=layer,
        **options,
    )


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([1.0, -1.0, 2.0, 0.0])}])
def test_attention_is_the_exact_one_with_all_other_pages_hidden(
    pool: HotPool, layer: int, options: dict[str, Any]
) -> None:
    bounds, past = KeyBounds(pool, COUNTS), [90, 3, 63]
    tables = [[4, 9, 1, 15, 12, 0], [2], [8, 3, 7, 11]]
    steps = [SequenceStep(block_table=t, num_past=n, num_new=1) for t, n in zip(tables, past, strict=True)]
    update(bounds, *(Running(table, n) for table, n in zip(tables, past, strict=True)))
    dense = make_attention("auto", CPU)
    planner = SparseAttention(COUNTS, bounds, dense)
    batch = build_batch(pool, steps, block_size=BLOCK, device=CPU, attention=dense, decode_attention=planner)
    paged = make_query(pool, layer, 3, **options)
    got = attend(paged, batch)
    for row, length in enumerate(batch.kv_lengths):
        blocks = batch.block_table[row].long()
        kv_heads = paged.keys.shape[2]
        scores = score_pages(paged.query[row], bounds.of(layer), blocks, length, COUNTS, scale=0.5)
        chosen = choose_pages(scores, length, COUNTS, kv_heads)
        keys, values = (each[blocks].flatten(0, 1)[:length] for each in (paged.keys, paged.values))
        for head in range(4):
            shared = head // (4 // kv_heads)
            is_read = torch.tensor([position // PAGE in chosen[shared].tolist() for position in range(length)])
            logits = keys[:, shared] @ paged.query[row, head] * 0.5
            if paged.softcap:
                logits = torch.tanh(logits / paged.softcap) * paged.softcap
            logits = logits.masked_fill(~is_read, -torch.inf)
            sink = logits.new_empty(0) if paged.sinks is None else paged.sinks[head : head + 1]
            want = torch.cat([logits, sink]).softmax(0)[:length] @ values[:, shared]
            torch.testing.assert_close(got[row, head], want, atol=1e-5, rtol=1e-4)


def test_a_layer_with_a_window_reads_all_of_it(pool: HotPool) -> None:
    steps = [SequenceStep(block_table=[4, 9, 1, 15, 12, 0], num_past=90, num_new=1)]
    dense = make_attention("auto", CPU)
    planner = SparseAttention(COUNTS, KeyBounds(pool, COUNTS), dense)
    paged = make_query(pool, 0, 1, window=80)
    found = [
        attend(paged, build_batch(pool, steps, block_size=BLOCK, device=CPU, attention=dense, decode_attention=each))
        for each in (planner, None)
    ]
    assert torch.equal(*found)
    assert why_not_sparse(LayerShape.of(paged)) == "it has a window"


def test_only_the_sequences_with_one_new_token_are_attended_sparsely() -> None:
    dense, sparse = make_attention("auto", CPU), make_attention("torch", CPU)
    steps = [SequenceStep(block_table=[1, 2], num_past=20, num_new=new) for new in (1, 1, 9)]
    pool: Any = None
    options: dict[str, Any] = {"block_size": BLOCK, "device": CPU, "attention": dense, "decode_attention": sparse}
    mixed = build_batch(pool, steps, **options)
    assert [part.attention for part in mixed.parts] == [sparse, dense]
    assert build_batch(pool, steps[:2], **options).attention is sparse
    assert build_batch(pool, steps[2:], **options).attention is dense
    cache: Any = SimpleNamespace(config=SimpleNamespace(block_size=BLOCK), hot=SimpleNamespace(scratch_block=9))
    shapes = [GraphShape(2, 1, 16, is_sparse=True), GraphShape(2, 1, 16, rest_tokens=64, is_sparse=True)]
    alone, beside = (GraphInputs(each, cache, CPU, attention=dense, decode_attention=sparse) for each in shapes)
    assert alone.batch.attention is sparse
    assert [part.attention for part in beside.batch.parts] == [sparse, dense]


def test_the_first_page_and_the_recent_ones_are_read_whatever_the_scores_say() -> None:
    for length in (200, 201, 203):
        scored = COUNTS.scored(length)
        scores = torch.full((4, scored), 5.0).index_fill_(1, torch.tensor([0, scored - 1]), -500.0)
        chosen = choose_pages(scores, length, COUNTS, 2)
        pages = -(-length // PAGE)
        assert chosen.shape == (2, COUNTS.read(length))
        assert (chosen.diff(dim=1) > 0).all()
        assert (chosen[:, 0] == 0).all()
        assert chosen[:, scored - pages :].tolist() == [list(range(scored, pages))] * 2
        assert not (chosen == scored - 1).any(), "it has the worst score, and no recent token"
