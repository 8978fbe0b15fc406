"""Sampling: chooses the next token from logits, independently of the rest of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
import xxhash
from torch import Tensor

from tierkv.errors import ConfigError

__all__ = ["Sampler", "SamplingOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen.

    temperature: 0 is greedy. top_k: keep the k most likely tokens; 0 keeps all. top_p: keep the most likely tokens up
    to this share of the probability, in (0, 1]; 1 keeps all.
    seed: an integer of 64 bits. The same seed gives the same answers, whatever else is in the batch; None gives new
    ones each time. Equal prompts of one batch get different answers in both cases.
    Raises ConfigError for values out of these ranges.

    >>> SamplingOptions(temperature=0.7, top_p=0.9, seed=1).seed
    1
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if not (name == "seed" and value is None) and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"temperature and top_k must not be negative and top_p must lie in (0, 1]: {self}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be an integer of 64 bits, got {self.seed}")


class Sampler:
    """Draws the tokens of one sequence with its own random generator, on the CPU."""

    def __init__(self, options: SamplingOptions, *, number: int = 0) -> None:
        """Start with the options' seed. number: the index of this prompt among equal prompts of the batch."""
        self._options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(_seed_of(options.seed, number))

    def fetch(self, logits: Tensor) -> Tensor:
        """Start to copy what `choose` needs of logits [vocabulary] to the CPU, on the current stream."""
        needed = logits.argmax() if self._options.temperature == 0 else logits
        return needed.to("cpu", non_blocking=True)

    def choose(self, fetched: Tensor) -> int:
        """Return a token id from the result of `fetch`, after its copy. Greedy ties go to the lowest id."""
        options = self._options
        if options.temperature == 0:
            return int(fetched)
        scores = fetched.double()
        scores = ((scores - scores.max()) / options.temperature).float()  # however small the temperature
        if options.top_k:
            threshold = scores.topk(min(options.top_k, scores.numel())).values[-1]
            scores = scores.masked_fill(scores < threshold, -torch.inf)
        probabilities = scores.softmax(-1)
        if options.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # keeps the token that crosses the limit
            probabilities = probabilities.clone()
            probabilities[order[before >= options.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _seed_of(seed: int, number: int) -> int:
    """Return the seed itself for the first of equal prompts, and derived seeds for the others."""
    if not number:
        return int(seed)
    return xxhash.xxh3_64_intdigest(f"{seed}|{number}".encode())
