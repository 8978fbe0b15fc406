"""ManagedFlashAttention: attention whose memory one sets, sees and steers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention_paged import flash_head_dims
from tierkv.engine.attention_pieces import (
    AllocationTracker,
    KVStream,
    Ledger,
    attend_pieces,
    attend_whole,
    iter_resident,
)
from tierkv.engine.pieces import AttentionShape, PieceSizes, iter_pieces, plan_pieces
from tierkv.errors import ConfigError, ShapeError
from tierkv.requests.block_control import BlockState
from tierkv.values.stats import CacheStats

__all__ = ["CacheInspection", "ManagedFlashAttention", "MemoryStats"]


class BlockManager(Protocol):
    """Who carries out manual cache management instead: a MemoryController."""

    def manual_cache_management(
        self,
        evict_blocks: Sequence[int] | None = None,
        pin_blocks: Sequence[int] | None = None,
        offload_blocks: Sequence[int] | None = None,
    ) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """What one forward pass took. Bytes; seconds.

    kv_bytes: K and V of the call. peak_bytes: most device memory held at a time beside the arguments and the result,
    by count; measured_peak_bytes: the same by torch's allocator, with profile=True on a GPU. pieces: parts whose
    attention was merged, of query_tokens against key_tokens at most. seconds: of the call; with profile=True to the end
    of the work on the device, else to its being queued.
    """

    budget_bytes: int | None
    kv_bytes: int
    peak_bytes: int
    pieces: int
    query_tokens: int
    key_tokens: int
    bytes_to_cpu: int
    bytes_to_device: int
    seconds: float
    measured_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInspection:
    """What a cache holds: totals, every block of the hot pool that is in use or cached, free block ids."""

    stats: CacheStats
    blocks: tuple[BlockState, ...]
    free_blocks: int
    host_bytes: int


class ManagedFlashAttention:
    """Exact causal attention under a budget of device memory, and hands on the cache's blocks. Not thread-safe.

    cache: whose blocks are inspected and managed. memory_tracker: told of every tensor that a call makes.
    memory_controller: carries out `manual_cache_management` in the cache's place. Keeps one page-locked buffer for K
    and V that were offloaded, as large as the largest so far, until `close`.

    >>> q, k, v = (torch.randn(1, 16, 2, 8) for _ in range(3))
    >>> output, stats = ManagedFlashAttention(cache).forward_with_control(q, k, v, memory_budget=1 << 20)
    >>> output.shape
    torch.Size([1, 16, 2, 8])
    """

    def __init__(
        self,
        cache: TierCache,
        *,
        memory_tracker: AllocationTracker | None = None,
        memory_controller: BlockManager | None = None,
    ) -> None:
        self.cache = cache
        self.memory_tracker = memory_tracker
        self.memory_controller = memory_controller
        self._host: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> ManagedFlashAttention:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def forward_with_control(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_budget: int | None = None,
        cpu_offload: bool = False,
        profile: bool = False,
    ) -> tuple[Tensor, MemoryStats]:
        """Return causal attention [batch, tokens, heads, dim], of q's dtype and device, and what it took.

        q: [batch, tokens, heads, dim]; k, v: [batch, key tokens, kv_heads, dim], contiguous, of one dtype, at least as
        many tokens as q has, whose tokens are the last ones. heads is a multiple of kv_heads (grouped queries).

        memory_budget: bytes for K and V as far as they are looked at at a time, and for working memory. Below what
        all at once takes, attention is computed in pieces and merged by log-sum-exp: exact, up to rounding.
        cpu_offload: K and V are kept in page-locked CPU memory, moved there first if they are not, and streamed
        through two buffers within the budget. The caller may then drop k and v; while it holds them their memory stays
        taken. K and V that lie on the CPU beside a q on a GPU are streamed in any case. On a GPU this needs flash-attn,
        so bfloat16 or float16. Gradients are not computed.

        Raises CapacityError if the smallest piece does not fit the budget, ShapeError and ConfigError for arguments
        that cannot work. profile=True waits for the device, and resets torch's peak memory counter.
        """
        shape = _shape_of(q, k, v)
        device = q.device
        is_streamed = cpu_offload or k.device != device
        sizes = plan_pieces(shape, budget_bytes=memory_budget, is_streamed=is_streamed)
        ledger = Ledger(self.memory_tracker)
        is_measured = profile and device.type == "cuda"
        if is_measured:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if is_measured else 0
        started = time.perf_counter()
        with torch.no_grad():
            if is_streamed:
                run = self._attend_streamed(q, k, v, shape, sizes, ledger, is_bounded=memory_budget is not None)
            else:
                run = self._attend_resident(q, k, v, shape, sizes, ledger, is_bounded=memory_budget is not None)
        if is_measured:
            torch.cuda.synchronize(device)
        stats = MemoryStats(
            budget_bytes=memory_budget,
            kv_bytes=shape.kv_bytes,
            peak_bytes=ledger.peak_bytes,
            pieces=run.pieces,
            query_tokens=sizes.query_tokens,
            key_tokens=sizes.key_tokens,
            bytes_to_cpu=run.bytes_to_cpu,
            bytes_to_device=run.bytes_to_device,
            seconds=time.perf_counter() - started,
            measured_peak_bytes=(
                torch.cuda.max_memory_allocated(device) - before - run.out.nbytes if is_measured else None
            ),
        )
        return run.out, stats

    def inspect_cache_state(self) -> CacheInspection:
        """Return what the cache holds, block by block."""
        stats, blocks = self.cache.stats(), self.cache.blocks.inspect()
        return CacheInspection(
            stats=stats,
            blocks=blocks,
            free_blocks=self.cache.hot.num_blocks - len(blocks),
            host_bytes=self._host.nbytes if self._host is not None else 0,
        )

    def manual_cache_management(
        self,
        evict_blocks: Sequence[int] | None = None,
        pin_blocks: Sequence[int] | None = None,
        offload_blocks: Sequence[int] | None = None,
    ) -> object:
        """Pin, offload and evict blocks of the hot pool by their ids, in this order.

        Returns what became of each, as `BlockControl.manage` says it, or as the memory controller does if there is one.
        """
        if self.memory_controller is not None:
            return self.memory_controller.manual_cache_management(evict_blocks, pin_blocks, offload_blocks)
        return self.cache.blocks.manage(evict=evict_blocks or (), pin=pin_blocks or (), offload=offload_blocks or ())

    def close(self) -> None:
        """Wait for copies and give the page-locked buffer back. May be called twice."""
        if self._stream is not None:
            self._stream.synchronize()
        self._host = None

    def _attend_resident(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shape: AttentionShape,
        sizes: PieceSizes,
        ledger: Ledger,
        *,
        is_bounded: bool,
    ) -> _Run:
        scale = q.shape[-1] ** -0.5
        if sizes.is_whole:
            return _Run(attend_whole(q, k, v, scale, ledger, is_bounded=is_bounded), 1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return _Run(out, attend_pieces(q, iter_resident(k, v, shape, sizes), shape, sizes, out, scale, ledger))

    def _attend_streamed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shape: AttentionShape,
        sizes: PieceSizes,
        ledger: Ledger,
        *,
        is_bounded: bool,
    ) -> _Run:
        """Attend K and V that lie, or come to lie, in CPU memory."""
        keys, values = self._on_host(k, v, q.device)
        to_cpu = 0 if k.device.type == "cpu" else shape.kv_bytes
        scale = q.shape[-1] ** -0.5
        if sizes.is_whole:
            copied = ledger.take((2, *k.shape), k.dtype, q.device, "attention stream buffer")
            stream = self._stream_of(q.device)
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(q.device))
            with torch.cuda.stream(stream):
                copied[0].copy_(keys, non_blocking=True)
                copied[1].copy_(values, non_blocking=True)
            if stream is not None:
                torch.cuda.current_stream(q.device).wait_stream(stream)
            out = attend_whole(q, copied[0], copied[1], scale, ledger, is_bounded=is_bounded)
            ledger.give(copied)
            return _Run(out, 1, to_cpu, shape.kv_bytes)
        source = KVStream(keys, values, device=q.device, stream=self._stream_of(q.device), ledger=ledger)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kv = source.iter_kv(iter_pieces(shape, sizes), sizes)
        pieces = attend_pieces(q, kv, shape, sizes, out, scale, ledger)
        return _Run(out, pieces, to_cpu, source.bytes_in)

    def _on_host(self, k: Tensor, v: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return K and V in CPU memory that the device can copy from at full speed: moved there if they are not."""
        stream = self._stream_of(device)
        if k.device.type == "cpu" and (stream is None or (k.is_pinned() and v.is_pinned())):
            return k, v
        if self._host is None or self._host.nbytes < k.nbytes + v.nbytes:
            self._host = None  # the old one first: page-locked memory is scarce
            self._host = torch.empty(k.nbytes + v.nbytes, dtype=torch.uint8, pin_memory=True)
        both = self._host[: k.nbytes + v.nbytes].view(k.dtype)
        keys, values = both[: k.numel()].view(k.shape), both[k.numel() :].view(v.shape)
        assert stream is not None
        if k.device.type == "cpu":
            stream.synchronize()  # the copies of the call before read from here
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            keys.copy_(k, non_blocking=True)
            values.copy_(v, non_blocking=True)
        return keys, values

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream | None:
        """Return the stream for copies; None on a CPU."""
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


