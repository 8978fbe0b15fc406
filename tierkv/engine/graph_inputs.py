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
from tierkv.engine.cascade import SharedPrefix
from tierkv.movers.mover import wait_here

__all__ = ["GraphInputs", "GraphShape", "LoadEvents"]


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The shape of a graph: sequences, new tokens of each, blocks in the table, and prefixes read together."""

    sequences: int
    new_tokens: int
    blocks: int
    cascade: CascadeShape | None = None


class GraphInputs:
    """The static tensors of one graph.

    token_ids: [sequences * new_tokens] int64. last: [sequences] int64, the place of each sequence's last new token.
    """

    def __init__(
        self,
        shape: GraphShape,
        cache: TierCache,
        device: torch.device,
        load_events: LoadEvents | None = None,
        side: torch.cuda.Stream | None = None,
    ) -> None:
        self._shape = shape
        self._size = cache.config.block_size
        self._scratch = cache.hot.scratch_block
        count, tokens, is_cuda = shape.sequences, shape.sequences * shape.new_tokens, device.type == "cuda"
        wide, narrow = [tokens] * 4 + [count], [count, count * shape.blocks]
        self._wide = torch.zeros(sum(wide), dtype=torch.int64, device=device)
        self._narrow = torch.zeros(sum(narrow), dtype=torch.int32, device=device)
        self.token_ids: Tensor
        self.last: Tensor
        self.token_ids, positions, block_ids, offsets, self.last = self._wide.split(wide)
        lengths, table = self._narrow.split(narrow)
        self._host_wide = torch.zeros(sum(wide), dtype=torch.int64, pin_memory=is_cuda)
        self._host_narrow = torch.zeros(sum(narrow), dtype=torch.int32, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        self._ids, self._positions, self._blocks, self._offsets = (
            each.numpy().reshape(count, shape.new_tokens) for each in self._host_wide[: 4 * tokens].split(tokens)
        )
        self._last = self._host_wide[4 * tokens :].numpy()
        self._lengths = self._host_narrow[:count].numpy()
        self._table = self._host_narrow[count:].numpy().reshape(count, shape.blocks)
        self._table[:] = self._scratch
        self._known: list[list[int]] = [[] for _ in range(count)]  # the block table in each row of the table
        self._firsts = np.arange(count) * shape.new_tokens
        self._steps = np.arange(shape.new_tokens)
        self._cascade = (
            CascadeBatch(shape.cascade, block_size=self._size, scratch_block=self._scratch, device=device, side=side)
            if shape.cascade
            else None
        )
        starts = list(range(0, tokens + 1, shape.new_tokens))
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
            loads=[load_events] if load_events else [],
            cascade=self._cascade,
        )
        self.fill([], [], [])

    def fill(self, steps: Sequence[SequenceStep], token_ids: Sequence[int], plan: Sequence[SharedPrefix]) -> None:
        """Write the steps' inputs; padding sequences and tokens point at the scratch block.

        The cost in Python is a comparison of each block table with the one that its row has; only changed rows are
        written.
        """
        shape, count = self._shape, self._shape.sequences
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: without it, its copy might read this step's numbers
        self._write_tables(steps)
        past, new = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        past[: len(steps)] = [step.num_past for step in steps]
        new[: len(steps)] = [step.num_new for step in steps]
        is_token = self._steps < new[:, None]
        self._ids[:] = 0
        self._ids[is_token] = token_ids
        np.add(past[:, None], self._steps, out=self._positions)
        np.remainder(self._positions, self._size, out=self._offsets)
        places = np.minimum(self._positions // self._size, shape.blocks - 1)
        self._blocks[:] = np.where(is_token, np.take_along_axis(self._table, places, axis=1), self._scratch)
        self._last[:] = self._firsts + np.maximum(new - 1, 0)
        self._lengths[:] = past + shape.new_tokens
        self._wide.copy_(self._host_wide, non_blocking=True)
        self._narrow.copy_(self._host_narrow, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._wide.device))
        if self._cascade:
            tables = [step.block_table for step in steps]
            self._cascade.fill(plan, tables, [step.num_past + step.num_new for step in steps])

    def _write_tables(self, steps: Sequence[SequenceStep]) -> None:
        for row, known in enumerate(self._known):
            table = steps[row].block_table if row < len(steps) else []
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
