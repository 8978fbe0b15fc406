"""SparseDecoding: which passes of a runner decode sparsely, and what of their tokens the cache may keep: nothing.

K and V of a layer come from the attention of the layers before it. What sparse attention has computed depends on the
budget, on where decoding began and on what each query chose, so no hash of tokens could name it. Therefore it is not
kept under any namespace: a sequence is marked at its first sparsely computed token, and `commit` ends there. When
the answer comes back as a part of a prompt, it is computed exactly, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tierkv.engine.backends.protocol import Planner
from tierkv.engine.sparse.attention import SparseAttention
from tierkv.engine.sparse.bounds import BoundedSequence, KeyBounds, Pool
from tierkv.engine.sparse.options import PageCounts, SparseDecode

__all__ = ["MarkedSequence", "SparseDecoding", "SparseStep"]


class MarkedSequence(BoundedSequence, Protocol):
    """A running sequence that forgets what is not exact."""

    def mark_inexact(self, num_exact: int) -> None: ...


class SparseStep(Protocol):
    """One sequence's part of a forward pass. sequence: None if the caller commits nothing.

    is_decoding: its new token was chosen by the model, so it may be computed sparsely; a prompt's may not.
    """

    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def num_past(self) -> int: ...
    @property
    def num_new(self) -> int: ...
    @property
    def is_decoding(self) -> bool: ...
    @property
    def sequence(self) -> MarkedSequence | None: ...


class SparseDecoding:
    """Sparse decode of one runner. attention: plans the sequences with one new token of a sparse pass.

    num_tokens: tokens computed by sparse attention so far, none of which was kept.
    Raises ConfigError for pages that do not divide the pool's blocks, CapacityError without memory for key bounds.
    """

    def __init__(self, options: SparseDecode, pool: Pool, *, dense: Planner) -> None:
        self.options: SparseDecode = options
        self.num_tokens: int = 0
        self._counts: PageCounts = options.counts(pool.layout.block_size)
        self._bounds = KeyBounds(pool, self._counts)
        self.attention: SparseAttention = SparseAttention(self._counts, self._bounds, dense)

    def begin(self, steps: Sequence[SparseStep]) -> bool:
        """Return whether a pass decodes sparsely. If it does, mark its sequences and compute what it needs.

        Sequences that are short enough stay exact in a sparse pass. A pass is not sparse if it computes one single
        token of a long prompt: for the kernels that sequence is like a decoding one, and prompts are exact.
        """
        single = [step for step in steps if step.num_new == 1]
        sparse = [step for step in single if not self._counts.is_exact(step.num_past + 1)]
        if not sparse or not all(step.is_decoding for step in sparse):
            return False
        known = [(step.sequence, step) for step in sparse if step.sequence is not None]
        if len(known) < len(sparse):
            return False
        for sequence, step in known:  # before anything is launched, so whatever fails then, nothing of it is kept
            sequence.mark_inexact(step.num_past)
        self._bounds.update(known)
        self.num_tokens += len(sparse)
        return True
