"""One running sequence's claim on the hot pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tierkv.movers.mover import Ready
from tierkv.transfer.costs import ColdLoad
from tierkv.transfer.single_flight import Claim
from tierkv.transfer.split_load import SplitLoad
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and the blocks that hold their K and V; made by `TierCache.acquire`, ended by `release`.

    block_table: block ids in order, enough for every token so far.
    num_cached_tokens: leading tokens whose K and V were found; the engine computes the rest.
    cached_tokens: the same, by the tier that answered.
    split: cold blocks that come up while the engine computes those in front of them, until `TierCache.join`.
    cold_load: how the time of its first result counts, see `TierCache.note_loaded`.
    claim: the promise, made to other processes, to compute the rest.

    >>> sequence = cache.acquire(token_ids)
    >>> sequence.num_tokens, sequence.num_cached_tokens, len(sequence.block_table)
    (9, 8, 3)
    >>> cache.release(sequence)
    """

    token_bytes: bytearray
    block_table: list[int]
    num_cached_tokens: int
    cached_tokens: dict[Tier, int]
    chain: list[BlockHash]
    loads: list[Ready] = field(default_factory=list)
    split: SplitLoad | None = None
    cold_load: ColdLoad | None = None
    claim: Claim | None = None
    is_cacheable: bool = True
    is_released: bool = False

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
