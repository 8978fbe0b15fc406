"""Generation: what is asked of a runner, what it tells on the way, and what became of each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tierkv.engine.sampling import SamplingOptions
from tierkv.values.block import Tier
from tierkv.values.checks import check_count

__all__ = ["Generation", "GenerationOptions", "TokenEvent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """stop_ids end a sequence and are its last token; None takes the model's own end-of-sequence tokens.

    use_cache=False neither finds nor keeps anything. keep_logits keeps each step's logits, on the CPU.

    >>> GenerationOptions(max_new_tokens=8, sampling=SamplingOptions(temperature=0.7, seed=1)).max_new_tokens
    8
    """

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_ids: frozenset[int] | None = None
    use_cache: bool = True
    store_partial: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, least=1)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of the prompt with that number."""

    prompt: int
    token_id: int
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What became of one prompt. ttft_s: from the request to its first token. logits: [tokens, vocabulary]."""

    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: dict[Tier, int]
    ttft_s: float
    tokens_per_s: float
    logits: Tensor | None = None
