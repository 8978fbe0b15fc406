"""Cascade attention: the tensors and passes of a decode step whose sequences read a shared prefix together.

`cascade` plans which sequences do. The shared pass attends the queries of a group, as the tokens of one sequence, to
the shared blocks; it needs no mask, because those blocks precede every query. The own pass attends each sequence to its
other blocks and writes K and V of the new tokens. A merge by log-sum-exp gives the exact result, up to rounding.
Source: the cascade attention of FlashInfer; Hydragen (Juravsky et al., 2024).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.attention_merge import merge_shared
from tierkv.engine.backends.flash import why_not_flash
from tierkv.engine.backends.protocol import LayerShape, PagedQuery
from tierkv.engine.backends.torch_attention import attend_cpu
from tierkv.engine.cascade import SharedPrefix

__all__ = [
    "CascadeBatch",
    "CascadeShape",
    "attend_cascade",
    "attend_with_flash",
    "can_cascade",
    "own_pass",
    "shared_pass",
]

_TILE_ROWS = 64  # queries of one program of flash-attn's split kernel; fewer are padded


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeShape:
    """The sizes of a cascade's tensors.

    groups: shared prefixes. members: the most sequences of a group. is_whole: there is one group, whose members are
    all sequences of the batch in order, so that no query is gathered.
    """

    sequences: int
    groups: int
    members: int
    shared_blocks: int
    own_blocks: int
    is_whole: bool

    @classmethod
    def of(cls, plan: Sequence[SharedPrefix], kv_lengths: Sequence[int], *, block_size: int) -> CascadeShape:
        """Return the exact sizes for a plan. kv_lengths: tokens of each sequence, the new token included."""
        own = [-(-length // block_size) for length in kv_lengths]
        for group in plan:
            for row in group.rows:
                own[row] -= group.num_blocks
        members = max(len(group.rows) for group in plan)
        is_whole = len(plan) == 1 and 2 * members >= len(kv_lengths)
        return cls(
            sequences=len(kv_lengths),
            groups=len(plan),
            members=len(kv_lengths) if is_whole else members,
            shared_blocks=max(group.num_blocks for group in plan),
            own_blocks=max(own),
            is_whole=is_whole,
        )


class CascadeBatch:
    """The tensors of a decode step's cascade: views of one int32 tensor, so that one copy fills them.

    shared_table: [groups, shared_blocks]; shared_lengths: [groups], in tokens. own_table: [sequences, own_blocks] and
    own_past: [sequences], tokens before the new one, both without the shared blocks. gather: [groups * members], the
    sequences of each group, padded with the first; None if is_whole. positions: [sequences], the place of each sequence
    in `gather`, -1 if it is in no group. side: a stream for the own pass, beside the shared pass.
    """

    def __init__(
        self,
        shape: CascadeShape,
        *,
        block_size: int,
        scratch_block: int,
        device: torch.device,
        side: torch.cuda.Stream | None = None,
    ) -> None:
        self.shape = shape
        self.side = side
        self._block_size = block_size
        self._scratch = scratch_block
        n, slots = shape.sequences, shape.groups * shape.members
        sizes = [shape.groups * shape.shared_blocks, shape.groups, n * shape.own_blocks, n, n, slots]
        self._flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=is_cuda)
        self._host_past = self._host.split(sizes)[3].numpy()
        self._copied = torch.cuda.Event() if is_cuda else None
        self._filled: object = None  # the plan and the tables that the tensors hold
        self._skipped = np.zeros(n, dtype=np.int64)  # tokens of each sequence that it shares
        self.shared_lengths: Tensor
        self.own_past: Tensor
        self.positions: Tensor
        shared, self.shared_lengths, own, self.own_past, self.positions, gather = self._flat.split(sizes)
        self.shared_table: Tensor = shared.view(shape.groups, shape.shared_blocks)
        self.own_table: Tensor = own.view(n, shape.own_blocks)
        self.gather: Tensor | None = None if shape.is_whole else gather

    def fill(self, plan: Sequence[SharedPrefix], tables: Sequence[Sequence[int]], kv_lengths: Sequence[int]) -> None:
        """Write a plan. Padding sequences use the scratch block; padding groups have no tokens.

        Of a plan and tables that it has already, only the lengths are written.
        """
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: its copy must not read this step's numbers
        if (plan, tables) != self._filled:
            self._filled = (plan, [list(table) for table in tables])
            self._write_plan(plan, tables)
        used = len(kv_lengths)
        self._host_past[:used] = np.array(kv_lengths, dtype=np.int64) - 1 - self._skipped[:used]
        self._host_past[used:] = 0
        self._flat.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._flat.device))

    def _write_plan(self, plan: Sequence[SharedPrefix], tables: Sequence[Sequence[int]]) -> None:
        shape, size, scratch = self.shape, self._block_size, self._scratch
        shared, lengths = [scratch] * (shape.groups * shape.shared_blocks), [0] * shape.groups
        skipped, positions = [0] * shape.sequences, [-1] * shape.sequences
        gather = [0] * (shape.groups * shape.members)
        for i, group in enumerate(plan):
            start = i * shape.shared_blocks
            shared[start : start + group.num_blocks] = tables[group.rows[0]][: group.num_blocks]
            lengths[i] = group.num_blocks * size
            for at, row in enumerate(group.rows):
                skipped[row] = group.num_blocks
                positions[row] = row if shape.is_whole else i * shape.members + at
                gather[i * shape.members + at] = row
        own: list[int] = []
        for row, table in enumerate(tables):
            mine = table[skipped[row] : skipped[row] + shape.own_blocks]
            own += [*mine, *[scratch] * (shape.own_blocks - len(mine))]
        own += [scratch] * (shape.sequences * shape.own_blocks - len(own))
        values = [*shared, *lengths, *own, *[0] * shape.sequences, *positions, *gather]
        self._host.numpy()[:] = values
        self._skipped[:] = np.array(skipped) * size


def can_cascade(paged: PagedQuery) -> bool:
    """Return whether a layer can attend in two passes. A layer with a window cannot: it sees little of a prefix."""
    if paged.window is not None:
        return False
    if paged.query.is_cuda:
        return why_not_flash(LayerShape.of(paged)) is None
    return not paged.softcap and paged.keys.shape[-1] == paged.values.shape[-1]


def attend_cascade(paged: PagedQuery, cascade: CascadeBatch, *, side: torch.cuda.Stream | None = None) -> Tensor:
    """Write K and V of one new token for each of B sequences, and attend. Return [B, heads, dim], contiguous.

    side: a stream on which the own pass runs beside the shared one. In a graph it gained 3 to 8 microseconds.
    """
    if paged.query.is_cuda:
        return attend_with_flash(paged, cascade, side=side)
    return _attend_on_cpu(paged, cascade)


def attend_with_flash(paged: PagedQuery, cascade: CascadeBatch, *, side: torch.cuda.Stream | None = None) -> Tensor:
    """Do what `attend_cascade` says by flash-attn and the merge kernel. A CUDA graph may capture it."""
    query = paged.query.contiguous()
    if side is None:
        shared, shared_lse = shared_pass(paged, query, cascade)
        own, own_lse = own_pass(paged, query, cascade)
    else:
        current = torch.cuda.current_stream(query.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            own, own_lse = own_pass(paged, query, cascade)
        shared, shared_lse = shared_pass(paged, query, cascade)
        current.wait_stream(side)
        for tensor in (own, own_lse):
            tensor.record_stream(current)
    out = torch.empty_like(query)
    parts = (shared, shared_lse, own, own_lse, out.view(own.shape))
    merge_shared(*parts, positions=cascade.positions, sinks=paged.sinks)
    return out


def shared_pass(paged: PagedQuery, query: Tensor, cascade: CascadeBatch) -> tuple[Tensor, Tensor]:
    """Attend each group's queries, as the tokens of one sequence, to the blocks that the group shares.

    query: [B, heads, dim]. Returns views ([1, P, kv, g, dim], [1, groups, members, kv, g]) for `merge_shared`.
    flash-attn pads the queries of a head to tiles of 64. If that wastes at least half, the queries of all heads with
    the same K and V are packed in a row, at the cost of a small copy.
    """
    shape, (_, heads, dim) = cascade.shape, query.shape
    kv_heads = paged.keys.shape[2]
    group = heads // kv_heads
    by_kv = query.view(-1, kv_heads, group, dim)
    is_packed = 2 * _tiles(shape.members * group) * kv_heads <= _tiles(shape.members) * heads
    if is_packed:
        by_kv = by_kv.transpose(1, 2)
    by_kv = by_kv.contiguous() if cascade.gather is None else by_kv.index_select(0, cascade.gather)
    packed = (shape.members * group, kv_heads) if is_packed else (shape.members, heads)
    out, lse = _flash_attend(
        paged,
        by_kv.view(shape.groups, *packed, dim),
        lengths=cascade.shared_lengths,
        table=cascade.shared_table,
    )
    if is_packed:
        outs = out.view(-1, group, kv_heads, dim).transpose(1, 2)
        lses = lse.view(shape.groups, kv_heads, shape.members, group).transpose(1, 2)
    else:
        outs = out.view(-1, kv_heads, group, dim)
        lses = lse.view(shape.groups, kv_heads, group, shape.members).permute(0, 3, 1, 2)
    return outs[None], lses[None]


def own_pass(paged: PagedQuery, query: Tensor, cascade: CascadeBatch) -> tuple[Tensor, Tensor]:
    """Write K and V of the new tokens, and attend each sequence's query to its own blocks.

    Returns views ([B, kv, g, dim], [B, kv, g]). Heads with the same K and V are passed as tokens: flash-attn would do
    that itself, but would copy its result back.
    """
    kv_heads = paged.keys.shape[2]
    by_kv = query.view(query.shape[0], kv_heads, -1, query.shape[-1])
    out, lse = _flash_attend(
        paged,
        by_kv.transpose(1, 2),
        lengths=cascade.own_past,
        table=cascade.own_table,
        new={"k": paged.new_keys.unsqueeze(1), "v": paged.new_values.unsqueeze(1)},
    )
    return out.transpose(1, 2), lse.view(by_kv.shape[:3])


def _flash_attend(
    paged: PagedQuery,
    query: Tensor,
    *,
    lengths: Tensor,
    table: Tensor,
    new: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return flash-attn's (out [n, tokens, heads, dim], log-sum-exp [n, heads, tokens]), without a mask."""
    flash: Any = importlib.import_module("flash_attn")
    out, lse = flash.flash_attn_with_kvcache(
        query,
        paged.keys,
        paged.values,
        **(new or {}),
        cache_seqlens=lengths,
        block_table=table,
        softmax_scale=paged.scale,
        causal=False,
        softcap=paged.softcap or 0.0,
        return_softmax_lse=True,
    )
    return out, lse


