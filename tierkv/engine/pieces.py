"""Plans exact attention in pieces under a budget of bytes.

A piece is a run of queries of one sequence and a run of its keys. `attention_pieces` merges the pieces of a run of
queries by log-sum-exp, so the result is exact. Source: the loop of flash attention (Dao et al., 2022), one level up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tierkv.errors import CapacityError

__all__ = ["AttentionShape", "Piece", "PieceSizes", "iter_pieces", "plan_pieces"]

_SMALLEST = 16  # tokens; a smaller piece costs little more than its launch
_ENOUGH_KEYS = 512  # tokens; above it, more queries per piece help more than more keys


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One call: queries [batch, query_tokens, heads, dim] at the end of key_tokens tokens, causal."""

    batch: int
    query_tokens: int
    key_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def key_bytes(self) -> int:
        """Bytes of K and V of one token."""
        return 2 * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of all K and V."""
        return self.batch * self.key_tokens * self.key_bytes

    @property
    def query_bytes(self) -> int:
        """Working memory of one query token: its sum in float32, a piece's output, both log-sum-exps."""
        return self.heads * (4 * self.head_dim + self.item_bytes * self.head_dim + 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceSizes:
    """The largest tokens of a piece. is_whole: one piece for the whole batch. buffers: copies of K and V at a time."""

    query_tokens: int
    key_tokens: int
    buffers: int
    is_whole: bool
    work_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Queries [first_query, last_query) of one sequence of the batch against its keys [first_key, last_key)."""

    item: int
    first_query: int
    last_query: int
    first_key: int
    last_key: int
    is_first: bool
    is_last: bool


def plan_pieces(shape: AttentionShape, *, budget_bytes: int | None, is_streamed: bool) -> PieceSizes:
    """Return the sizes of pieces.

    budget_bytes: for K and V of one piece and working memory; queries and the result do not count.
    is_streamed: K and V come through two buffers; a copy fills one while attention reads the other.
    Every run of queries reads the keys again, so queries get the budget that is left after enough keys.
    Raises CapacityError, with the smallest sufficient budget, if the smallest piece does not fit.
    """
    lse_bytes = 4 * shape.batch * shape.query_tokens * shape.heads
    whole = shape.kv_bytes + lse_bytes
    if budget_bytes is None or whole <= budget_bytes:
        return PieceSizes(
            query_tokens=shape.query_tokens,
            key_tokens=shape.key_tokens,
            buffers=1,
            is_whole=True,
            work_bytes=whole if is_streamed else lse_bytes,
        )
    buffers = 2 if is_streamed else 1
    per_key, per_query = buffers * shape.key_bytes, shape.query_bytes
    least_keys, least_queries = min(_SMALLEST, shape.key_tokens), min(_SMALLEST, shape.query_tokens)
    least = least_keys * per_key + least_queries * per_query
    if budget_bytes < least:
        raise CapacityError(
            f"a memory budget of {budget_bytes} bytes does not hold the smallest piece of this attention",
            hint=f"at least {least} bytes are needed, {whole} for all at once",
        )
    # Keys get a quarter, at most enough; queries take what they need of the rest; keys get the remainder.
    keys = max(least_keys, min(_ENOUGH_KEYS, shape.key_tokens, budget_bytes // 4 // per_key))
    queries = max(least_queries, min(shape.query_tokens, (budget_bytes - keys * per_key) // per_query))
    queries = _aligned(queries, shape.query_tokens)
    keys = _aligned(min(shape.key_tokens, (budget_bytes - queries * per_query) // per_key), shape.key_tokens)
    work = queries * per_query + (keys * per_key if is_streamed else 0)
    return PieceSizes(query_tokens=queries, key_tokens=keys, buffers=buffers, is_whole=False, work_bytes=work)


def iter_pieces(shape: AttentionShape, sizes: PieceSizes) -> Iterator[Piece]:
    """Yield the pieces of all sequences in order, without keys that no query of a piece may see."""
    past = shape.key_tokens - shape.query_tokens
    for item in range(shape.batch):
        for first_query in range(0, shape.query_tokens, sizes.query_tokens):
            last_query = min(first_query + sizes.query_tokens, shape.query_tokens)
            visible = past + last_query
            for first_key in range(0, visible, sizes.key_tokens):
                last_key = min(first_key + sizes.key_tokens, visible)
                yield Piece(
                    item=item,
                    first_query=first_query,
                    last_query=last_query,
                    first_key=first_key,
                    last_key=last_key,
                    is_first=first_key == 0,
                    is_last=last_key == visible,
                )


def _aligned(tokens: int, all_tokens: int) -> int:
    """Round down to a multiple that kernels run fast with, except for all tokens."""
    if tokens >= all_tokens:
        return all_tokens
    step = 128 if tokens >= 128 else _SMALLEST
    return max(min(_SMALLEST, all_tokens), tokens // step * step)
