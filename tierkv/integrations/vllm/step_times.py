"""How long the engine takes for a step, and what a load adds to one: for the choice between loading and computing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.block_store.load_or_compute import LoadOrCompute, Origin

__all__ = ["StepTimes", "SyncLoad"]

_LEAST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SyncLoad:
    """A load that the forward pass of its step waits for. read_s: how long its cold blocks took before the step."""

    num_blocks: int
    origin: Origin
    read_s: float


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    started: float
    num_tokens: int
    loads: Sequence[SyncLoad]
    is_pure: bool


class StepTimes:
    """Measures steps from their order to their output. Steps may overlap: a step begins when the one before it ends.

    A load overlaps with the pass that waits for it, layer by layer. So it costs what its step takes longer than the
    same tokens took without a load.
    """

    def __init__(self, costs: LoadOrCompute, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._costs = costs
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._ended = 0.0

    def start(self, number: int, num_tokens: int, *, loads: Sequence[SyncLoad] = (), is_pure: bool = True) -> None:
        """Begin a step. loads: those that its forward pass waits for. is_pure: nothing else is loaded either."""
        self._steps.append(_Step(number, self._clock(), num_tokens, loads, is_pure))

    def end(self, number: int) -> None:
        """End a step. Steps before it whose end was not seen are forgotten."""
        while self._steps and self._steps[0].number <= number:
            step = self._steps.popleft()
            now = self._clock()
            if step.number == number:
                self._record(step, now - max(step.started, self._ended))
            self._ended = now

    def _record(self, step: _Step, seconds: float) -> None:
        if step.is_pure and not step.loads and step.num_tokens >= _LEAST_TOKENS:
            self._costs.record_compute(step.num_tokens, seconds)
        elif len(step.loads) == 1:
            computing_s = self._costs.compute_s(step.num_tokens)
            if computing_s is not None:
                (load,) = step.loads
                added_s = load.read_s + max(0.0, seconds - computing_s)
                self._costs.record_load(load.num_blocks, origin=load.origin, seconds=added_s)
