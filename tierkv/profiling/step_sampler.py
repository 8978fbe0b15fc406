"""StepSampler: which steps of decoding are recorded, where to record each would cost too much."""

from __future__ import annotations

import random

__all__ = ["StepSampler"]


class StepSampler:
    """Picks one step in `every` on average, at random: a batch whose size divides a fixed gap would show one
    sequence for ever.
    """

    def __init__(self, every: int, *, seed: int = 0) -> None:
        self._every = every
        self._random = random.Random(seed)
        self._steps_left = self._gap()

    def is_due(self) -> bool:
        """Tell whether to record this step. Two threads that meet here may at worst record one more."""
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        self._steps_left = self._gap()
        return True

    def _gap(self) -> int:
        return self._random.randint(1, 2 * self._every - 1)
