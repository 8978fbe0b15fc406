"""Each attention backend against the definition of attention, token by token, in every kind of batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from forced_attention import install_stand_ins, on_cpu
from places import Place

from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import ATTENTION_NAMES, make_attention
from tierkv.engine.backends.flashinfer import FlashInferBackend
from tierkv.engine.backends.protocol import LayerShape, PagedQuery, attend, update_plans
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

NAMES = ATTENTION_NAMES[1:]

# Tokens before and new tokens of each sequence, as parts of the block size where below 1.
BATCHES: dict[str, list[tuple[float, int]]] = {
    "decode": [(2.5, 1), (0.1, 1), (4, 1)],
    "suffix of one": [(4.3, 7)],
    "even suffixes": [(1, 5), (2.1, 5)],
    "uneven": [(1.5, 9), (0, 3), (2, 20)],
    "long": [(1.2, 600), (0.3, 40)],
    "nothing cached": [(0, 11), (0, 30)],
    "decode and prefill": [(2.5, 1), (3, 1), (1.5, 33), (0, 4)],
}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        install_stand_ins(monkeypatch)


def choice_of(name: str, place: Place) -> AttentionChoice:
    if place.device == "cpu":
        if torch.cuda.is_available() and name != "torch":
            pytest.skip("the real module is there, for the GPU")
        return on_cpu(name)
    return make_attention(name, torch.device(place.device))


class Pass:
    """A batch over random K and V, whose new tokens are written."""

    def __init__(
        self,
        kind: str,
        place: Place,
        attention: AttentionChoice,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 64,
        **options: Any,
    ) -> None:
        size, device = place.block_size, torch.device(place.device)
        dice, generator = random.Random(kind), torch.Generator().manual_seed(7)
        layout = BlockLayout.uniform(
            num_layers=2,
            block_size=size,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=str(place.dtype).removeprefix("torch."),
        )
        counts = [(int(past * size), new) for past, new in BATCHES[kind]]
        needed = [-(-(past + new) // size) for past, new in counts]
        self.pool = HotPool(layout, sum(needed), device)
        self.pool.blocks.copy_(torch.randn(self.pool.blocks.shape, generator=generator))
        free = dice.sample(range(sum(needed)), sum(needed))
        tables = [[free.pop() for _ in range(count)] for count in needed]
        steps = [
            SequenceStep(block_table=table, num_past=past, num_new=new)
            for table, (past, new) in zip(tables, counts, strict=True)
        ]
        self.batch: AttentionBatch = build_batch(self.pool, steps, block_size=size, device=device, attention=attention)
        self.counts, self.tables = counts, tables
        tokens = sum(new for _, new in counts)
        query = torch.randn(tokens, heads, dim, generator=generator).to(device, place.dtype) * 2
        self.queries = [self._paged(query, layer, options) for layer in range(2)]

    def _paged(self, query: torch.Tensor, layer: int, options: dict[str, Any]) -> PagedQuery:
        keys, values = self.pool.key_cache(layer), self.pool.value_cache(layer)
        places = (self.batch.block_ids, self.batch.offsets)
        return PagedQuery(
            query=query,
            new_keys=keys[places],
            new_values=values[places],
            keys=keys,
            values=values,
            scale=0.11,
            **options,
        )

    def wanted(self, layer: int) -> torch.Tensor:
        """Compute attention from its definition, in float64."""
        paged, rows = self.queries[layer], []
        group = paged.query.shape[1] // paged.keys.shape[2]
        at = 0
        for table, (past, new) in zip(self.tables, self.counts, strict=True):
            keys, values = (
                each[table].flatten(0, 1).double().cpu().repeat_interleave(group, 1)
                for each in (paged.keys, paged.values)
            )
            for place in range(past, past + new):
                first = max(0, place - paged.window + 1) if paged.window else 0
                scores = (keys[first : place + 1] * paged.query[at].double().cpu()).sum(-1).t() * paged.scale
                if paged.softcap:
                    scores = (scores / paged.softcap).tanh() * paged.softcap
                if paged.sinks is not None:
                    scores = torch.cat([scores, paged.sinks.double().cpu()[:, None]], 1)
                weights = scores.softmax(-1)[:, : place + 1 - first]
                rows.append(torch.einsum("hl,lhd->hd", weights, values[first : place + 1]))
                at += 1
        return torch.stack(rows)

    def assert_right(self) -> None:
        for layer, paged in enumerate(self.queries):
            got, want = attend(paged, self.batch), self.wanted(layer)
            assert got.is_contiguous()
            assert got.dtype == paged.query.dtype
            error = (got.double().cpu() - want).square().mean().sqrt() / want.square().mean().sqrt()
            assert error <= (5e-3 if got.dtype == torch.bfloat16 else 5e-6), f"layer {layer}"


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_attends_as_attention_is_defined(name: str, kind: str, place: Place) -> None:
    Pass(kind, place, choice_of(name, place)).assert_right()


OPTIONS: dict[str, dict[str, Any]] = {
    "window in a block": {"window": 5},
    "window over blocks": {"window": 300},
    "window of one": {"window": 1},
    "softcap": {"softcap": 3.0},
    "softcap and window": {"softcap": 3.0, "window": 37},
    "many heads on one": {"heads": 8, "kv_heads": 1},
    "heads of their own": {"heads": 3, "kv_heads": 3},
    "dim 128": {"dim": 128},
    "dim 256": {"dim": 256},
}


@pytest.mark.parametrize("kind", ["decode", "uneven", "decode and prefill"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_knows_windows_caps_groups_and_dims(name: str, options: str, kind: str, place: Place) -> None:
    Pass(kind, place, choice_of(name, place), **OPTIONS[options]).assert_right()


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("name", NAMES)
def test_sinks_take_part_in_the_softmax(name: str, window: int | None, kind: str, place: Place) -> None:
    sinks = torch.tensor([2.0, -1.0, 0.5, 4.0], device=place.device, dtype=place.dtype)
    Pass(kind, place, choice_of(name, place), sinks=sinks, window=window).assert_right()


@pytest.mark.parametrize("name", ["flashinfer-fa2", "flashinfer-fa3"])
def test_layers_of_one_shape_share_a_plan_and_others_have_their_own(name: str, place: Place) -> None:
    step = Pass("decode and prefill", place, choice_of(name, place))
    for paged in (*step.queries, *step.queries):
        attend(paged, step.batch)
    assert [len(part.plans) for part in step.batch.parts] == [1, 1]
    assert not step.batch.plans
    step.queries[1].window = 9
    step.assert_right()
    assert [len(part.plans) for part in step.batch.parts] == [2, 2]


@pytest.mark.parametrize("name", ["flashinfer-fa2", "flashinfer-fa3"])
def test_the_next_step_plans_anew_with_the_same_wrapper(name: str, place: Place) -> None:
    choice = choice_of(name, place)
    for kind in ("decode", "uneven", "long", "decode"):
        Pass(kind, place, choice).assert_right()
    backend: Any = choice.backends[0]
    assert len(backend._slots) == 1


def test_a_plan_that_another_step_has_replaced_is_not_run(place: Place) -> None:
    choice = choice_of("flashinfer-fa2", place)
    first, second = (Pass(kind, place, choice) for kind in ("decode", "uneven"))
    first.assert_right()
    second.assert_right()
    with pytest.raises(AssertionError, match="planned for another batch"):
        attend(first.queries[0], first.batch)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_static_batch_is_planned_for_what_it_has_now(name: str, place: Place) -> None:
    """As a graph's: captured with other lengths and tables, then updated in place before each replay."""
    choice = choice_of(name, place)
    step = Pass("even suffixes", place, choice)
    width = step.batch.host_table.shape[1]
    full = list(step.batch.kv_lengths), step.batch.host_table.copy()
    step.batch.kv_range = (5, width * place.block_size)

    def fill(lengths: list[int], table: Any) -> None:
        step.batch.kv_lengths[:] = lengths
        step.batch.kv_lengths_tensor.copy_(torch.tensor(lengths))
        step.batch.host_table[:] = table
        step.batch.block_table.copy_(torch.from_numpy(table))

    fill([5, 5], full[1] * 0)
    attend(step.queries[0], step.batch)  # as at the capture
    (plan,) = step.batch.plans.values()
    fill(*full)
    update_plans(step.batch)
    step.assert_right()
    assert list(step.batch.plans.values()) == [plan], "a graph has captured this one"


