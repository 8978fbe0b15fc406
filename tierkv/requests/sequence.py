"""Sequence: one running request's tokens and blocks; and its overlap of loading and recomputing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tierkv.movers.mover import Ready
from tierkv.transfer.overlapped_load import OverlappedLoad
from tierkv.transfer.recompute_or_load import ColdLoad
from tierkv.transfer.single_flight import Claim
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["Overlap", "Sequence", "SequenceOwner"]


class SequenceOwner(Protocol):
    """What a sequence needs of its cache. Each method raises ClosedError once the cache is closed."""

    def release(self, sequence: Sequence) -> None: ...
    def next_piece(self, sequence: Sequence, *, wait: bool) -> range: ...
    def record(self, sequence: Sequence, seconds: float, *, num_tokens: int | None) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and the blocks that hold their K and V; made by `TierCache.acquire`, ended by `release`.

    As a context manager it releases itself:

        with cache.acquire(token_ids) as sequence: ...

    block_table: block ids in order, enough for every token so far.
    num_cached_tokens: leading tokens whose K and V were found; the engine computes the rest.
    cached_tokens: the same, by the tier that answered.
    overlapped_load: cold blocks that load while the engine computes those in front of them; see `overlap`.
    cold_load: how `Overlap.record` counts the time of the first token.
    piece_end: tokens that `Overlap.next_piece` has given out, or that needed no computing.
    claim: the promise, made to other processes, to compute the rest.
    """

    owner: SequenceOwner
    token_bytes: bytearray
    block_table: list[int]
    num_cached_tokens: int
    cached_tokens: dict[Tier, int]
    chain: list[BlockHash]
    piece_end: int
    loads: list[Ready] = field(default_factory=list)
    overlapped_load: OverlappedLoad | None = None
    cold_load: ColdLoad | None = None
    claim: Claim | None = None
    is_cacheable: bool = True
    is_released: bool = False

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.owner.release(self)

    @property
    def overlap(self) -> Overlap:
        """What to compute next while cold blocks load, and where to record what that took."""
        return Overlap(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, computed or not."""
        return len(self.token_bytes) // TOKEN_BYTES

    @property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        """A copy of the token ids."""
        return np.frombuffer(bytes(self.token_bytes), dtype="<u4")

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait until the cached K and V of a layer have arrived.

        Copies that are done are forgotten, or every decode step would wait for them again, layer by layer.
        """
        if self.loads:
            self.loads = [ready for ready in self.loads if not ready.is_done()]
        for ready in self.loads:
            ready.wait(layer)

    def wait_all(self) -> None:
        """Make the current stream wait until everything cached has arrived."""
        for ready in self.loads:
            ready.wait()
        self.loads.clear()


class Overlap:
    """The overlap of loading and recomputing in one sequence: what the engine computes next, and what that took.

    `acquire(..., overlap=True)` lets the cold blocks at the end of the prefix load while the engine computes the first
    ones, piece by piece. An engine computes whatever this says, and commits it before it asks again:

        while piece := sequence.overlap.next_piece():
            compute(sequence, piece.start, piece.stop)
            cache.commit(sequence, piece.stop)
    """

    __slots__ = ("_sequence",)

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence

    @property
    def is_loading(self) -> bool:
        """Whether cold blocks of the sequence still load: `next_piece` then gives a part of what is left."""
        return self._sequence.overlapped_load is not None

    def next_piece(self, *, wait: bool = True) -> range:
        """Return the positions of the tokens to compute next. Tokens before them have K and V, loaded or computed.

        While cold blocks load, the piece is of a size that lets both sides end together. Once they are loaded, the
        piece is all the rest, and `num_cached_tokens` counts the loaded tokens too. An empty range: nothing is left to
        compute, or, with `wait=False`, the loader has to end first.
        """
        return self._sequence.owner.next_piece(self._sequence, wait=wait)

    def record(self, seconds: float, *, num_tokens: int | None = None) -> None:
        """Record what a step took; later requests load or recompute by that.

        num_tokens: new tokens of a forward pass, from its launch until its result was there. None: the time is from
        `acquire` to the first token, of a sequence that had the engine to itself.
        """
        self._sequence.owner.record(self._sequence, seconds, num_tokens=num_tokens)
