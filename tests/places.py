"""Where whole models are tested: on the CPU in float32, in bfloat16 with flash-attn where there is a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.attention import use_attention

__all__ = ["Place", "plain_logits"]


def plain_logits(model: Any, token_ids: list[int]) -> Tensor:
    """Return [tokens, vocabulary] of one pass of the model as it is, in float64 on the CPU."""
    has_softcap = getattr(model.config, "attn_logit_softcapping", None)  # which sdpa does not know
    with torch.inference_mode(), use_attention(model, "eager" if has_softcap else "sdpa"):
        ids = torch.tensor([token_ids], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.double().cpu()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@dataclass(frozen=True)
class Place:
    """device, dtype and block size of a test, and how far logits may be apart there."""

    device: str
    dtype: torch.dtype
    block_size: int

    def assert_logits(self, got: Tensor, model: Any, token_ids: list[int], *, first: int = 0) -> None:
        """Raise AssertionError unless `got` are the model's logits of the tokens from `first` on.

        float32: 1e-4 of the plain model's, absolute, where logits are about 10. bfloat16 rounds either way: relative to
        the same weights in float32, root mean square, at most twice the plain bfloat16 model's error and 0.02.
        """
        got = got.double().cpu()
        want = plain_logits(model, token_ids)[first:]
        assert got.shape == want.shape
        if self.dtype == torch.float32:
            assert float((got - want).abs().max()) <= 1e-4
            return
        exact = plain_logits(copy.deepcopy(model).float(), token_ids)[first:]
        error, plain = _error(got, exact), _error(want, exact)
        assert error <= 2 * plain + 0.02, f"relative error {error:.3f}, the plain model's is {plain:.3f}"
