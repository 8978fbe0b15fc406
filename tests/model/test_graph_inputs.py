"""The inputs of graphs and of eager passes against their definition, token by token; which graph serves which pass."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, make_model

from tierkv.engine.attention import AttentionSwitch, PlainModel, SequenceStep, build_batch
from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.cascade import SharedPrefix
from tierkv.engine.fused_model import fuse_model
from tierkv.engine.graph_inputs import GraphInputs, GraphShape
from tierkv.engine.graphs import MAX_GRAPH_ROWS, graph_shape
from tierkv.engine.model_support import probe_layout
from tierkv.ranks.group import OneRank
from tierkv.storage.hot import HotPool

SIZE, SCRATCH = 16, 999
CPU = torch.device("cpu")


def inputs_of(shape: GraphShape) -> GraphInputs:
    cache: Any = SimpleNamespace(config=SimpleNamespace(block_size=SIZE), hot=SimpleNamespace(scratch_block=SCRATCH))
    return GraphInputs(shape, cache, CPU, attention=make_attention("auto", CPU))


def steps_of(dice: random.Random, count: int, most_new: int, *, least_new: int = 1) -> list[SequenceStep]:
    steps = []
    for _ in range(count):
        past, new = dice.randrange(100), dice.randint(least_new, most_new)
        table = [dice.randrange(500) for _ in range(-(-(past + new) // SIZE) + dice.randrange(2))]
        steps.append(SequenceStep(block_table=table, num_past=past, num_new=new))
    return steps


def assert_filled(inputs: GraphInputs, shape: GraphShape, steps: list[SequenceStep], ids: list[int]) -> None:
    at, batch, first = 0, inputs.batch, 0
    rows = list(range(len(steps)))
    if shape.rest_tokens and steps:
        rows[-1] = shape.sequences
    for row in range(shape.rows):
        step = SequenceStep(block_table=[], num_past=0, num_new=0)
        width = shape.rest_tokens if row == shape.sequences else shape.new_tokens
        if row in rows:
            step = steps[rows.index(row)]
            assert int(inputs.last[rows.index(row)]) == first + step.num_new - 1
        for new in range(width):
            position, place = step.num_past + new, first + new
            assert int(batch.position_ids[0, place]) == position
            assert int(batch.offsets[place]) == position % SIZE
            if new < step.num_new:
                assert int(inputs.token_ids[place]) == ids[at + new]
                assert int(batch.block_ids[place]) == step.block_table[position // SIZE]
            else:
                assert int(batch.block_ids[place]) == SCRATCH, "padding writes where nothing reads"
        assert int(batch.kv_lengths_tensor[row]) == step.num_past + width
        padded = [*step.block_table, *[SCRATCH] * shape.blocks][: shape.blocks]
        assert batch.block_table[row].tolist() == padded
        at, first = at + step.num_new, first + width
    assert bool((inputs.last[len(steps) :] == 0).all())


SHAPES = [GraphShape(8, 1, 16), GraphShape(1, 16, 16), GraphShape(4, 32, 16), GraphShape(1, 128, 16)]
SHAPES += [GraphShape(8, 1, 16, rest_tokens=64), GraphShape(1, 1, 16, rest_tokens=64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_are_those_of_the_present_step_whatever_was_filled_before(shape: GraphShape) -> None:
    dice, inputs = random.Random(1), inputs_of(shape)
    steps: list[SequenceStep] = []
    for _ in range(30):
        if steps and dice.random() < 0.5:  # the same sequences one step later, some with another block table
            steps = [
                SequenceStep(
                    block_table=[*step.block_table, *[7] * dice.randrange(2)],
                    num_past=step.num_past + step.num_new,
                    num_new=1,
                )
                for step in steps[dice.randrange(2) :]
                if len(step.block_table) * SIZE > step.num_past + step.num_new
            ]
            steps = steps[: shape.sequences] or steps_of(dice, 1, shape.new_tokens)
        else:
            steps = steps_of(dice, dice.randint(1, shape.sequences), shape.new_tokens)
        if shape.rest_tokens:
            steps = [*steps, *steps_of(dice, 1, shape.rest_tokens, least_new=2)]
        ids = [dice.randrange(1000) for _ in range(sum(step.num_new for step in steps))]
        inputs.fill(steps, ids, ())
        assert_filled(inputs, shape, steps, ids)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("news", [[1, 1, 1], [20, 3], [100], [1, 1, 1, 40], [1, 200]], ids=str)
def test_a_padded_pass_has_the_logits_of_the_eager_one(news: list[int], is_fused: bool) -> None:
    model = make_model("qwen3", block_size=SIZE)
    pool = HotPool(probe_layout(model, block_size=SIZE), 60, CPU)
    compute: Any = fuse_model(model, "on", OneRank()) if is_fused else PlainModel(model)
    generator, dice = torch.Generator().manual_seed(3), random.Random(4)
    blocks = dice.sample(range(60), 60)
    tables = [[blocks.pop() for _ in range(17 if new > 1 else 3)] for new in news]
    pasts = [dice.randrange(1, 30) for _ in news]

    def tokens(counts: list[int]) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (sum(counts),), generator=generator)

    def steps_after(past: list[int], new: list[int]) -> list[SequenceStep]:
        rows = zip(tables, past, new, strict=True)
        return [SequenceStep(block_table=table, num_past=p, num_new=n) for table, p, n in rows]

    with torch.inference_mode(), AttentionSwitch(model):
        before = build_batch(pool, steps_after([0] * len(news), pasts), block_size=SIZE, device=CPU)
        compute(tokens(pasts), before)
        steps, ids = steps_after(pasts, news), tokens(news)
        batch = build_batch(pool, steps, block_size=SIZE, device=CPU)
        want = compute(ids, batch, torch.tensor(batch.query_starts[1:]) - 1).clone()
        shape = graph_shape(steps, (), block_size=SIZE)
        assert shape is not None
        cache: Any = SimpleNamespace(config=SimpleNamespace(block_size=SIZE), hot=pool)
        inputs = GraphInputs(shape, cache, CPU, attention=make_attention("auto", CPU))
        inputs.fill(steps, ids.tolist(), ())
        for part in (inputs.batch, *inputs.batch.parts):
            assert part.kv_lengths == part.kv_lengths_tensor.tolist()
        out = torch.empty(shape.rows, VOCABULARY)
        got = compute(inputs.token_ids, inputs.batch, inputs.last, out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got[: len(news)], want, atol=1e-4, rtol=1e-4)


def test_a_block_table_that_is_rewritten_in_place_is_copied_again() -> None:
    inputs = inputs_of(GraphShape(1, 1, 16))
    table = [3, 4]
    inputs.fill([SequenceStep(block_table=table, num_past=20, num_new=1)], [5], ())
    table[1] = 8  # as when a commit or a defragmentation moves a block
    inputs.fill([SequenceStep(block_table=table, num_past=21, num_new=1)], [6], ())
    assert inputs.batch.block_table[0, :2].tolist() == [3, 8]
    assert int(inputs.batch.block_ids[0]) == 8


@pytest.mark.parametrize("seed", range(5))
def test_the_metadata_of_an_eager_pass_is_that_of_each_token(seed: int) -> None:
    dice = random.Random(seed)
    steps = steps_of(dice, dice.randint(1, 6), 40)
    pool: Any = None
    batch = build_batch(pool, steps, block_size=SIZE, device=CPU)
    tokens = [(step, step.num_past + new) for step in steps for new in range(step.num_new)]
    assert batch.position_ids[0].tolist() == [position for _, position in tokens]
    assert batch.block_ids.tolist() == [step.block_table[position // SIZE] for step, position in tokens]
    assert batch.offsets.tolist() == [position % SIZE for _, position in tokens]
    ends = [sum(step.num_new for step in steps[:i]) for i in range(len(steps) + 1)]
    lengths = [step.num_past + step.num_new for step in steps]
    assert batch.query_starts == batch.query_starts_tensor.tolist() == ends
    assert batch.kv_lengths == batch.kv_lengths_tensor.tolist() == lengths
    assert batch.kv_starts_tensor.tolist() == [sum(lengths[:i]) for i in range(len(steps) + 1)]
    width = -(-max(lengths) // SIZE)
    for row, step in enumerate(steps):
        assert batch.block_table[row].tolist() == [*step.block_table, *[0] * width][:width]
    assert batch.max_new == max(step.num_new for step in steps)
    assert batch.is_even == (len({step.num_new for step in steps}) == 1)
    assert batch.has_past == any(step.num_past for step in steps)


@pytest.mark.parametrize("singles", [1, 3])
@pytest.mark.parametrize("has_past", [True, False])
def test_a_mixed_pass_attends_its_decoding_sequences_apart(singles: int, has_past: bool) -> None:
    dice = random.Random(singles)
    steps = steps_of(dice, singles, 1)
    steps += [replace(each, num_past=each.num_past * has_past) for each in steps_of(dice, 2, 30, least_new=2)]
    pool: Any = None
    whole = build_batch(pool, steps, block_size=SIZE, device=CPU)
    one, rest = (build_batch(pool, each, block_size=SIZE, device=CPU) for each in (steps[:singles], steps[singles:]))
    assert not (one.parts or rest.parts)
    assert [part.tokens for part in whole.parts] == [slice(singles), slice(singles, whole.query_starts[-1])]
    for part, want in zip(whole.parts, (one, rest), strict=True):
        for name in ("query_starts", "kv_lengths", "max_new", "is_even"):
            assert getattr(part, name) == getattr(want, name), name
        for name in ("query_starts_tensor", "kv_starts_tensor", "kv_lengths_tensor"):
            assert getattr(part, name).tolist() == getattr(want, name).tolist(), name
        width = want.block_table.shape[1]
        assert torch.equal(part.block_table[:, :width], want.block_table)
    assert whole.parts[1].has_past == has_past
    backwards = build_batch(pool, steps[::-1], block_size=SIZE, device=CPU)
    assert not backwards.parts


def test_a_cascades_lengths_grow_while_its_plan_stays() -> None:
    tables = [[1, 2, 5], [1, 2, 6], [9]]
    lengths = [40, 36, 10]
    plan = (SharedPrefix((0, 1), 2),)
    shape = CascadeShape.of(plan, lengths, block_size=SIZE)
    cascade = CascadeBatch(shape, block_size=SIZE, scratch_block=SCRATCH, device=CPU)
    for later in range(3):
        cascade.fill(plan, tables, [length + later for length in lengths])
        assert cascade.own_past.tolist() == [7 + later, 3 + later, 9 + later]
        assert cascade.own_table[:, 0].tolist() == [5, 6, 9]
    tables[0][2] = 8
    cascade.fill(plan, tables, lengths)
    assert cascade.own_table[:, 0].tolist() == [8, 6, 9]
    cascade.fill((SharedPrefix((0, 1), 1),), tables, lengths)
    assert cascade.own_past.tolist() == [23, 19, 9]
    assert cascade.shared_lengths.tolist() == [SIZE]


def decoding(count: int, past: int = 10, new: int = 1) -> list[SequenceStep]:
    return [SequenceStep(block_table=[1] * 99, num_past=past, num_new=new)] * count


def test_graphs_round_a_batch_up_by_little() -> None:
    for count in range(1, MAX_GRAPH_ROWS + 1):
        shape = graph_shape(decoding(count), (), block_size=SIZE)
        assert shape is not None
        assert count <= shape.sequences < count + 16
        assert shape.sequences <= 2 * count
        assert (shape.new_tokens, shape.blocks) == (1, 16)
    shapes = {graph_shape(decoding(count), (), block_size=SIZE) for count in range(1, MAX_GRAPH_ROWS + 1)}
    assert len(shapes) == 27
    assert graph_shape(decoding(MAX_GRAPH_ROWS + 1), (), block_size=SIZE) is None


@pytest.mark.parametrize(
    ("count", "new", "want"),
    [
        *[(1, 2, (1, 16)), (1, 17, (1, 32)), (1, 64, (1, 64)), (1, 65, (1, 128)), (1, 512, (1, 512))],
        *[(3, 20, (4, 32)), (4, 64, (4, 64)), (16, 9, (16, 16)), (2, 100, (2, 128))],
    ],
)
def test_a_few_new_tokens_of_several_sequences_have_graphs_too(count: int, new: int, want: tuple[int, int]) -> None:
    shape = graph_shape(decoding(count, new=new), (), block_size=SIZE)
    assert shape is not None
    assert (shape.sequences, shape.new_tokens, shape.rest_tokens) == (*want, 0)


@pytest.mark.parametrize(
    ("count", "new", "want"),
    [(1, 2, (1, 64)), (3, 65, (4, 128)), (64, 512, (64, 512)), (65, 300, (96, 512)), (255, 9, (256, 64))],
)
def test_a_sequence_that_prefills_beside_decoding_ones_has_graphs_too(
    count: int, new: int, want: tuple[int, int]
) -> None:
    steps = [*decoding(count), *decoding(1, past=500, new=new)]
    shape = graph_shape(steps, (), block_size=SIZE)
    assert shape is not None
    assert (shape.sequences, shape.rest_tokens, shape.new_tokens) == (*want, 1)
    assert shape.blocks * SIZE >= 500 + shape.rest_tokens
    other = graph_shape(steps[::-1], (), block_size=SIZE)
    assert other is None or not other.rest_tokens, "only if the decoding ones come first"


@pytest.mark.parametrize(("count", "new"), [(1, 513), (5, 33), (17, 2), (2, 129), (257, 1)])
def test_passes_of_many_tokens_run_eagerly(count: int, new: int) -> None:
    assert graph_shape(decoding(count, new=new), (), block_size=SIZE) is None


def test_a_graph_has_room_for_the_blocks_of_its_padding() -> None:
    shape = graph_shape(decoding(1, past=16 * SIZE - 2, new=2), (), block_size=SIZE)
    assert shape is not None
    assert shape.blocks == 32
