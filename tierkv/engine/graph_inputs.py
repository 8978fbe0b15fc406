"""The static inputs of a CUDA graph: filled in page-locked memory and copied once a step, or twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention import AttentionBatch, SequenceStep
from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape
from tierkv.engine.backends.protocol import BatchPart, Planner, update_plans
from tierkv.engine.cascade import SharedPrefix
from tierkv.movers.mover import wait_here

__all__ = ["MIN_TABLE_BLOCKS", "GraphInputs", "GraphShape", "LoadEvents"]

MIN_TABLE_BLOCKS = 16
"""Blocks in the block table of a graph at least."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The shape of a graph: sequences, new tokens of each, blocks in the table, and prefixes read together.

    rest_tokens: new tokens of one more sequence behind them, which prefills while the others decode; 0: there is none.
    is_sparse: the sequences with one new token read chosen pages.
    """

    sequences: int
    new_tokens: int
    blocks: int
    cascade: CascadeShape | None = None
    rest_tokens: int = 0
    is_sparse: bool = False

    @property
    def rows(self) -> int:
        """All sequences."""
        return self.sequences + (self.rest_tokens > 0)

    @property
    def tokens(self) -> int:
        """All new tokens."""
        return self.sequences * self.new_tokens + self.rest_tokens

    def kv_range(self, block_size: int) -> tuple[int, int]:
        """Return the fewest and the most tokens that its longest sequence may have, its padding included.

        A table is wider than half of its width only for one sequence as long as that: `graphs` rounds widths up to
        powers of two. Of several sequences, others may be shorter.
        """
        most = self.blocks * block_size
        if self.rows > 1 or self.blocks <= MIN_TABLE_BLOCKS:
            return self.new_tokens, most
        return most // 2 - self.new_tokens + 1, most


class GraphInputs:
    """The static tensors of one graph.

    token_ids: [tokens] int64. last: [rows] int64, the place of each step's last new token.
    attention: which backend attends, chosen when the graph is captured. decode_attention: which one attends the
    sequences with one new token, if that is another one.
    """

    def __init__(
        self,
        shape: GraphShape,
        cache: TierCache,
        device: torch.device,
        load_events: LoadEvents | None = None,
        side: torch.cuda.Stream | None = None,
        *,
        attention: Planner,
        decode_attention: Planner | None = None,
    ) -> None:
        self._shape = shape
        self._size = cache.config.block_size
        self._scratch = cache.hot.scratch_block
        rows, tokens, is_cuda = shape.rows, shape.tokens, device.type == "cuda"
        wide, narrow = [tokens] * 4 + [rows], [rows, rows * shape.blocks]
        self._wide = torch.zeros(sum(wide), dtype=torch.int64, device=device)
        self._narrow = torch.zeros(sum(narrow), dtype=torch.int32, device=device)
        self.token_ids: Tensor
        self.last: Tensor
        self.token_ids, positions, block_ids, offsets, self.last = self._wide.split(wide)
        lengths, table = self._narrow.split(narrow)
        self._host_wide = torch.zeros(sum(wide), dtype=torch.int64, pin_memory=is_cuda)
        self._host_narrow = torch.zeros(sum(narrow), dtype=torch.int32, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        self._ids, self._positions, self._blocks, self._offsets, self._last = (
            each.numpy() for each in self._host_wide.split(wide)
        )
        self._lengths = self._host_narrow[:rows].numpy()
        self._table = self._host_narrow[rows:].numpy().reshape(rows, shape.blocks)
        self._table[:] = self._scratch
        self._known: list[list[int]] = [[] for _ in range(rows)]  # the block table in each row of the table
        self._widths = np.array([shape.new_tokens] * shape.sequences + [shape.rest_tokens] * (shape.rest_tokens > 0))
        starts = [0, *np.cumsum(self._widths).tolist()]
        self._firsts = np.array(starts[:-1])
        self._row_of_token = np.repeat(np.arange(rows), self._widths)
        self._place_in_row = np.arange(tokens) - self._firsts[self._row_of_token]
        self._cascade = (
            CascadeBatch(shape.cascade, block_size=self._size, scratch_block=self._scratch, device=device, side=side)
            if shape.cascade
            else None
        )
        self.batch: AttentionBatch = AttentionBatch(
            pool=cache.hot,
            block_size=self._size,
            query_starts=starts,
            kv_lengths=[],
            block_table=table.view(rows, shape.blocks),
            host_table=self._table,
            query_starts_tensor=torch.tensor(starts, dtype=torch.int32, device=device),
            kv_starts_tensor=torch.empty(0, dtype=torch.int32, device=device),
            kv_lengths_tensor=lengths,
            max_new=max(shape.new_tokens, shape.rest_tokens),
            is_even=not shape.rest_tokens,
            has_past=True,
            attention=attention if shape.new_tokens > 1 else decode_attention or attention,
            kv_range=shape.kv_range(self._size),
            block_ids=block_ids,
            offsets=offsets,
            position_ids=positions.view(1, tokens),
            loads=[load_events] if load_events else [],
            cascade=self._cascade,
        )
        if shape.rest_tokens:
            self.batch.parts = (
                self._part(shape.sequences, range(shape.sequences)),
                self._part(shape.rest_tokens, range(shape.sequences, rows)),
            )
            self.batch.parts[1].attention = attention
        self.fill([], [], [])

    def _part(self, num_tokens: int, rows: range) -> BatchPart:
        """Return the part of the batch that has these rows, all with equally many new tokens."""
        batch, first = self.batch, int(self._firsts[rows.start])
        new = num_tokens // len(rows)
        return BatchPart(
            tokens=slice(first, first + num_tokens),
            block_size=batch.block_size,
            query_starts=list(range(0, num_tokens + 1, new)),
            kv_lengths=[],
            block_table=batch.block_table[rows.start : rows.stop],
            host_table=batch.host_table[rows.start : rows.stop],
            query_starts_tensor=batch.kv_starts_tensor,
            kv_starts_tensor=batch.kv_starts_tensor,
            kv_lengths_tensor=batch.kv_lengths_tensor[rows.start : rows.stop],
            max_new=new,
            is_even=True,
            has_past=True,
            attention=batch.attention,
            kv_range=batch.kv_range,
            part=int(rows.start > 0),
        )

    def fill(self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix]) -> None:
        """Write the steps' inputs; padding sequences and tokens point at the scratch block.

        The cost in Python is a comparison of each block table with the one that its row has; only changed rows are
        written.
        """
        shape, count = self._shape, len(steps)
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: without it, its copy might read this step's numbers
        places = np.arange(count)  # the row of each step
        if shape.rest_tokens and count:
            places[-1] = shape.sequences
        self._write_tables(dict(zip(places.tolist(), steps, strict=True)))
        past, new = np.zeros(shape.rows, dtype=np.int64), np.zeros(shape.rows, dtype=np.int64)
        past[places] = [step.num_past for step in steps]
        new[places] = [step.num_new for step in steps]
        rows = self._row_of_token
        is_token = self._place_in_row < new[rows]
        self._ids[:] = 0
        self._ids[is_token] = token_ids
        np.add(past[rows], self._place_in_row, out=self._positions)
        np.remainder(self._positions, self._size, out=self._offsets)
        at = np.minimum(self._positions // self._size, shape.blocks - 1)
        self._blocks[:] = np.where(is_token, self._table[rows, at], self._scratch)
        self._last[:] = 0
        self._last[:count] = self._firsts[places] + new[places] - 1
        self._lengths[:] = past + self._widths
        self.batch.kv_lengths[:] = self._lengths.tolist()
        for part in self.batch.parts:
            first = part.part * shape.sequences
            part.kv_lengths[:] = self.batch.kv_lengths[first : first + len(part.host_table)]
        self._wide.copy_(self._host_wide, non_blocking=True)
        self._narrow.copy_(self._host_narrow, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._wide.device))
        if self._cascade:
            tables = [step.block_table for step in steps]
            self._cascade.fill(plan, tables, [step.num_past + step.num_new for step in steps])
        update_plans(self.batch)

    def _write_tables(self, steps: dict[int, SequenceStep]) -> None:
        """Write the block tables that differ from those of the step before. steps: by their row."""
        for row, known in enumerate(self._known):
            step = steps.get(row)
            table = step.block_table if step is not None else []
            if known != table:
                self._known[row] = list(table)
                used = min(len(table), self._shape.blocks)
                self._table[row, :used] = table[:used]
                self._table[row, used:] = self._scratch


class LoadEvents:
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
