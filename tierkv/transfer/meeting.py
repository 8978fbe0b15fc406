"""Compute or load: two sides work towards each other over a row of blocks, and nobody has to know who is faster.

The engine computes from the front, since K and V need everything before them; the cache loads from the back, since a
stored block needs nothing. Where they meet all is there: after less time than either would need alone. Rates measured
on the way only say how large a piece the engine takes next, so that both end together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Meeting"]


class Meeting:
    """A row of `num_blocks` blocks between a side that computes, from the front, and one that loads, from the back.

    What the loader has brought is its own; what it has only claimed the engine may still compute. Thread-safe.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._lock = threading.Lock()
        self._num_computed = 0
        self._first_claimed = num_blocks
        self._first_loaded = num_blocks
        self._may_load = True

    @property
    def num_computed(self) -> int:
        """Leading blocks that the engine has claimed."""
        return self._num_computed

    @property
    def first_loaded(self) -> int:
        """The first block of those at the end that the loader has brought."""
        return self._first_loaded

    @property
    def num_loading(self) -> int:
        """Blocks that the loader has claimed and not brought yet; some of them the engine may compute all the same."""
        return self._first_loaded - self._first_claimed

    def claim_load(self) -> int | None:
        """Claim the last block that is nobody's for the loader; None if there is none, or loading has ended."""
        with self._lock:
            if not self._may_load or self._num_computed >= self._first_claimed:
                return None
            self._first_claimed -= 1
            return self._first_claimed

    def bring(self, block: int) -> bool:
        """Note that a claimed block is about to be brought, each after the one behind it. False: it is not wanted."""
        with self._lock:
            if not self._may_load or block < self._num_computed:
                return False
            assert block == self._first_loaded - 1, "blocks are brought from the back"
            self._first_loaded = block
            return True

    def end_loading(self, first_good: int | None = None) -> None:
        """Leave what has not been brought to the engine; nothing more will be loaded.

        first_good: the first block that did arrive, where what was announced to `bring` failed.
        """
        with self._lock:
            self._may_load = False
            self._first_loaded = max(self._first_loaded, first_good or 0)

    def lose_loaded(self) -> None:
        """Note that nothing of what was brought is of use: between it and what was computed is a gap."""
        with self._lock:
            self._may_load = False
            self._first_loaded = self._first_claimed = self.num_blocks

    def claim_compute(self, num_blocks: int) -> int:
        """Claim up to `num_blocks` leading blocks that have not been brought for the engine; return how many."""
        with self._lock:
            count = min(num_blocks, self._first_loaded - self._num_computed)
            self._num_computed += count
            return count

    def next_piece(self, *, compute_s: Callable[[int], float | None], load_s: float | None, most: int) -> int:
        """Claim for the engine what it should compute next, at most `most` blocks; 0: wait for the loader.

        compute_s: seconds that so many blocks take in one pass; load_s: seconds a block. None: not measured yet. The
        engine gets as much as it computes before the loader would be through with the rest.
        """
        left = self._first_loaded - self._num_computed
        if not self._may_load or load_s is None or compute_s(1) is None:
            return self.claim_compute(most)
        for count in range(min(most, left), 0, -1):
            if (compute_s(count) or 0.0) <= (left - count) * load_s:
                return self.claim_compute(count)
        is_faster = left and (compute_s(left) or 0.0) < left * load_s
        return self.claim_compute(most) if is_faster else 0
