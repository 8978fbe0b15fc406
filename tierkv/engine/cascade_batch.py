"""The tensors by which a decode step's attention knows who reads which prefix together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tierkv.engine.cascade import SharedPrefix

__all__ = ["CascadeBatch", "CascadeShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeShape:
    """The sizes of a cascade's tensors.

    groups: shared prefixes. members: sequences of a group at most. If is_whole, the one group is looked at with every
    sequence of the batch in its place, so that no query is gathered.
    """

    sequences: int
    groups: int
    members: int
    shared_blocks: int
    own_blocks: int
    is_whole: bool

    @classmethod
    def of(cls, plan: Sequence[SharedPrefix], kv_lengths: Sequence[int], *, block_size: int) -> CascadeShape:
        """Return the exact sizes for a plan. kv_lengths: tokens of each sequence, the new one included."""
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
    """The tensors of a decode step's cascade, all views of one int32 tensor, so that one copy fills them.

    shared_table: [groups, shared_blocks] and shared_lengths: [groups], tokens. own_table: [sequences, own_blocks] and
    own_past: [sequences], tokens before the new one, both without what is shared. gather: [groups * members] the
    sequences of each group, padded with the first; None if is_whole. positions: [sequences] where each one lies in
    there, -1 if in no group. side: a stream on which one of the two passes runs beside the other.
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
        shared, self.shared_lengths, own, self.own_past, self.positions, gather = self._flat.split(sizes)
        self.shared_table = shared.view(shape.groups, shape.shared_blocks)
        self.own_table = own.view(n, shape.own_blocks)
        self.gather = None if shape.is_whole else gather

    def fill(self, plan: Sequence[SharedPrefix], tables: Sequence[Sequence[int]], kv_lengths: Sequence[int]) -> None:
        """Write a plan. Sequences that are padding write and read the scratch block; groups that are, nothing."""
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
        own_past = [0] * shape.sequences
        for row, (table, length) in enumerate(zip(tables, kv_lengths, strict=True)):
            mine = table[skipped[row] : skipped[row] + shape.own_blocks]
            own += [*mine, *[scratch] * (shape.own_blocks - len(mine))]
            own_past[row] = length - 1 - skipped[row] * size
        own += [scratch] * (shape.sequences * shape.own_blocks - len(own))
        values = [*shared, *lengths, *own, *own_past, *positions, *gather]
        self._flat.copy_(torch.tensor(values, dtype=torch.int32))
