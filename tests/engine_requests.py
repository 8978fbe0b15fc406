"""Prompts and options for the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCABULARY

from tierkv.engine.generation import GenerationOptions
from tierkv.engine.sampling import SamplingOptions

__all__ = ["greedy", "sampled", "tokens"]


def tokens(count: int, seed: int = 1) -> list[int]:
    """Return random token ids."""
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(count: int, **options: Any) -> GenerationOptions:
    """Return options for so many tokens, without a stop token."""
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), **options)


def sampled(count: int, seed: int = 3, **options: Any) -> GenerationOptions:
    """Return options for so many tokens that are drawn with a seed."""
    return greedy(count, sampling=SamplingOptions(temperature=1.0, seed=seed), **options)
