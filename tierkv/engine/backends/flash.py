"""The backend flash-attn 2: attention on the strided blocks of the hot pool, on CUDA."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.attention_merge import add_sinks
from tierkv.engine.backends.protocol import AttentionPlan, Batch, LayerShape, PagedQuery

__all__ = ["MAX_SHORT_TOKENS", "MAX_SPLIT_TOKENS", "FlashBackend", "flash_head_dims", "why_not_flash"]

MAX_SPLIT_TOKENS = 64
"""New tokens of each of any number of sequences that `flash_attn_with_kvcache` gets: above it all multiprocessors are
busy even if K and V are not split."""

MAX_SHORT_TOKENS = 512
"""New tokens of all sequences together that it gets too: the other function's call takes longer in Python than these
tokens on the GPU, and it cannot be in a graph."""


class FlashBackend:
    """flash-attn 2: blocks of 256 tokens, 16-bit floats, K and V of equal dims."""

    name = "flash-attn"

    def why_not(self, layer: LayerShape, batch: Batch | None = None) -> str | None:
        """Return why it does not serve a layer, or a batch of it; None if it does."""
        reason = why_not_flash(layer)
        if reason is None and batch is not None and batch.kv_range is not None and not _is_split(batch):
            return "flash_attn_varlen_func cannot be in a CUDA graph"
        return reason

    def prepare(self, layer: LayerShape, *, wait: bool) -> bool:
        """Return True: nothing is compiled."""
        return True

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch: the kernels read its tensors, and plan for themselves."""
        return _FlashPlan(batch)


class _FlashPlan:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def update(self, batch: Batch) -> None:
        """Do nothing: the tensors of a static batch have the new lengths."""

    def run(self, paged: PagedQuery) -> Tensor:
        """Run flash-attn on the strided blocks.

        For few new tokens, equally many per sequence, it is `flash_attn_with_kvcache`, which splits long K and V over
        multiprocessors. Otherwise it is `flash_attn_varlen_func`; if nothing is cached, on K and V as the layer gives
        them. The log-sum-exp is needed for sinks.
        """
        flash: Any = importlib.import_module("flash_attn")
        batch = self._batch
        options: dict[str, Any] = {
            "softmax_scale": paged.scale,
            "causal": True,
            "window_size": (paged.window - 1, 0) if paged.window else (-1, -1),
            "softcap": paged.softcap or 0.0,
        }
        query = paged.query.contiguous()
        if _is_split(batch):
            out, lse = flash.flash_attn_with_kvcache(
                query.view(-1, batch.max_new, *query.shape[1:]),
                paged.keys,
                paged.values,
                cache_seqlens=batch.kv_lengths_tensor,
                block_table=batch.block_table,
                return_softmax_lse=True,
                **options,
            )
            if paged.sinks is not None:
                return add_sinks(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), paged.sinks)
            return torch.flatten(out, 0, 1)
        if batch.has_past:
            keys, values, max_length = paged.keys, paged.values, max(batch.kv_lengths)
            options["block_table"] = batch.block_table
        else:
            keys, values, max_length = paged.new_keys, paged.new_values, batch.max_new
        starts = (batch.query_starts_tensor, batch.kv_starts_tensor)
        out, lse, _ = flash.flash_attn_varlen_func(
            query, keys, values, *starts, batch.max_new, max_length, return_attn_probs=True, **options
        )
        return add_sinks(out, lse.transpose(0, 1), paged.sinks)


def _is_split(batch: Batch) -> bool:
    """Return whether a batch is for the function that splits K and V."""
    return batch.is_even and (batch.max_new <= MAX_SPLIT_TOKENS or batch.query_starts[-1] <= MAX_SHORT_TOKENS)


def why_not_flash(layer: LayerShape) -> str | None:
    """Return why flash-attn 2 does not serve a layer; None if it does."""
    if layer.device != "cuda":
        return f"it does not run on {layer.device}"
    if not flash_head_dims():
        return "flash-attn is not installed"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"it does not know {layer.dtype}"
    if layer.block_size % 256:
        return f"it takes blocks of 256 tokens, not of {layer.block_size}"
    if layer.k_dim != layer.v_dim or layer.k_dim not in flash_head_dims():
        return f"it is not used for head dims {layer.k_dim} and {layer.v_dim}"
    return None


@cache
def flash_head_dims() -> frozenset[int]:
    """Return the head dims that flash-attn 2 has kernels of their own for; empty if it is not installed.

    It pads others between them; those are left to the backends that follow. benchmarks/attention.py compares each with
    float32.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return frozenset()
    return frozenset({64, 96, 128, 192, 256})
