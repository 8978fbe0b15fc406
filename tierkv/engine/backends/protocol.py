"""The seam of attention backends: what a layer asks for, what a batch looks like, and what a backend does with both.

A backend plans a batch once for each shape of layers, and the plan runs once per layer. All attention here is exact and
causal, with the queries at the end of their sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.values.layout import BlockLayout

__all__ = [
    "AttentionBackend",
    "AttentionPlan",
    "Batch",
    "BatchPart",
    "LayerShape",
    "PagedQuery",
    "Planner",
    "attend",
    "update_plans",
]


@dataclass(slots=True, kw_only=True)  # not frozen: each layer of each pass makes one
class PagedQuery:
    """One layer's attention. query: [T, heads, dim]; keys, values: [num_blocks, block_size, kv_heads, dim].

    new_keys, new_values: [T, kv_heads, dim], of the new tokens; each function says whether keys and values have them.
    window: each token sees itself and the window - 1 tokens before it.
    softcap: scores are softcap * tanh(score / softcap).
    sinks: [heads] logits that take part in the softmax and have no value (gpt-oss).
    layer: the number of the layer, for what is kept of each layer's keys beside the pool.
    """

    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    layer: int = 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What of a layer decides which backend serves it. Layers with equal shapes share one plan.

    device: "cuda" or "cpu". scale, window, softcap: as in PagedQuery.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    block_size: int
    scale: float = 1.0
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, paged: PagedQuery) -> LayerShape:
        """Return the shape of a layer's attention."""
        query, keys = paged.query, paged.keys
        _, block_size, kv_heads, k_dim = keys.shape
        return cls(
            query.device.type,
            query.dtype,
            query.shape[1],
            kv_heads,
            k_dim,
            paged.values.shape[-1],
            block_size,
            paged.scale,
            paged.window,
            paged.softcap,
        )

    @classmethod
    def of_layout(cls, layout: BlockLayout, device: str) -> set[LayerShape]:
        """Return the shapes of a layout's layers, as far as they are known: without windows and groups of heads."""
        dtype = getattr(torch, layout.dtype)
        return {
            cls(device, dtype, each.kv_heads, each.kv_heads, each.k_dim, each.v_dim, layout.block_size)
            for each in layout.layers
        }


class AttentionPlan(Protocol):
    """Attention of one batch in all layers of one shape."""

    def run(self, paged: PagedQuery) -> Tensor:
        """Return [T, heads, v_dim], contiguous, of the query's dtype. keys and values have the new tokens already."""
        ...

    def update(self, batch: Batch) -> None:
        """Plan anew for the lengths and block tables that a static batch has now: before each replay of a graph."""
        ...


class AttentionBackend(Protocol):
    """One way to compute paged attention."""

    @property
    def name(self) -> str:
        """The name by which it is chosen: "torch", "flash-attn", "flashinfer-fa2" or "flashinfer-fa3"."""
        ...

    def why_not(self, layer: LayerShape, batch: Batch | None = None) -> str | None:
        """Return why it does not serve a layer, or a batch of it; None if it does. A graph's batch is static."""
        ...

    def prepare(self, layer: LayerShape, *, wait: bool) -> bool:
        """Return whether its kernels for a layer are compiled. If not, start that in the background, or wait for it."""
        ...

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch that it serves."""
        ...


class Planner(Protocol):
    """Chooses a backend for a batch."""

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan: ...


class Batch(Protocol):
    """The fields of an AttentionBatch that backends read.

    host_table: block_table on the CPU. kv_range: the fewest and the most tokens with K and V that the longest sequence
    of a static batch may have; None if the batch is not static, so its lengths are what they are.
    part: its number among the parts of one batch. attention: chooses a backend for each shape of layers. plans: those
    made so far, by that shape.
    """

    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    host_table: npt.NDArray[np.int32]
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    attention: Planner
    kv_range: tuple[int, int] | None
    part: int
    plans: dict[LayerShape, AttentionPlan]

    @property
    def parts(self) -> Sequence[BatchPart]: ...


@dataclass(slots=True, kw_only=True)
class BatchPart:
    """Some sequences of a batch, with the fields of a batch. tokens: their new tokens in the packed input."""

    tokens: slice
    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    host_table: npt.NDArray[np.int32]
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    attention: Planner
    kv_range: tuple[int, int] | None = None
    part: int = 0
    plans: dict[LayerShape, AttentionPlan] = field(default_factory=dict)
    parts: tuple[BatchPart, ...] = ()


def attend(paged: PagedQuery, batch: Batch) -> Tensor:
    """Return [T, heads, v_dim], contiguous, of the query's dtype. keys and values have the new tokens already.

    The parts of a batch are attended apart: each kernel is fast for its own kind of sequence.
    """
    if batch.parts:
        found = paged.query.new_empty((*paged.query.shape[:2], paged.values.shape[-1]))
        for part in batch.parts:
            tokens = part.tokens
            new = (paged.query[tokens], paged.new_keys[tokens], paged.new_values[tokens])
            found[tokens] = attend(replace(paged, query=new[0], new_keys=new[1], new_values=new[2]), part)
        return found
    layer = LayerShape.of(paged)
    plan = batch.plans.get(layer)
    if plan is None:
        plan = batch.plans[layer] = batch.attention.plan(layer, batch)
    return plan.run(paged)


def update_plans(batch: Batch) -> None:
    """Plan anew for what a static batch has now, in all of its parts."""
    for part in batch.parts or (batch,):
        for plan in part.plans.values():
            plan.update(part)
