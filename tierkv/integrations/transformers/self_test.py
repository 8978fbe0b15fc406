"""The self-test of a model for `generate`: K and V of a prefix must be those of every longer prompt, padded or not."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tierkv.engine.model_support import ROUNDING, TOLERANCE, context_of, nudged_embeddings, relative_error
from tierkv.errors import UnsupportedModelError
from tierkv.integrations.transformers.recorder import Recorder
from tierkv.values.layout import BlockLayout

__all__ = ["cache_argument", "check_reuse", "run_model"]

_MAX_TOKENS = 600
_PAD = 3


def cache_argument(model: Any) -> str | None:
    """Return the name of the forward argument that takes a cache: it changed between versions of Transformers."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def run_model(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """Return the logits of one pass over new tokens that fills a cache. ids: [rows, tokens]."""
    logits: Tensor = model(input_ids=ids, use_cache=True, **{str(cache_argument(model)): cache}, **options).logits
    return logits


@torch.no_grad()
def check_reuse(model: Any, layout: BlockLayout) -> bool:
    """Compare K and V of a prefix with those of a longer prompt, and go on from the prefix.

    Return whether K and V of a padded row are those of the row alone, so that padded rows may be cached.
    Raises UnsupportedModelError if K and V depend on later tokens or on the prompt's length. Costs five passes over at
    most 600 tokens.
    """
    length = min(2 * layout.block_size + 3, context_of(model) or _MAX_TOKENS, _MAX_TOKENS)
    split = max(1, length - layout.block_size // 2 - 2)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(model.device)

    want, want_logits = _record(model, ids)
    prefix, _ = _record(model, ids[:, :split])
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.clone(), values.clone(), layer)
    positions = torch.arange(split, length, device=model.device)[None]
    logits = run_model(model, ids[:, split:], cache, position_ids=positions)

    error = max(
        _error(prefix, [(k[:, :, :split], v[:, :, :split]) for k, v in want]),
        relative_error(logits, want_logits[:, split:]),
    )
    tolerance = TOLERANCE.get(layout.dtype, 0.1)
    if error > tolerance:  # a deep model may round so much: then a change of a last bit has the same effect
        with nudged_embeddings(model, layout.dtype):
            nudged, nudged_logits = _record(model, ids)
        tolerance = max(tolerance, ROUNDING * max(_error(nudged, want), relative_error(nudged_logits, want_logits)))
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} fails the self-test: K and V of a prefix differ by {error:.1%} in a longer prompt"
        )
    return length > _PAD and _padded_error(model, ids, want) <= tolerance


def _padded_error(model: Any, ids: Tensor, want: list[tuple[Tensor, Tensor]]) -> float:
    """Return the error of K and V of a row that is padded on the left, beside one that is not."""
    length = ids.shape[1]
    mask = torch.ones(2, length, dtype=torch.int64, device=ids.device)
    mask[1, :_PAD] = 0
    rows = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :_PAD]), ids[:, :-_PAD]], dim=1)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found, _ = _record(model, rows, attention_mask=mask, position_ids=positions)
    padded = [(keys[1:, :, _PAD:], values[1:, :, _PAD:]) for keys, values in found]
    return _error(padded, [(keys[:, :, :-_PAD], values[:, :, :-_PAD]) for keys, values in want])


def _record(model: Any, ids: Tensor, **options: Any) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return K and V of every layer and all slots, [rows, kv_heads, slots, dim] each, and the logits."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    recorder = Recorder(cache, ids.device)
    recorder.attach()
    positions = options.pop("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])
    recorder.add_pass(ids, positions)
    logits = run_model(model, ids, cache, position_ids=positions, **options)
    found = [
        tuple(
            torch.stack(each)
            for each in zip(
                *(recorder.keys_and_values(layer, row, 0, ids.shape[1]) for row in range(len(ids))), strict=True
            )
        )
        for layer in range(len(cache.layers))
    ]
    return [(keys, values) for keys, values in found], logits


def _error(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest relative error of a layer's K or V; infinite if one is not a number."""
    errors = [
        relative_error(a, b) for one, other in zip(got, want, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