@dataclass(frozen=True, slots=True)
class _Run:
    out: Tensor
    pieces: int
    bytes_to_cpu: int = 0
    bytes_to_device: int = 0


def _shape_of(q: Tensor, k: Tensor, v: Tensor) -> AttentionShape:
    """Check a call's tensors. Raises ShapeError and ConfigError."""
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ShapeError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ShapeError(f"{q.shape[2]} heads are no multiple of {k.shape[2]} heads of K and V")
    if not 0 < q.shape[1] <= k.shape[1] or not q.shape[0]:
        raise ShapeError(f"{q.shape[1]} queries cannot be the last of {k.shape[1]} tokens")
    if not q.dtype == k.dtype == v.dtype or k.device != v.device:
        raise ShapeError("q, k and v must have one dtype, and k and v one device")
    if not all(tensor.is_contiguous() for tensor in (q, k, v)):
        raise ShapeError("q, k and v must be contiguous")
    if q.is_cuda and (q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] not in flash_head_dims()):
        raise ConfigError(f"no flash-attn for {q.dtype} and head dim {q.shape[3]} on this GPU")
    if k.is_cuda and not q.is_cuda:
        raise ShapeError("k and v must lie on q's device or on the CPU")
    return AttentionShape(
        batch=q.shape[0],
        query_tokens=q.shape[1],
        key_tokens=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        item_bytes=q.element_size(),
    )
