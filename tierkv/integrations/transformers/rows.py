"""The rows of a batch as `generate` computes them: padding, tokens, and why some batches are not cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tierkv.block_store.keys import BlockKeys

__all__ = ["Row", "Uncached", "check_request", "fault_of_cache", "rows_of"]

_MODES = frozenset({"greedy_search", "sample", "beam_search", "beam_sample"})
_BEAM_MODES = frozenset({"beam_search", "beam_sample"})
_CACHE_NAMES = ("cache", "past_key_values")
# Arguments of the forward pass that change neither K nor V.
_KNOWN_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "logits_to_keep", "use_cache", "return_dict", *_CACHE_NAMES}
)


class Uncached(Exception):  # noqa: N818 - not an error: the call runs as plain `generate`
    """Why a call of `generate` is not cached."""


@dataclass(slots=True)
class Row:
    """A prompt of the batch. Equal rows, as of beams, are one.

    indices: its rows in the batch. pad: slots before its first token. tokens: [n] int64, its own.
    num_known: leading blocks that the store had when the call began.
    """

    indices: list[int]
    pad: int
    tokens: npt.NDArray[np.int64]
    keys: BlockKeys
    num_known: int = 0


def check_request(model: Any, config: Any, arguments: Mapping[str, Any]) -> str:
    """Return the name of the argument with the cache. Raises Uncached for what cannot be cached.

    config: the GenerationConfig as `generate` completed it. arguments: of the forward pass.
    """
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if mode not in _MODES:
        raise Uncached(f"generation mode {mode}")
    if getattr(config, "is_assistant", False):
        raise Uncached("the model assists another one")
    if mode in _BEAM_MODES and hasattr(model, "_reorder_cache"):
        raise Uncached("the model reorders its cache by a function of its own")
    name = next((name for name in _CACHE_NAMES if arguments.get(name) is not None), None)
    if name is None:
        raise Uncached("generate without a cache")
    for argument, value in arguments.items():
        is_off = value is None or value is False
        if argument in ("output_attentions", "output_hidden_states") and not is_off:
            raise Uncached(f"{argument}: it shows every token of the prompt")
        if argument not in _KNOWN_ARGUMENTS and not is_off:
            raise Uncached(f"the argument {argument}")
    if fault := fault_of_cache(arguments[name]):
        raise Uncached(fault)
    return name


def fault_of_cache(cache: Any) -> str | None:
    """Return why a cache is not the plain, empty one that `generate` makes; None if it is."""
    if type(cache) is not DynamicCache:
        return f"a cache of type {type(cache).__name__}"
    if getattr(cache, "_is_user_defined", False) or cache.get_seq_length():
        return "the caller's own cache"
    if getattr(cache, "offloading", False):
        return "a cache that is offloaded"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"a cache layer of type {type(layer).__name__}"
        if getattr(layer, "record_past", False):
            return "a cache that records its past"
    return None


def rows_of(
    input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> list[tuple[list[int], int, npt.NDArray[np.int64]]]:
    """Return the different rows of a batch: their indices, padding and own tokens.

    input_ids: [rows, slots]; mask: the same, or None for no padding; position_ids: the same, or one row for all.
    Raises Uncached unless each row's own tokens come last and have the positions 0, 1, 2, ...
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise Uncached("the prompt is not a batch of token ids")
    num_rows, num_slots = input_ids.shape
    tokens = input_ids.detach().cpu().numpy().astype(np.int64, copy=True)
    if tokens.min() < 0 or tokens.max() >= 1 << 32:
        raise Uncached("token ids that are no token ids")
    pads = _pads_of(mask, num_rows, num_slots)
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != num_slots:
        raise Uncached("positions that are not one number for each token")
    if not has_plain_positions(position_ids.detach().cpu().numpy(), pads):
        raise Uncached("positions that do not count from 0")
    found: dict[tuple[int, bytes], list[int]] = {}
    for row in range(num_rows):
        found.setdefault((pads[row], tokens[row, pads[row] :].tobytes()), []).append(row)
    return [(indices, pad, tokens[indices[0], pad:]) for (pad, _), indices in found.items()]


def has_plain_positions(positions: npt.NDArray[Any], pads: list[int]) -> bool:
    """Return whether each row's own slots are numbered 0, 1, 2, ... positions: [rows or 1, slots]."""
    want = np.arange(positions.shape[1])[None] - np.asarray(pads)[:, None]
    return positions.shape[0] in (1, len(pads)) and bool(((positions == want) | (want < 0)).all())


def _pads_of(mask: Tensor | None, num_rows: int, num_slots: int) -> list[int]:
    """Return the slots of padding on the left of each row. Raises Uncached for padding elsewhere."""
    if mask is None:
        return [0] * num_rows
    if tuple(mask.shape) != (num_rows, num_slots):
        raise Uncached("an attention mask of another shape than the prompt")
    numbers = mask.detach().cpu().numpy()
    if not np.isin(numbers, (0, 1)).all():
        raise Uncached("an attention mask with other numbers than 0 and 1")
    steps = np.diff(numbers.astype(np.int8), axis=1)
    if (steps < 0).any() or not numbers[:, -1].all():
        raise Uncached("an attention mask with gaps, or padding on the right")
    return [int(pad) for pad in num_slots - numbers.astype(np.int64).sum(axis=1)]