def test_a_layers_shape_tells_apart_what_needs_another_plan(place: Place) -> None:
    step = Pass("decode", place, choice_of("torch", place))
    shapes = {LayerShape.of(step.queries[0])}
    for name, value in (("window", 9), ("softcap", 2.0), ("scale", 1.0)):
        setattr(step.queries[0], name, value)
        shapes.add(LayerShape.of(step.queries[0]))
    assert len(shapes) == 4


def test_a_block_table_that_is_too_short_is_refused(place: Place) -> None:
    step = Pass("decode", place, choice_of("flashinfer-fa2", place))
    step.batch.kv_lengths[0] = 9 * place.block_size
    with pytest.raises(ValueError, match="does not hold"):
        attend(step.queries[0], step.batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_graph_replays_a_static_batch_with_new_lengths(name: str) -> None:
    """On a GPU: capture with short sequences, replay with long ones."""
    place = Place("cuda", torch.bfloat16, 256)
    choice = make_attention(name, torch.device("cuda"))
    step = Pass("even suffixes", place, choice)
    table, lengths = step.batch.host_table, step.batch.kv_lengths
    full = list(lengths), table.copy()
    step.batch.kv_range = (5, table.shape[1] * 256)

    def fill(values: list[int], blocks: Any) -> None:
        lengths[:] = values
        step.batch.kv_lengths_tensor.copy_(torch.tensor(values))
        table[:] = blocks
        step.batch.block_table.copy_(torch.from_numpy(blocks))

    fill([5, 5], full[1] * 0)
    attend(step.queries[0], step.batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = attend(step.queries[0], step.batch)
    for _ in range(3):
        fill(*full)
        update_plans(step.batch)
        graph.replay()
        want = step.wanted(0)
        error = (got.double().cpu() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error <= 5e-3


def test_the_stand_in_is_what_is_planned(place: Place) -> None:
    if place.device == "cuda":
        pytest.skip("the real module is there")
    choice = choice_of("flashinfer-fa2", place)
    Pass("decode", place, choice).assert_right()
    (backend,) = choice.backends
    assert isinstance(backend, FlashInferBackend)
    (slot,) = backend._slots.values()
    assert slot.wrapper.plans == slot.planned == 1
