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


_ROUTER_ROUNDING = 0.1  # of router logits, seen in bfloat16: up to 0.1


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
        Tokens whose experts a rounding may change are left out there.
        """
        got = got.double().cpu()
        want = plain_logits(model, token_ids)[first:]
        assert got.shape == want.shape
        if self.dtype == torch.float32:
            assert float((got - want).abs().max()) <= 1e-4
            return
        exact_model = copy.deepcopy(model).float()
        exact = plain_logits(exact_model, token_ids)[first:]
        is_clear = _are_experts_clear(exact_model, token_ids)[first:]
        if not is_clear.any():
            return
        error, plain = _error(got[is_clear], exact[is_clear]), _error(want[is_clear], exact[is_clear])
        assert error <= 2 * plain + 0.02, f"relative error {error:.3f}, the plain model's is {plain:.3f}"


def _are_experts_clear(model: Any, token_ids: list[int]) -> Tensor:
    """Return for each token whether every layer's router prefers its experts by more than bfloat16 rounds: [tokens]."""
    is_clear = torch.ones(len(token_ids), dtype=torch.bool)
    if not getattr(model.config, "num_experts_per_tok", None):
        return is_clear
    count = model.config.num_experts_per_tok
    with torch.no_grad():
        out = model(torch.tensor([token_ids], device=model.device), output_router_logits=True)
    for logits in out.router_logits:
        best = logits.cpu().sort(descending=True).values
        is_clear &= best[:, count - 1] - best[:, count] > _ROUTER_ROUNDING
    return is_clear
