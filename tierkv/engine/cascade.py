"""Plans which sequences of a decode batch read a shared prefix together, from their block tables and measured speeds.

Attention of several sequences to a shared prefix is one matrix product with all their queries, so its bytes are read
once instead of once per sequence. It costs more launches, and more arithmetic if the queries do not fill a tile. So a
prefix is shared if the saved time is more than that. `attention_cascade` runs the plan.
Source: the cascade attention of FlashInfer; Hydragen (Juravsky et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierkv.errors import ConfigError

__all__ = ["CascadeCost", "SharedPrefix", "plan_cascade"]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Sequences (rows of the batch, ascending) whose block tables begin with the same `num_blocks` block ids."""

    rows: tuple[int, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeCost:
    """The cost of decode attention in one layer, plain and shared, in seconds.

    token_bytes: K and V of one token in one layer. bytes_per_s: how fast the plain path reads them. flops_per_s: of the
    shared pass, a multiplication and an addition counted as two, with queries padded to tiles of `tile_rows`. The
    shared pass also reads its bytes `shared_reads` times. overhead_s: the additional launches of a cascade, and the
    merge.
    """

    heads: int
    kv_heads: int
    head_dim: int
    token_bytes: int
    bytes_per_s: float
    flops_per_s: float
    overhead_s: float
    tile_rows: int = 64
    shared_reads: int = 1

    def __post_init__(self) -> None:
        if (
            min(self.kv_heads, self.head_dim, self.token_bytes, self.tile_rows, self.shared_reads) <= 0
            or self.heads % self.kv_heads
        ):
            raise ConfigError(f"a layer's heads and sizes must be positive and fit each other, got {self}")
        if min(self.bytes_per_s, self.flops_per_s) <= 0 or self.overhead_s < 0:
            raise ConfigError(f"speeds must be positive, got {self}")

    @classmethod
    def of_gpu(cls, *, heads: int, kv_heads: int, head_dim: int, token_bytes: int) -> CascadeCost:
        """Return the cost on an H200 with flash-attn 2.8.3, as measured by benchmarks/cascade.py.

        With Llama-3.1-8B's shape and 200 own tokens, the plain path reads 4.7 TB/s of a long prefix (much of it from
        the L2 cache) and the shared pass computes 280 TFLOP/s. 16 sequences that share 1,024 tokens gain 2 microseconds
        per layer, 8 gain nothing. A slower GPU has lower speeds and the same launch cost, so a cascade pays there too.
        """
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            token_bytes=token_bytes,
            bytes_per_s=4.7e12,
            flops_per_s=2.8e14,
            overhead_s=12e-6,
        )

    @classmethod
    def of_cpu(cls, *, heads: int, kv_heads: int, head_dim: int, token_bytes: int) -> CascadeCost:
        """Return the cost on two CPU cores with torch's own kernel.

        It pads nothing, but first gathers the shared blocks: read, written, read again. Measured in float32: 8
        sequences with 2,048 shared tokens are 3.8 times as fast as the plain path, 2 with 1,024 tokens 0.8 times.
        """
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            token_bytes=token_bytes,
            bytes_per_s=1e10,
            flops_per_s=4e10,
            overhead_s=150e-6,
            tile_rows=1,
            shared_reads=3,
        )

    def plain_s(self, rows: int, tokens: int) -> float:
        """Return the time in which `rows` sequences each read `tokens` tokens."""
        return rows * tokens * self.token_bytes / self.bytes_per_s

    def shared_s(self, rows: int, tokens: int) -> float:
        """Return the time in which `rows` sequences read `tokens` shared tokens together."""
        compute = 4 * self.padded_queries(rows) * self.head_dim * tokens / self.flops_per_s
        return max(compute, self.shared_reads * tokens * self.token_bytes / self.bytes_per_s)

    def saving_s(self, rows: int, tokens: int) -> float:
        """Return the time that sharing saves, before the overhead; negative if it costs more."""
        return self.plain_s(rows, tokens) - self.shared_s(rows, tokens)

    def padded_queries(self, rows: int) -> int:
        """Return how many query vectors are computed: the smaller number of packing a KV head's queries and not."""
        tile, group = self.tile_rows, self.heads // self.kv_heads
        return min(-(-rows // tile) * tile * self.heads, -(-rows * group // tile) * tile * self.kv_heads)


def plan_cascade(
    tables: Sequence[Sequence[int]], num_past: Sequence[int], *, block_size: int, cost: CascadeCost
) -> tuple[SharedPrefix, ...]:
    """Return the groups of sequences that should read a prefix together; empty if the plain path is best.

    tables: the block table of each sequence. num_past: its tokens with K and V; only whole blocks of them are shared,
    so no mask is needed and no sequence writes a shared block. A sequence is in one group at most. The tables form a
    trie: at each branching, the sequences below share the path to it, except for branches that save more by sharing a
    longer path among themselves.
    """
    firsts = [table[0] for table, past in zip(tables, num_past, strict=True) if past >= block_size]
    if len(set(firsts)) == len(firsts):  # most batches share nothing, and this is asked before every pass
        return ()
    heads = [list(table[: past // block_size]) for table, past in zip(tables, num_past, strict=True)]
    saving, groups = _best(list(range(len(heads))), 0, heads, block_size, cost)
    return tuple(sorted(groups, key=lambda group: group.rows)) if saving > cost.overhead_s else ()


def _best(
    rows: list[int], depth: int, tables: list[list[int]], block_size: int, cost: CascadeCost
) -> tuple[float, list[SharedPrefix]]:
    """Return the most time that sequences with `depth` equal leading blocks can save, and the groups for it."""
    rows = [row for row in rows if tables[row]]
    if len(rows) < 2:
        return 0.0, []
    # The common prefix of the smallest and the greatest table is common to all; C compares whole tables fast.
    least, greatest = min(tables[row] for row in rows), max(tables[row] for row in rows)
    end = min(len(least), len(greatest))
    while depth < end and least[depth] == greatest[depth]:
        depth += 1
    branches: dict[int, list[int]] = {}
    for row in rows:
        if len(tables[row]) > depth:
            branches.setdefault(tables[row][depth], []).append(row)
    tokens = depth * block_size
    found = [(_best(branch, depth, tables, block_size, cost), branch) for branch in branches.values()]
    # Branches leave the group in the order of their gain: their own saving less the time of their plain reads.
    found.sort(key=lambda each: each[0][0] - cost.plain_s(len(each[1]), tokens), reverse=True)
    best_s, best = cost.saving_s(len(rows), tokens), [SharedPrefix(tuple(rows), depth)]
    apart_s, apart, left = 0.0, list[SharedPrefix](), set(rows)
    for (branch_s, groups), branch in found:
        apart_s, apart, left = apart_s + branch_s, apart + groups, left.difference(branch)
        together_s = max(0.0, cost.saving_s(len(left), tokens)) if len(left) > 1 else 0.0
        if apart_s + together_s >= best_s:
            together = [SharedPrefix(tuple(sorted(left)), depth)] if together_s else []
            best_s, best = apart_s + together_s, apart + together
    return (best_s, best) if best_s > 0 else (0.0, [])
