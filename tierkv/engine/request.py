"""Request: one prompt on its way through a runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.attention import SequenceStep
from tierkv.engine.generation import Generation
from tierkv.engine.sampling import Sampler
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier

__all__ = ["Request"]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way: waiting without a sequence, running with one."""

    number: int
    token_ids: list[int]
    prompt_tokens: int
    sampler: Sampler
    stop_ids: frozenset[int]
    started: float
    max_new_tokens: int
    sequence: Sequence | None = None
    num_computed: int = 0
    num_verified: int = 0  # of these: after they were computed, the model was seen to be still the cache's
    claimed_end: int = 0  # while cold blocks load: the tokens before it are this side's to compute
    cached_tokens: dict[Tier, int] | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    admitted_at: float = 0.0
    had_company: bool = False  # since it was admitted: other requests were in its passes
    logits: list[Tensor] = field(default_factory=list)
    _common: dict[int, int] = field(default_factory=dict)  # by another request's number

    def common_tokens(self, other: Request) -> int:
        """Return how many leading tokens the prompts share, of which at least one of this one's is left out."""
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
        """Return what became of a request that is done."""
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
