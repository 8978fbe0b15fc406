"""Generation: the options of a call, what a runner returns, and the state of each prompt in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from tierkv.engine.attention import SequenceStep
from tierkv.engine.sampling import Choice, Sampler, SamplingOptions
from tierkv.scheduling.request import Request
from tierkv.values.block import Tier
from tierkv.values.checks import check_count

__all__ = ["Generation", "GenerationOptions", "ModelRequest", "Reader", "TokenEvent", "Wake"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Options of one call of `Runner.generate`, `Runner.stream` or `Engine.submit`, for all of its prompts.

    max_new_tokens: tokens that each prompt gets at most, from 1 on.
    sampling: how tokens are chosen; greedy by default.
    stop_ids: token ids that end a sequence and are its last token; None takes the model's end-of-sequence ids.
    use_cache: False neither finds blocks nor keeps any.
    store_partial: also store the partly filled last block of each finished sequence, so that the next turn of a
    conversation finds all that was computed; docs/benchmarks.md has the cost. False stores whole blocks only.
    keep_logits: keep the float32 logits of every new token, on the CPU.
    Raises ConfigError for a max_new_tokens that is not a positive integer.

    >>> GenerationOptions(max_new_tokens=8, sampling=SamplingOptions(temperature=0.7, seed=1)).max_new_tokens
    8
    """

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_ids: frozenset[int] | None = None
    use_cache: bool = True
    store_partial: bool = True
    keep_logits: bool = False

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, least=1)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token. prompt: the index of its prompt in the call.

    logprob, top_logprobs: as `SamplingOptions.top_logprobs` asks; (token id, log-probability) of the most likely.
    finish_reason: of the last token "stop" (it is a stop token) or "length"; None of the others.
    """

    prompt: int
    token_id: int
    is_last: bool
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The result for one prompt.

    token_ids: the new tokens. cached_tokens: tokens of the prompt found in each tier, and in running requests.
    ttft_s: seconds from the call to the first token; to the end if there was none. tokens_per_s: of the tokens after
    the first one. logits: [new tokens, vocabulary] float32 on the CPU, with `keep_logits`.
    finish_reason: "stop", "length", "cancelled", "deadline" or "shutdown".
    logprobs, top_logprobs: of each new token, with `SamplingOptions.top_logprobs`.
    """

    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: dict[Tier, int]
    ttft_s: float
    tokens_per_s: float
    logits: Tensor | None = None
    finish_reason: str = "length"
    logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None


Wake: TypeAlias = "Callable[..., object]"
"""An event loop's `call_soon_threadsafe`: it calls a function in the loop's thread."""


class Reader(Protocol):
    """Gets a request's tokens and its end. Its methods must not block; what they raise ends that request alone.

    wants_events: whether it wants each token, or the end only. put: reason: why the request ends with this token; None
    if it goes on. put, end: return None, or an event loop's wake and what
    to call there.
    """

    @property
    def wants_events(self) -> bool: ...
    def put(
        self, request: ModelRequest, choice: Choice, reason: str | None
    ) -> tuple[Wake, Callable[[], None]] | None: ...
    def end(self, request: ModelRequest) -> tuple[Wake, Callable[[], None]] | None: ...


@dataclass(slots=True, eq=False, kw_only=True)
class ModelRequest(Request):
    """A request with what its forward passes and its caller need.

    number: index of the prompt in its call. step: its part of the next pass; changed in place. Times are in seconds of
    `time.perf_counter`. finish_reason: None until it ends; error: why it failed.
    owner: the engine that ends it, if it is one's.
    """

    number: int
    sampler: Sampler
    stop_ids: frozenset[int]
    started: float
    keep_logits: bool = False
    reader: Reader | None = None
    owner: object = None
    step: SequenceStep = field(default_factory=lambda: SequenceStep(block_table=[], num_past=0, num_new=0))
    first_token_at: float | None = None
    last_token_at: float = 0.0
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None

    def result(self) -> Generation:
        """Return the result of a request that has ended. Raises the error with which it failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None
        first_at = self.last_token_at if self.first_token_at is None else self.first_token_at
        decoding_s = self.last_token_at - first_at
        return Generation(
            token_ids=self.new_ids,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or {},
            ttft_s=first_at - self.started,
            tokens_per_s=(self.num_new - 1) / decoding_s if decoding_s > 0 else 0.0,
            logits=torch.stack(self.logits) if self.logits else None,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs or None,
            top_logprobs=self.top_logprobs or None,
        )
