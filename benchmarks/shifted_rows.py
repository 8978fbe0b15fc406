"""K and V of a document, moved to another position: the arithmetic that `benchmarks.shifted` measures.

Rope turns each pair of numbers of K by an angle that is proportional to the position. So K at another position is K
turned by the difference; V does not know its position. That is exact up to rounding. What is not exact: K and V of all
layers but the first also depend on the tokens in front, which are others now.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tierkv.engine.model_support import check_supported, relative_error
from tierkv.errors import ShapeError, UnsupportedModelError

__all__ = ["Rows", "check_shiftable", "compute", "most_deviating", "reuse", "rotate_keys", "shift_error"]

_TOLERANCE = 1e-3  # float32: angles of thousands of radians are off by about 1e-4
_TEST_TOKENS = 32
_TEST_SHIFT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """K and V of successive tokens, [layers, sequences, kv_heads, tokens, dim]; K with the model's rope applied."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[3]

    def slice(self, start: int, stop: int) -> Rows:
        """Return the tokens from `start` to before `stop`."""
        return Rows(keys=self.keys[:, :, :, start:stop], values=self.values[:, :, :, start:stop])

    def append(self, other: Rows) -> Rows:
        """Return these tokens and then those of `other`."""
        return Rows(
            keys=torch.cat([self.keys, other.keys], dim=3), values=torch.cat([self.values, other.values], dim=3)
        )

    def shifted(self, model: Any, shift: int) -> Rows:
        """Return the same tokens, `shift` positions later (earlier where negative)."""
        return Rows(keys=rotate_keys(self.keys, _frequencies(model), shift), values=self.values)


def rotate_keys(keys: Tensor, frequencies: Tensor, shift: int) -> Tensor:
    """Return K as if its tokens were `shift` positions later.

    keys: [..., tokens, dim], with rope applied as Transformers' `rotate_half` does: number i of the first half of the
    part with rope is paired with number i of its second half. frequencies: [pairs], radians a position; scaled ropes
    have scaled ones. The first 2 * pairs numbers are turned, the others kept. A factor of the rope's cosines (yarn) is
    in K already, and is not applied again. Angles are float64, the product at least float32.
    Raises ShapeError if K has fewer numbers than the rope. Source: RoFormer (Su et al., 2021).
    """
    pairs = frequencies.numel()
    if keys.shape[-1] < 2 * pairs:
        raise ShapeError(f"keys of dim {keys.shape[-1]} are narrower than a rope of {pairs} pairs")
    wide = keys if keys.dtype == torch.float64 else keys.float()
    angles = frequencies.double() * shift
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.to(keys.dtype)


def compute(
    model: Any, ids: Tensor, past: Rows | None = None, *, start: int | None = None, logits: int = 1
) -> tuple[Rows, Tensor]:
    """Compute the K and V of new tokens behind `past`, which is not changed.

    ids: [sequences, tokens]. start: position of the first of them; None is the number of past tokens. logits: for how
    many of the last tokens; 0 for all. Returns the rows of the new tokens alone, and the logits [sequences, tokens,
    vocabulary].
    """
    count = 0 if past is None else len(past)
    start = count if start is None else start
    pairs = None if past is None else list(zip(past.keys, past.values, strict=True))
    cache = transformers.DynamicCache(pairs)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*past_key_values", category=FutureWarning
        )  # since Transformers 5.24
        out: Tensor = model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=logits
        ).logits
    rows = Rows(
        keys=torch.stack([layer.keys[:, :, count:] for layer in cache.layers]),
        values=torch.stack([layer.values[:, :, count:] for layer in cache.layers]),
    )
    return rows, out


def reuse(
    model: Any, past: Rows, ids: Tensor, cached: Rows, *, position: int, recomputed: int, rotate: bool = True
) -> Rows:
    """Return `past` and behind it a document whose rows were computed elsewhere.

    ids: [1, tokens] of the document; cached: its rows, whose first token was at `position`. Its first `recomputed`
    tokens are computed behind `past`, as EPIC (Hu et al., 2024) does; the rest is rotated to its new place.
    rotate: False leaves K where it was, to show what the rotation is for.
    """
    if recomputed:
        past = past.append(compute(model, ids[:, :recomputed], past)[0])
    rest = cached.slice(recomputed, len(cached))
    return past.append(rest.shifted(model, len(past) - recomputed - position) if rotate else rest)


def most_deviating(rows: Rows, exact: Rows, count: int) -> Rows:
    """Return rows whose `count` most deviating tokens are the exact ones.

    No method that selects tokens and recomputes them gets more: it must guess the tokens, and computes them behind
    others that are not exact. CacheBlend (Yao et al., 2024) selects by the deviation of the first layers.
    """
    deviation = torch.zeros(len(rows), device=rows.keys.device, dtype=torch.float64)
    for got, want in ((rows.keys, exact.keys), (rows.values, exact.values)):
        off = (got - want).double().square().sum(dim=(1, 2, 4))  # [layers, tokens]
        deviation += (off / want.double().square().sum(dim=(1, 2, 4)).mean(dim=1, keepdim=True)).sum(dim=0)
    chosen = deviation.topk(min(count, len(rows))).indices
    keys, values = rows.keys.clone(), rows.values.clone()
    keys[:, :, :, chosen], values[:, :, :, chosen] = exact.keys[:, :, :, chosen], exact.values[:, :, :, chosen]
    return Rows(keys=keys, values=values)


def check_shiftable(model: Any) -> float:
    """Return the relative error of the rotation; raise UnsupportedModelError if K cannot be rotated to a position.

    Refused are models that `check_supported` refuses, and those with windows, sinks, latents or several ropes. The
    others are tried: layers without rope, other pairs of numbers and learned positions are found by their error.
    """
    check_supported(model)
    reasons = _reasons(model)
    if not reasons:
        error = shift_error(model)
        if error <= _TOLERANCE:
            return error
        reasons = [f"K and V that are rotated differ by {error:.1%} from those computed at the other position"]
    raise UnsupportedModelError(f"{type(model).__name__} cannot be moved to other positions: {'; '.join(reasons)}")


def shift_error(model: Any, *, tokens: int = _TEST_TOKENS, shift: int = _TEST_SHIFT) -> float:
    """Return the relative error, of the worst layer's K or V, of moving `tokens` random tokens by `shift` positions."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    got = compute(model, ids)[0].shifted(model, shift)
    want = compute(model, ids, start=shift)[0]
    pairs = [*zip(got.keys, want.keys, strict=True), *zip(got.values, want.values, strict=True)]
    return max(relative_error(one, other) for one, other in pairs)


def _reasons(model: Any) -> list[str]:
    config = model.config.get_text_config(decoder=True)
    reasons: list[str] = []
    if getattr(config, "sliding_window", None) or "sliding_attention" in (getattr(config, "layer_types", None) or []):
        reasons.append("its layers have windows")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        reasons.append("its attention has sinks")
    if getattr(config, "kv_lora_rank", None):
        reasons.append("it has latents (MLA)")
    if not isinstance(getattr(_rotary(model), "inv_freq", None), Tensor):
        reasons.append("it has not one rope for all layers")
    return reasons


def _rotary(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return getattr(decoder if decoder is not None else model, "rotary_emb", None)


def _frequencies(model: Any) -> Tensor:
    frequencies: Tensor = _rotary(model).inv_freq
    return frequencies
