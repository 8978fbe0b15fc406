"""SparseAttention: plans decode attention over the pages that each query wants; other layers attend to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tierkv.engine.backends.protocol import AttentionPlan, Batch, LayerShape, PagedQuery, Planner
from tierkv.engine.sparse.bounds import KeyBounds
from tierkv.engine.sparse.options import PageCounts
from tierkv.engine.sparse.torch_pages import attend_sparsely

_attention: ModuleType | None
_scores: ModuleType | None
try:
    from tierkv.kernels import page_attention as _attention_kernels
    from tierkv.kernels import page_scores as _score_kernels

    _attention, _scores = _attention_kernels, _score_kernels
except ModuleNotFoundError:  # triton has no wheel for this machine
    _attention = _scores = None

__all__ = ["SparseAttention", "why_not_sparse"]

_LARGEST_DIM = 256  # a program holds a tile of K and one of V in shared memory


class SparseAttention:
    """Attention of sequences with one new token each, as a Planner. bounds: of the pool that the batches read.

    dense: plans the layers that read all: those with a window, which is short anyway, and those that no kernel serves.
    """

    def __init__(self, counts: PageCounts, bounds: KeyBounds, dense: Planner) -> None:
        self.bounds: KeyBounds = bounds
        self._counts = counts
        self._dense = dense

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch for layers of one shape. Raises as the dense planner does."""
        if batch.max_new != 1 or why_not_sparse(layer) is not None:
            return self._dense.plan(layer, batch)
        if layer.device == "cuda":
            return _KernelPlan(batch, layer, self._counts, self.bounds)
        return _TorchPlan(batch, self._counts, self.bounds)


def why_not_sparse(layer: LayerShape) -> str | None:
    """Return why a layer reads all of a sequence; None if it may read chosen pages."""
    if layer.window:
        return "it has a window"
    if layer.device != "cuda":
        return None
    if _scores is None:
        return "triton is not installed"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels do not know {layer.dtype}"
    if max(layer.k_dim, layer.v_dim) > _LARGEST_DIM:
        return f"the kernels are not used for head dims {layer.k_dim} and {layer.v_dim}"
    return None


class _TorchPlan:
    def __init__(self, batch: Batch, counts: PageCounts, bounds: KeyBounds) -> None:
        self._batch, self._counts, self._bounds = batch, counts, bounds

    def update(self, batch: Batch) -> None:
        """Do nothing: `run` reads the batch's lengths and its block table."""

    def run(self, paged: PagedQuery) -> Tensor:
        batch = self._batch
        return attend_sparsely(paged, self._bounds.of(paged.layer), batch.block_table, batch.kv_lengths, self._counts)


@dataclass(frozen=True, slots=True, eq=False)
class _Space:
    """Memory of a plan, which its layers use one after another."""

    scores: Tensor
    chosen: Tensor


class _KernelPlan:
    """Four kernels that read the batch's tensors: nothing is planned on the host, so a CUDA graph can hold them."""

    def __init__(self, batch: Batch, layer: LayerShape, counts: PageCounts, bounds: KeyBounds) -> None:
        assert _attention is not None
        self._batch, self._counts, self._bounds = batch, counts, bounds
        self._kv_heads, self._per_block = layer.kv_heads, layer.block_size // counts.page
        sequences, width = batch.block_table.shape
        most = counts.read(width * layer.block_size)
        device = batch.block_table.device
        pages = width * self._per_block
        self._space = _Space(
            torch.empty(sequences, layer.heads, pages, dtype=torch.float32, device=device),
            torch.empty(sequences, layer.kv_heads, most, dtype=torch.int32, device=device),
        )
        self._parts = _attention.PartSpace.of(
            sequences=sequences,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            v_dim=layer.v_dim,
            most_tokens=most * counts.page,
            device=device,
        )

    def update(self, batch: Batch) -> None:
        """Do nothing: the kernels read the tensors of the batch."""

    def run(self, paged: PagedQuery) -> Tensor:
        """Score all pages, choose some, and attend to those."""
        self.score(paged)
        self.choose()
        return self.attend(paged)

    def score(self, paged: PagedQuery) -> None:
        """Launch the scores of all pages for a layer's queries."""
        assert _scores is not None
        _scores.score_pages(
            paged.query.contiguous(),
            self._bounds.of(paged.layer),
            self._batch.block_table,
            self._batch.kv_lengths_tensor,
            self._space.scores,
            scale=paged.scale,
            choice=self._counts,
        )

    def choose(self) -> None:
        """Launch the choice of pages by their scores."""
        assert _scores is not None
        _scores.choose_pages(
            self._space.scores,
            self._batch.block_table,
            self._batch.kv_lengths_tensor,
            self._space.chosen,
            kv_heads=self._kv_heads,
            per_block=self._per_block,
            choice=self._counts,
        )

    def attend(self, paged: PagedQuery) -> Tensor:
        """Launch attention to the chosen pages."""
        assert _attention is not None
        query = paged.query.contiguous()
        out = query.new_empty((*query.shape[:2], paged.values.shape[-1]))
        _attention.attend_pages(
            query,
            paged.keys,
            paged.values,
            self._batch.kv_lengths_tensor,
            self._space.chosen,
            out,
            self._parts,
            choice=self._counts,
            scale=paged.scale,
            softcap=paged.softcap,
            sinks=paged.sinks,
        )
        return out
