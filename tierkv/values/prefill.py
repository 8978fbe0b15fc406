"""The cost of computing a block again: seconds of prefill, by its depth in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierkv.errors import ConfigError

__all__ = ["MEASURED_PREFILL", "PrefillModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillModel:
    """Seconds of prefill as a polynomial of the prompt's length.

    Linear layers cost the same for each token. Attention costs in proportion to the tokens before it, so the sum is
    quadratic. token_s: seconds of a token alone. context_s: seconds more for each token before it.
    """

    token_s: float
    context_s: float

    def __post_init__(self) -> None:
        if self.token_s <= 0 or self.context_s < 0:
            raise ConfigError("a token takes time: token_s must be positive and context_s not negative")

    def seconds(self, first: int, count: int) -> float:
        """Return the seconds of `count` tokens after the `first` ones."""
        return count * (self.token_s + self.context_s * (first + (count - 1) / 2))

    @staticmethod
    def fit(lengths: Sequence[int], seconds: Sequence[float]) -> PrefillModel:
        """Return the model with the least relative error for measured prefills of whole prompts.

        Raises ConfigError for fewer than two measurements, and for one without time.
        """
        n = np.asarray(lengths, dtype=np.float64)
        y = np.asarray(seconds, dtype=np.float64)
        if len(n) < 2 or np.any(y <= 0):
            raise ConfigError("a prefill model needs two measurements or more, each of some time")
        terms = np.stack([n, n * (n - 1) / 2], axis=1)
        token_s, context_s = np.linalg.lstsq(terms / y[:, None], np.ones(len(y)), rcond=None)[0]
        if context_s < 0:
            token_s, context_s = float(np.mean(y / n)), 0.0
        return PrefillModel(token_s=float(token_s), context_s=float(context_s))


# `fit` of results/bench_ttft_h200.json: recomputing 1,024, 8,192 and 32,768 tokens of Llama-3.1-8B's shape on an
# H200 took 0.0350, 0.2781 and 1.6643 s. A policy needs only ratios, so it serves other models too.
MEASURED_PREFILL = PrefillModel(token_s=3.18e-5, context_s=1.09e-9)
