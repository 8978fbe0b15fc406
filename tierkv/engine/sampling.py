"""How the next token is chosen from logits, the same whatever else is in the batch."""

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
    """temperature 0 is greedy. top_k 0 and top_p 1 leave every token in.

    seed: the same one gives the same answers again, whatever else is in the batch; None gives others each time. Equal
    prompts of one batch get different answers in both cases.

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
    """Draws one sequence's tokens with a random generator of its own, on the CPU."""

    def __init__(self, options: SamplingOptions, *, number: int = 0) -> None:
        """Begin with the options' seed. number: of equal prompts with one seed, which one this is."""
        self._options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(_seed_of(options.seed, number))

    def fetch(self, logits: Tensor) -> Tensor:
        """Start to bring what `choose` needs of logits [vocabulary] to the CPU: there once the current stream is."""
        needed = logits.argmax() if self._options.temperature == 0 else logits
        return needed.to("cpu", non_blocking=True)

    def choose(self, fetched: Tensor) -> int:
        """Return a token id from what `fetch` returned. Greedy ties go to the lowest id."""
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
            before = ordered.cumsum(-1) - ordered  # the token that crosses the mass stays in
            probabilities = probabilities.clone()
            probabilities[order[before >= options.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of the first of equal prompts as it is, and others for those after it."""
    if not number:
        return int(seed)
    return xxhash.xxh3_64_intdigest(f"{seed}|{number}".encode())
