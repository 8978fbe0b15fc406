"""What FlashInfer's paged prefill wrapper computes, in plain torch, with the checks and the habits of 0.6.4.

`run` reads only what the real kernels read: the device's index buffers, not the arguments of `plan`. So a plan that was
not made anew for a step gives that step's wrong answer here too.
"""

from __future__ import annotations

import math
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["PrefillWrapper", "fake_flashinfer"]


def fake_flashinfer() -> ModuleType:
    """Return a stand-in for the module, for machines without a GPU."""
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)  # importlib looks for one
    module.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper  # type: ignore[attr-defined]
    return module


class PrefillWrapper:
    """BatchPrefillWithPagedKVCacheWrapper. plans: how often it was planned."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout in ("NHD", "HND")
        assert backend in ("fa2", "fa3")
        assert custom_mask_buf is None
        assert mask_indptr_buf is None
        self.device = float_workspace_buffer.device
        self.plans = 0
        self.layout = kv_layout
        self._is_graph = use_cuda_graph
        self._buffers = [qo_indptr_buf, paged_kv_indptr_buf, paged_kv_last_page_len_buf, paged_kv_indices_buf]
        self._most_rows: int | None = None
        if use_cuda_graph:
            for buffer in self._buffers:
                assert isinstance(buffer, Tensor)
                assert (buffer.dtype, buffer.device) == (torch.int32, self.device)
            assert len(self._buffers[0]) == len(self._buffers[1]) == len(self._buffers[2]) + 1  # type: ignore[arg-type]

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
        assert self.plans == 0, "a plan would be lost"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        for tensor in (*host, paged_kv_indices):
            assert tensor.dtype == torch.int32
            assert tensor.dim() == 1
            assert tensor.is_contiguous()
        assert all(tensor.device.type == "cpu" for tensor in host), "copied back from the device: a wait"
        assert paged_kv_indices.device == self.device, "copied to the device: a wait"
        sequences = len(qo_indptr) - 1
        assert len(paged_kv_indptr) == sequences + 1
        assert len(paged_kv_last_page_len) == sequences
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert bool((qo_indptr.diff() > 0).all())
        assert bool((paged_kv_indptr.diff() > 0).all())
        assert len(paged_kv_indices) == paged_kv_indptr[-1], "only real pages"
        assert bool(((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all())
        lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
        assert bool((lengths >= qo_indptr.diff()).all())
        assert num_qo_heads % num_kv_heads == 0
        assert isinstance(window_left, int)
        assert window_left >= -1
        rows = int(qo_indptr[-1])
        if self._is_graph:
            self._most_rows = self._most_rows or rows
            assert rows <= self._most_rows, "the total number of rows cannot exceed that of the first plan"
            kept: list[Any] = self._buffers
            assert sequences == len(kept[0]) - 1, "the batch size is fixed"
            assert len(paged_kv_indices) <= len(kept[3])
            for buffer, tensor in zip(kept, (*host, paged_kv_indices), strict=True):
                buffer[: len(tensor)].copy_(tensor)
        else:
            self._buffers = [tensor.clone() for tensor in (*host, paged_kv_indices)]
        self._heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._dtypes = (q_data_type, kv_data_type or q_data_type)
        self._causal, self._window_left, self._cap = causal, window_left, logits_soft_cap or 0.0
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self.plans += 1

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor] | Tensor, *, out: Tensor, return_lse: bool = False
    ) -> Any:
        """Return out [tokens, heads, dim], and the log-sum-exp in base 2 [tokens, heads]."""
        assert self.plans, "run before plan"
        keys, values = paged_kv_cache.unbind(1) if isinstance(paged_kv_cache, Tensor) else paged_kv_cache
        assert keys.stride() == values.stride(), "k/v strides differ"
        assert keys.stride(-1) == q.stride(-1) == out.stride(-1) == 1
        if self.layout == "HND":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        heads, kv_heads, dim, page_size = self._heads
        assert q.shape[1:] == out.shape[1:] == (heads, dim)
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, dim)
        assert (q.dtype, keys.dtype, values.dtype) == (self._dtypes[0], self._dtypes[1], self._dtypes[1])
        assert out.dtype == q.dtype
        starts, kv_starts, last, blocks = (buffer.tolist() for buffer in self._buffers if buffer is not None)
        assert starts[-1] == q.shape[0]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:2], dtype=wide)
        for i in range(len(last)):
            pages = blocks[kv_starts[i] : kv_starts[i + 1]]
            assert all(0 <= page < keys.shape[0] for page in pages)
            length = (len(pages) - 1) * page_size + last[i]
            rows = slice(starts[i], starts[i + 1])
            k, v = (each[pages].flatten(0, 1)[:length].to(wide) for each in (keys, values))
            k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[rows].to(wide), k) * self._scale
            if self._cap:
                scores = self._cap * (scores / self._cap).tanh()
            scores.masked_fill_(~self._seen(rows.stop - rows.start, length), -math.inf)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
            lse[rows] = scores.logsumexp(-1).t() / math.log(2)
        return (out, lse) if return_lse else out

    def _seen(self, queries: int, length: int) -> Tensor:
        """Return which keys each query sees [queries, length]; the queries are the last tokens."""
        at = torch.arange(length - queries, length)[:, None]
        keys = torch.arange(length)[None]
        seen = keys <= at if self._causal else torch.ones(queries, length, dtype=torch.bool)
        return seen & (keys >= at - self._window_left) if self._window_left >= 0 else seen
