"""GraphedModel: forward passes of few new tokens, captured once as CUDA graphs and replayed.

With cached K and V, a GPU computes the few new tokens in less time than Python needs to launch the kernels; a replay
launches all at once. Each graph has static inputs for a number of sequences, of new tokens and of blocks in the table,
all rounded up. Padding writes into the pool's scratch block, which nothing reads.
Source: the decode graphs of vLLM and nano-vLLM; extended to the few uncached tokens of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention import AttentionBatch, SequenceStep, forward
from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape
from tierkv.engine.attention_paged import MAX_SPLIT_TOKENS, layout_uses_flash
from tierkv.engine.cascade import SharedPrefix
from tierkv.movers.mover import wait_here

__all__ = ["GraphedModel"]

_log = logging.getLogger(__name__)
_MIN_TABLE_BLOCKS = 16
_MIN_OWN_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class _Shape:
    """The shape of a graph: sequences, new tokens of each, blocks in the table, and prefixes read together."""

    sequences: int
    new_tokens: int
    blocks: int
    cascade: CascadeShape | None = None


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    logits: Tensor


class GraphedModel:
    """Replays forward passes of a model over a cache; returns None for passes that must run eagerly.

    A shape is captured at its second use; the first runs eagerly and compiles every kernel. If a capture fails, the
    model runs eagerly from then on.
    """

    def __init__(self, model: Any, cache: TierCache) -> None:
        self._model = model
        self._cache = cache
        self._graphs: dict[_Shape, _Graph] = {}
        self._seen: set[_Shape] = set()
        self._is_usable = model.device.type == "cuda" and layout_uses_flash(cache.layout)
        if self._is_usable:
            self._load_events = _LoadEvents(cache.layer_groups, model.device)
            self._memory = torch.cuda.graph_pool_handle()
            # A capture needs a stream of the model's GPU; torch's own capture stream may be of another GPU.
            self._stream = torch.cuda.Stream(model.device)
            self._side = torch.cuda.Stream(model.device)  # for a cascade's own pass, beside the shared pass

    def run(
        self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix] = ()
    ) -> Tensor | None:
        """Return logits [sequences, vocabulary] of each sequence's last token, or None to run eagerly.

        token_ids: the new tokens of all steps, packed. plan: which steps read a prefix together. The next call
        overwrites the result.
        """
        shape = self._shape_of(steps, plan) if self._is_usable else None
        if shape is None:
            return None
        if shape not in self._graphs:
            if shape not in self._seen:
                self._seen.add(shape)
                return None
            if not self._capture(shape):
                return None
        found = self._graphs[shape]
        found.inputs.fill(steps, token_ids, plan)
        self._load_events.record([step.loads for step in steps if step.loads is not None])
        found.graph.replay()
        return found.logits[: len(steps)]

    def _shape_of(self, steps: Sequence[SequenceStep], plan: Sequence[SharedPrefix]) -> _Shape | None:
        longest = max(step.num_past + step.num_new for step in steps)
        num_new = max(step.num_new for step in steps)
        if num_new > MAX_SPLIT_TOKENS or (len(steps) > 1 and num_new > 1):
            return None
        padded = 1 if num_new == 1 else max(16, _power_of_two(num_new))
        size = self._cache.config.block_size
        blocks = max(_MIN_TABLE_BLOCKS, _power_of_two(-(-(longest + padded) // size)))
        cascade = _cascade_shape(steps, plan, size) if plan else None
        return _Shape(_power_of_two(len(steps)), padded, blocks, cascade)

    def _capture(self, shape: _Shape) -> bool:
        inputs = _Inputs(shape, self._cache, self._model.device, self._load_events, self._side)
        graph = torch.cuda.CUDAGraph()
        try:
            if shape.cascade:  # rounded sizes may need another variant of the merge kernel than the eager run
                forward(self._model, inputs.token_ids, inputs.batch, logits_to_keep=inputs.last)
            # Other threads copy blocks meanwhile; only this mode allows that.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                inputs.batch.seen_layers.clear()
                logits = forward(self._model, inputs.token_ids, inputs.batch, logits_to_keep=inputs.last)
        except RuntimeError as exc:
            self._is_usable = False
            _log.info("%s cannot be captured as a CUDA graph and runs eagerly: %s", type(self._model).__name__, exc)
            return False
        self._graphs[shape] = _Graph(graph, inputs, logits)
        return True


class _Inputs:
    """The static tensors of one graph; two copies fill them for a step."""

    def __init__(
        self, shape: _Shape, cache: TierCache, device: torch.device, load_events: _LoadEvents, side: torch.cuda.Stream
    ) -> None:
        self._shape = shape
        self._size = cache.config.block_size
        self._scratch = cache.hot.scratch_block
        count, tokens = shape.sequences, shape.sequences * shape.new_tokens
        self._wide = torch.zeros(4 * tokens + count, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(count * (shape.blocks + 1), dtype=torch.int32, device=device)
        self.token_ids, positions, block_ids, offsets, self.last = self._wide.split([tokens] * 4 + [count])
        lengths, table = self._narrow.split([count, count * shape.blocks])
        starts = list(range(0, tokens + 1, shape.new_tokens))
        self._cascade = (
            CascadeBatch(shape.cascade, block_size=self._size, scratch_block=self._scratch, device=device, side=side)
            if shape.cascade
            else None
        )
        self.batch = AttentionBatch(
            pool=cache.hot,
            block_size=self._size,
            query_starts=starts,
            kv_lengths=[],
            block_table=table.view(count, shape.blocks),
            query_starts_tensor=torch.tensor(starts, dtype=torch.int32, device=device),
            kv_starts_tensor=torch.empty(0, dtype=torch.int32, device=device),
            kv_lengths_tensor=lengths,
            max_new=shape.new_tokens,
            is_even=True,
            has_past=True,
            block_ids=block_ids,
            offsets=offsets,
            position_ids=positions.view(1, tokens),
            loads=[load_events],
            cascade=self._cascade,
        )
        self.fill([], [], [])

    def fill(self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix]) -> None:
        """Write the steps' inputs; padding sequences and tokens point at the scratch block."""
        shape, size, scratch = self._shape, self._size, self._scratch
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        last: list[int] = []
        lengths: list[int] = []
        table: list[int] = []
        starts = [0, *accumulate(step.num_new for step in steps)]
        for row in range(shape.sequences):
            step = steps[row] if row < len(steps) else None
            past, new = (step.num_past, step.num_new) if step else (0, 0)
            own = list(step.block_table) if step else []
            span = range(past, past + shape.new_tokens)
            ids += token_ids[starts[row] : starts[row + 1]] if step else []
            ids += [0] * (shape.new_tokens - new)
            positions += span
            blocks += [own[p // size] if i < new else scratch for i, p in enumerate(span)]
            offsets += [p % size for p in span]
            last.append(row * shape.new_tokens + max(new - 1, 0))
            lengths.append(past + shape.new_tokens)
            table += [*own[: shape.blocks], *[scratch] * (shape.blocks - len(own))]
        self._wide.copy_(torch.tensor([*ids, *positions, *blocks, *offsets, *last], dtype=torch.int64))
        self._narrow.copy_(torch.tensor([*lengths, *table], dtype=torch.int32))
        if self._cascade:
            tables = [step.block_table for step in steps]
            self._cascade.fill(plan, tables, [step.num_past + step.num_new for step in steps])


class _LoadEvents:
    """Makes a graph wait for loads in flight at its replay, group of layers by group.

    The graph waits for one external event per group; `record` records them behind the copies before a replay.
    """

    def __init__(self, layer_groups: Sequence[int], device: torch.device) -> None:
        self._ends = list(layer_groups)
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event(external=True) for _ in self._ends]
        for event in self._events:
            event.record(self._stream)

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait for a group's event at its first layer."""
        for at, first in enumerate([0, *self._ends[:-1]]):
            if first == layer:
                wait_here(self._events[at])

    def record(self, loads: Sequence[Any]) -> None:
        """Record each group's event behind the arrival of its layers in all loads."""
        if not loads:
            return
        with torch.cuda.stream(self._stream):
            for at, first in enumerate([0, *self._ends[:-1]]):
                for load in loads:
                    load.wait_layer(first)
                self._events[at].record(self._stream)


def _cascade_shape(steps: Sequence[SequenceStep], plan: Sequence[SharedPrefix], block_size: int) -> CascadeShape:
    """Return the sizes of a plan's tensors, rounded up so that few graphs serve many batches.

    Shared blocks are rounded up by an eighth at most, because flash-attn splits the table's width, not the prefix.
    """
    exact = CascadeShape.of(plan, [step.num_past + step.num_new for step in steps], block_size=block_size)
    sequences = _power_of_two(len(steps))
    eighth = max(1, _power_of_two(exact.shared_blocks) // 16)
    return CascadeShape(
        sequences=sequences,
        groups=_power_of_two(exact.groups),
        members=sequences if exact.is_whole else _power_of_two(exact.members),
        shared_blocks=-(-exact.shared_blocks // eighth) * eighth,
        own_blocks=max(_MIN_OWN_BLOCKS, _power_of_two(exact.own_blocks)),
        is_whole=exact.is_whole,
    )


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length() if count > 1 else 1
