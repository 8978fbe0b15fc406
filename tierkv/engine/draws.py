"""Draws tokens from rows of logits in plain torch, one row at a time; `kernels.sampling` does the same on a GPU.

Each row is computed alone, so no sum of it depends on the other rows of the batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["COLUMNS", "choose_tokens", "most_likely"]

COLUMNS = 6
"""Of a row's settings, as `kernels.sampling.COLUMNS` has them."""


def choose_tokens(logits: Tensor, settings: npt.NDArray[np.int32]) -> Tensor:
    """Return [2, rows] int32: what `kernels.sampling.choose_tokens` writes, from settings on the CPU."""
    tokens, logprobs = [], []
    temperatures, top_ps = (settings[:, column].view(np.float32) for column in (0, 2))
    tokens = logits.argmax(-1).tolist()  # of equal logits torch returns the first
    for row, temperature in enumerate(temperatures.tolist()):
        if temperature:
            _, top_k, _, low, high, _ = settings[row].tolist()
            noise = _exponential(logits.shape[-1], low, high, logits.device)
            tokens[row] = _draw(_wide(logits[row]), temperature, top_k, float(top_ps[row]), noise)
    for row, (token, is_wanted) in enumerate(zip(tokens, settings[:, 5], strict=True)):
        scores = _wide(logits[row]) if is_wanted else None
        logprobs.append(float(scores[token] - scores.logsumexp(-1)) if scores is not None else 0.0)
    chosen = torch.tensor(tokens, dtype=torch.int32)
    return torch.stack([chosen, torch.tensor(logprobs, dtype=torch.float32).view(torch.int32)])


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ids [rows, count] of the most likely tokens of each row, and their log-probabilities in float32.

    Of equally likely tokens the one with the lowest id comes first, which torch's `topk` does not promise.
    """
    scores = _wide(logits)
    if scores.dtype == torch.float64:
        ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    else:
        bits = (scores + 0.0).view(torch.int32).long()  # minus zero becomes zero
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        backward = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
        ids = scores.shape[-1] - 1 - ((ordered << 32) | backward).topk(count, dim=-1).values.bitwise_and(0xFFFFFFFF)
    return ids, (scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)).float()


def _draw(scores: Tensor, temperature: float, top_k: int, top_p: float, noise: Tensor) -> int:
    """Return the token of one row, scores [vocabulary] in float32 or float64."""
    scores = (scores - scores.max()) / temperature  # however small the temperature
    if top_k:
        least = scores.topk(min(top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered = scores.sort(descending=True).values
        weights = ordered.exp()
        before = weights.cumsum(-1) - weights  # keeps the token that crosses the limit
        kept = int((before < top_p * weights.sum()).sum())
        scores = scores.masked_fill(scores < ordered[kept - 1], -torch.inf)
    return int((scores - noise.log()).argmax())


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _exponential(count: int, low: int, high: int, device: torch.device) -> Tensor:
    """Return exponentially distributed numbers [count] in float32: a hash of 0 to count - 1 and a key's two words.

    `kernels.sampling._exponential` has the reasons. In int32, whose products wrap around.
    """
    bits = _mixed(torch.arange(count, dtype=torch.int32, device=device) ^ low)
    bits = _mixed(bits + high)
    unsigned = torch.where(bits < 0, bits.long() + (1 << 32), bits.long()).float()
    uniform = (unsigned * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1 / 3 + uniform * 0.25)))
    return torch.where(uniform < 2.0**-6, series, -(1.0 - uniform).log())


def _mixed(bits: Tensor) -> Tensor:
    """Return a bijective hash of int32 numbers, by Chris Wellons' lowbias32."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x21F0AAAD
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0xD35A2D97 - (1 << 32))
    return bits ^ ((bits >> 15) & 0x1FFFF)
