"""ManagedFlashAttention: exact attention under a memory budget, with a view of the cache's blocks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention_pieces import (
    AllocationTracker,
    KVStream,
    MemoryMeter,
    attend_pieces,
    attend_whole,
    iter_resident,
)
from tierkv.engine.backends.flash import flash_head_dims
from tierkv.engine.pieces import AttentionShape, Piece, PieceSizes, iter_pieces, plan_pieces
from tierkv.errors import ConfigError, ShapeError
from tierkv.requests.block_control import BlockState
from tierkv.values.stats import CacheStats

__all__ = ["CacheInspection", "ManagedFlashAttention", "MemoryStats"]


class BlockManager(Protocol):
    """Carries out manual cache management in the cache's place, as a MemoryController does."""

    def manual_cache_management(
        self,
        evict_blocks: Sequence[int] | None = None,
        pin_blocks: Sequence[int] | None = None,
        offload_blocks: Sequence[int] | None = None,
    ) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """Memory and time of one call. Bytes; seconds.

    kv_bytes: K and V of the call. peak_bytes: the most device memory at a time, counted, without the arguments and the
    result. measured_peak_bytes: the same by torch's allocator, with profile=True on a GPU.
    pieces: merged parts, of query_tokens and key_tokens at most.
    seconds: until the work is queued; with profile=True until it has ended on the device.
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
    """The content of a cache: totals, every used or cached block of the hot pool, the number of free blocks."""

    stats: CacheStats
    blocks: tuple[BlockState, ...]
    free_blocks: int
    host_bytes: int


class ManagedFlashAttention:
    """Exact causal attention under a budget of device memory, and control of a cache's blocks. Not thread-safe.

    memory_tracker: is notified of every tensor that a call makes.
    memory_controller: carries out `manual_cache_management` in the cache's place.
    Until `close` it keeps one page-locked buffer for offloaded K and V, as large as the largest call.

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
        """Return causal attention [batch, tokens, heads, dim], of q's dtype and device, and its memory and time.

        q: [batch, tokens, heads, dim], the last tokens of k. k, v: [batch, key tokens, kv_heads, dim]. All contiguous
        and of one dtype; heads is a multiple of kv_heads (grouped queries).

        memory_budget: bytes for working memory and the K and V of one piece. If it is too small for all at once,
        attention runs in pieces that are merged by log-sum-exp: exact, up to rounding.
        cpu_offload: K and V are moved to page-locked CPU memory, if they are not there, and streamed through two
        buffers within the budget. The caller may delete k and v then to free their memory. K and V on the CPU are
        always streamed to a q on a GPU. On a GPU this needs flash-attn, so bfloat16 or float16. No gradients are
        computed.
        profile: wait for the device, and reset torch's peak memory counter.

        Raises CapacityError if the smallest piece does not fit the budget, ShapeError and ConfigError for unsuitable
        arguments.
        """
        shape = _shape_of(q, k, v)
        device = q.device
        is_streamed = cpu_offload or k.device != device
        sizes = plan_pieces(shape, budget_bytes=memory_budget, is_streamed=is_streamed)
        meter = MemoryMeter(self.memory_tracker)
        call = _Call(q=q, k=k, v=v, shape=shape, sizes=sizes, meter=meter, is_bounded=memory_budget is not None)
        is_measured = profile and device.type == "cuda"
        if is_measured:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if is_measured else 0
        started = time.perf_counter()
        with torch.no_grad():
            run = self._attend_streamed(call) if is_streamed else self._attend_resident(call)
        if is_measured:
            torch.cuda.synchronize(device)
        stats = MemoryStats(
            budget_bytes=memory_budget,
            kv_bytes=shape.kv_bytes,
            peak_bytes=meter.peak_bytes,
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
        """Return the content of the cache, block by block."""
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

        Returns the result of `cache.blocks.manual_cache_management`, or of the memory controller if there is one.
        """
        manager = self.memory_controller or self.cache.blocks
        return manager.manual_cache_management(evict_blocks, pin_blocks, offload_blocks)

    def close(self) -> None:
        """Wait for copies and free the page-locked buffer. May be called twice."""
        if self._stream is not None:
            self._stream.synchronize()
        self._host = None

    def _attend_resident(self, call: _Call) -> _Run:
        q, k, v = call.q, call.k, call.v
        if call.sizes.is_whole:
            return _Run(attend_whole(q, k, v, call.scale, call.meter, is_bounded=call.is_bounded), 1)
        return call.run_pieces(iter_resident(k, v, call.shape, call.sizes))

    def _attend_streamed(self, call: _Call) -> _Run:
        """Attend to K and V in CPU memory; move them there first if they are not."""
        q, k = call.q, call.k
        keys, values = self._on_host(k, call.v, q.device)
        to_cpu = 0 if k.device.type == "cpu" else call.shape.kv_bytes
        stream = self._stream_of(q.device)
        if call.sizes.is_whole:
            copied = call.meter.allocate((2, *k.shape), k.dtype, q.device, "attention stream buffer")
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(q.device))
            with torch.cuda.stream(stream):
                copied[0].copy_(keys, non_blocking=True)
                copied[1].copy_(values, non_blocking=True)
            if stream is not None:
                torch.cuda.current_stream(q.device).wait_stream(stream)
            out = attend_whole(q, copied[0], copied[1], call.scale, call.meter, is_bounded=call.is_bounded)
            call.meter.remove(copied)
            return _Run(out, 1, to_cpu, call.shape.kv_bytes)
        source = KVStream(keys, values, device=q.device, stream=stream, meter=call.meter)
        run = call.run_pieces(source.iter_kv(iter_pieces(call.shape, call.sizes), call.sizes))
        return replace(run, bytes_to_cpu=to_cpu, bytes_to_device=source.bytes_in)

    def _on_host(self, k: Tensor, v: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return K and V in CPU memory from which the device copies at full speed; move them if they are elsewhere."""
        stream = self._stream_of(device)
        if k.device.type == "cpu" and (stream is None or (k.is_pinned() and v.is_pinned())):
            return k, v
        if self._host is None or self._host.nbytes < k.nbytes + v.nbytes:
            self._host = None  # free the old buffer first: page-locked memory is scarce
            self._host = torch.empty(k.nbytes + v.nbytes, dtype=torch.uint8, pin_memory=True)
        both = self._host[: k.nbytes + v.nbytes].view(k.dtype)
        keys, values = both[: k.numel()].view(k.shape), both[k.numel() :].view(v.shape)
        assert stream is not None
        if k.device.type == "cpu":
            stream.synchronize()  # copies of the previous call still read this buffer
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """The arguments of one call, checked, and its plan."""

    q: Tensor
    k: Tensor
    v: Tensor
    shape: AttentionShape
    sizes: PieceSizes
    meter: MemoryMeter
    is_bounded: bool

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return float(self.q.shape[-1] ** -0.5)

    def run_pieces(self, kv: Iterable[tuple[Piece, Tensor, Tensor]]) -> _Run:
        """Attend piece by piece."""
        out = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        return _Run(out, attend_pieces(self.q, kv, self.shape, self.sizes, out, self.scale, self.meter))


@dataclass(frozen=True, slots=True, eq=False)
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