def _tiles(queries: int) -> int:
    return -(-queries // _TILE_ROWS)


def _attend_on_cpu(paged: PagedQuery, cascade: CascadeBatch) -> Tensor:
    """Compute the same with torch's own kernel, from the same tensors."""
    shape, query = cascade.shape, paged.query
    size, kv_heads = paged.keys.shape[1], paged.keys.shape[2]
    past = cascade.own_past.long()
    places = cascade.own_table.long().gather(1, (past // size).unsqueeze(1)).squeeze(1)
    paged.keys[places, past % size] = paged.new_keys
    paged.values[places, past % size] = paged.new_values
    members = query if cascade.gather is None else query.index_select(0, cascade.gather)
    parts = [
        attend_cpu(paged, queries, table[: -(-length // size)], length)
        for queries, table, length in zip(
            members.split(shape.members), cascade.shared_table.long(), cascade.shared_lengths.tolist(), strict=True
        )
    ]
    rows = zip(query.split(1), cascade.own_table.long(), past.tolist(), strict=True)
    own = [attend_cpu(paged, row, table[: length // size + 1], length + 1) for row, table, length in rows]
    by_kv = (kv_heads, query.shape[1] // kv_heads)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    merge_shared(
        torch.cat([part for part, _ in parts]).unflatten(1, by_kv)[None],
        torch.stack([lse for _, lse in parts]).unflatten(2, by_kv)[None],
        torch.cat([part for part, _ in own]).unflatten(1, by_kv),
        torch.cat([lse for _, lse in own]).unflatten(1, by_kv),
        out.unflatten(1, by_kv),
        positions=cascade.positions,
        sinks=paged.sinks,
    )
    return out
