"""Generation: the options of a call, what a runner returns, and the state of each prompt in between."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.attention import SequenceStep
from tierkv.engine.sampling import Sampler, SamplingOptions
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier
from tierkv.values.checks import check_count

__all__ = ["Generation", "GenerationOptions", "Request", "TokenEvent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Options of one call of `Runner.generate` or `Runner.stream`, for all of its prompts.

    max_new_tokens: tokens that each prompt gets at most, from 1 on.
    sampling: how tokens are chosen; greedy by default.
    stop_ids: token ids that end a sequence and are its last token; None takes the model's end-of-sequence ids.
    use_cache: False neither finds blocks nor keeps any.
    store_partial: also store the partly filled last block of each finished sequence.
    keep_logits: keep the float32 logits of every new token, on the CPU.
    Raises ConfigError for a max_new_tokens that is not a positive integer.

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
    """One new token. prompt: the index of its prompt in the call."""

    prompt: int
    token_id: int
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The result for one prompt.

    token_ids: the new tokens. cached_tokens: tokens of the prompt found in each tier.
    ttft_s: seconds from the call to the first token. tokens_per_s: of the tokens after the first one.
    logits: [new tokens, vocabulary] float32 on the CPU, with `keep_logits`.
    """

    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: dict[Tier, int]
    ttft_s: float
    tokens_per_s: float
    logits: Tensor | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One prompt inside a runner: waiting without a sequence, running with one.

    num_computed: leading tokens with K and V. num_verified: those of them after whose pass the model was seen
    unchanged. claimed_end: while cold blocks load, the runner computes the tokens before it. had_company: other
    requests took part in its passes since it was admitted. Times are in seconds of `time.perf_counter`.
    """

    number: int
    token_ids: list[int]
    prompt_tokens: int
    sampler: Sampler
    stop_ids: frozenset[int]
    started: float
    max_new_tokens: int
    sequence: Sequence | None = None
    num_computed: int = 0
    num_verified: int = 0
    claimed_end: int = 0
    cached_tokens: dict[Tier, int] | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    admitted_at: float = 0.0
    had_company: bool = False
    logits: list[Tensor] = field(default_factory=list)
    _common: dict[int, int] = field(default_factory=dict)  # by another request's number

    def common_tokens(self, other: Request) -> int:
        """Return how many leading tokens the prompts share, without the last token of this prompt."""
        if other.number not in self._common:
            count = min(self.prompt_tokens - 1, other.prompt_tokens)
            own, others = (np.array(each.token_ids[:count], dtype=np.uint32) for each in (self, other))
            differs = np.flatnonzero(own != others)
            self._common[other.number] = int(differs[0]) if len(differs) else count
        return self._common[other.number]

    @property
    def new_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.prompt_tokens :]

    def step(self, count: int) -> SequenceStep:
        """Return the next `count` tokens as a part of a forward pass."""
        assert self.sequence is not None
        return SequenceStep(
            block_table=self.sequence.block_table, num_past=self.num_computed, num_new=count, loads=self.sequence
        )

    def result(self) -> Generation:
        """Return the result of a finished request."""
        assert self.first_token_at is not None
        decoding_s = self.last_token_at - self.first_token_at
        return Generation(
            token_ids=self.new_ids,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or {},
            ttft_s=self.first_token_at - self.started,
            tokens_per_s=(len(self.new_ids) - 1) / decoding_s if decoding_s > 0 else 0.0,
            logits=torch.stack(self.logits) if self.logits else None,
        )
