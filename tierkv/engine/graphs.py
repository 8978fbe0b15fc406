"""Forward passes of few new tokens, captured once as CUDA graphs and replayed.

With K and V cached, what is left of a request is small: a GPU does it in less time than Python needs to launch
it. A replay launches everything at once. Each graph has static inputs for a number of sequences, of new tokens and
of blocks in the table, each rounded up; what is padding writes into the pool's scratch block and is never read.

Source: the decode graphs of vLLM and nano-vLLM; extended to the short rest of a cached prompt.
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
    """What a graph was captured for: sequences, new tokens of each, blocks in the table, prefixes read together."""

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
    """Replays what it can of a model over a cache; says None for what must run eagerly.

    A shape is captured at its second use: the first runs eagerly and warms up every kernel. A model that cannot
    be captured is found out then, and runs eagerly from there on.
    """

    def __init__(self, model: Any, cache: TierCache) -> None:
        self._model = model
        self._cache = cache
        self._graphs: dict[_Shape, _Graph] = {}
        self._seen: set[_Shape] = set()
        self._is_usable = model.device.type == "cuda" and layout_uses_flash(cache.layout)
        if self._is_usable:
            self._gate = _LoadGate(cache.layer_groups, model.device)
            self._memory = torch.cuda.graph_pool_handle()
            # Captured on a stream of the model's GPU: torch's own may lie on another one and would see nothing.
            self._stream = torch.cuda.Stream(model.device)
            self._side = torch.cuda.Stream(model.device)  # a cascade's own pass, beside the shared one

    def run(
        self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix] = ()
    ) -> Tensor | None:
        """Return logits [sequences, vocabulary] of each sequence's last token, or None to run eagerly.

        token_ids: the new tokens of all steps, packed. plan: which of the steps read a prefix together. The result
        is overwritten by the next call.
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
        self._gate.open([step.loads for step in steps if step.loads is not None])
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
        inputs = _Inputs(shape, self._cache, self._model.device, self._gate, self._side)
        graph = torch.cuda.CUDAGraph()
        try:
            if shape.cascade:  # rounded sizes may want another variant of the merge kernel than the eager run did
                forward(self._model, inputs.token_ids, inputs.batch, logits_to_keep=inputs.last)
            # Other threads go on copying blocks meanwhile, which only this mode allows.
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
    """The static tensors of one graph, and how a step is written into them with two copies."""

    def __init__(
        self, shape: _Shape, cache: TierCache, device: torch.device, gate: _LoadGate, side: torch.cuda.Stream
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
            loads=[gate],
            cascade=self._cascade,
        )
        self.fill([], [], [])

    def fill(self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix]) -> None:
        """Write the steps' inputs; sequences and tokens that are padding point at the scratch block."""
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


class _LoadGate:
    """Lets a graph wait, layer group by layer group, for whatever is on its way up when it is replayed.

    The graph waits for one event a group, outside of it; before a replay those are recorded behind the copies.
    """

    def __init__(self, layer_groups: Sequence[int], device: torch.device) -> None:
        self._ends = list(layer_groups)
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event(external=True) for _ in self._ends]
        for event in self._events:
            event.record(self._stream)

    def wait_layer(self, layer: int) -> None:
        """Wait, at the first layer of each group, for the group's event."""
        for at, first in enumerate([0, *self._ends[:-1]]):
            if first == layer:
                wait_here(self._events[at])

    def open(self, loads: Sequence[Any]) -> None:
        """Record each group's event once everything that the loads bring for it has arrived."""
        if not loads:
            return
        with torch.cuda.stream(self._stream):
            for at, first in enumerate([0, *self._ends[:-1]]):
                for load in loads:
                    load.wait_layer(first)
                self._events[at].record(self._stream)


def _cascade_shape(steps: Sequence[SequenceStep], plan: Sequence[SharedPrefix], block_size: int) -> CascadeShape:
    """Return the sizes of a plan's tensors, rounded up so that few graphs serve many batches.

    Shared blocks are rounded up to an eighth only: flash-attn splits the table's width, not the prefix's length.
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
