"""Attention under a budget of memory: runs the pieces that `pieces` plans, with K and V in place or streamed in."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tierkv.engine.attention_merge import merge_in_place
from tierkv.engine.backends.torch_attention import cpu_attention
from tierkv.engine.pieces import AttentionShape, Piece, PieceSizes, iter_pieces

__all__ = ["AllocationTracker", "KVStream", "MemoryMeter", "attend_pieces", "attend_whole", "iter_resident"]


class AllocationTracker(Protocol):
    """Is notified of every tensor that is made, as a MemoryTracker is."""

    def register_allocation(self, tensor: Tensor, purpose: str, **metadata: Any) -> str: ...
    def free_allocation(self, allocation_id: str) -> None: ...


@dataclass(slots=True)
class MemoryMeter:
    """Counts the device memory of a call, without its arguments and its result. Bytes."""

    tracker: AllocationTracker | None = None
    held_bytes: int = 0
    peak_bytes: int = 0
    _held: dict[int, tuple[int, str | None]] = field(default_factory=dict)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return a new tensor, counted until `remove`."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self.add(tensor, purpose)
        return tensor

    def add(self, tensor: Tensor, purpose: str) -> None:
        """Count a tensor that the caller made."""
        known = self.tracker.register_allocation(tensor, purpose) if self.tracker else None
        self._held[id(tensor)] = (tensor.nbytes, known)
        self.held_bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def remove(self, *tensors: Tensor) -> None:
        """Stop counting tensors; the caller deletes them."""
        for tensor in tensors:
            size, known = self._held.pop(id(tensor))
            self.held_bytes -= size
            if self.tracker and known is not None:
                self.tracker.free_allocation(known)


class KVStream:
    """Copies runs of K and V from page-locked CPU memory into two buffers on the device, one ahead of the reader.

    keys, values: [batch, tokens, kv_heads, dim]. Copies run on `stream`; without a stream (on a CPU) they are
    synchronous.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        meter: MemoryMeter,
    ) -> None:
        self._sources = (keys, values)
        self._device = device
        self._stream = stream
        self._meter = meter
        self.bytes_in: int = 0

    def iter_kv(self, pieces: Iterable[Piece], sizes: PieceSizes) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Yield each piece with its K and V [tokens, kv_heads, dim], valid until the next piece is requested."""
        heads, dim = self._sources[0].shape[2:]
        shape = (sizes.buffers, 2, sizes.key_tokens, heads, dim)
        buffer = self._meter.allocate(shape, self._sources[0].dtype, self._device, "attention stream buffer")
        free: list[torch.cuda.Event | None] = [None] * sizes.buffers
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        pending: list[tuple[Piece, int, torch.cuda.Event | None]] = []
        for number, piece in enumerate(pieces):
            slot = number % sizes.buffers
            if len(pending) == sizes.buffers:
                yield from self._yield_arrived(pending.pop(0), buffer, free)
            pending.append((piece, slot, self._fetch(piece, buffer[slot], free[slot])))
        while pending:
            yield from self._yield_arrived(pending.pop(0), buffer, free)
        self._meter.remove(buffer)

    def _fetch(self, piece: Piece, buffer: Tensor, free: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Start to copy a piece's K and V; return the event of the copy's end."""
        count = piece.last_key - piece.first_key
        with torch.cuda.stream(self._stream):  # None: no effect
            if self._stream is not None and free is not None:
                self._stream.wait_event(free)
            for target, source in zip(buffer, self._sources, strict=True):
                part = source[piece.item, piece.first_key : piece.last_key]
                target[:count].copy_(part, non_blocking=True)
                self.bytes_in += part.nbytes
            return self._stream.record_event() if self._stream is not None else None

    def _yield_arrived(
        self,
        pending: tuple[Piece, int, torch.cuda.Event | None],
        buffer: Tensor,
        free: list[torch.cuda.Event | None],
    ) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        piece, slot, arrived = pending
        count = piece.last_key - piece.first_key
        if arrived is not None:
            arrived.wait(torch.cuda.current_stream(self._device))
        yield piece, buffer[slot, 0, :count], buffer[slot, 1, :count]
        if arrived is not None:
            free[slot] = torch.cuda.current_stream(self._device).record_event()


def attend_whole(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, meter: MemoryMeter, *, is_bounded: bool
) -> Tensor:
    """Return causal attention [batch, tokens, heads, dim] in one piece.

    is_bounded: flash-attn must not split K and V. A split is faster for few queries, but takes some megabytes.
    """
    if query.is_cuda:
        out, lse = _flash(query, keys, values, scale, is_causal=True, num_splits=int(is_bounded))
        meter.add(lse, "attention log-sum-exp")
        meter.remove(lse)
        return out
    return torch.stack([_attend(*each, scale, is_causal=True)[0] for each in zip(query, keys, values, strict=True)])


def attend_pieces(
    query: Tensor,
    kv: Iterable[tuple[Piece, Tensor, Tensor]],
    shape: AttentionShape,
    sizes: PieceSizes,
    out: Tensor,
    scale: float,
    meter: MemoryMeter,
) -> int:
    """Write causal attention [batch, tokens, heads, dim] piece by piece; return the number of pieces.

    kv: each piece with its K and V [tokens, kv_heads, dim]. Sums are in float32.
    """
    past = shape.key_tokens - shape.query_tokens
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    total = meter.allocate((sizes.query_tokens, *query.shape[2:]), wide, query.device, "attention sums")
    total_lse = meter.allocate((sizes.query_tokens, query.shape[2]), wide, query.device, "attention log-sum-exps")
    count = 0
    for piece, keys, values in kv:
        count += 1
        # Queries from `border` on see every key of the piece, those before it a part; the first may see none.
        border = min(max(piece.last_key - past - 1, piece.first_query), piece.last_query)
        first = max(piece.first_query, piece.first_key - past)
        for start, stop, is_causal in ((first, border, True), (border, piece.last_query, False)):
            if start >= stop:
                continue
            part_keys, part_values = keys, values
            if is_causal:  # the last of these queries sees no key after itself
                seen = past + stop - piece.first_key
                part_keys, part_values = keys[:seen], values[:seen]
            part, lse = _attend(query[piece.item, start:stop], part_keys, part_values, scale, is_causal=is_causal)
            meter.add(part, "attention piece")
            meter.add(lse, "attention piece")
            rows = slice(start - piece.first_query, stop - piece.first_query)
            if piece.is_first:
                total[rows], total_lse[rows] = part, lse
            else:
                merge_in_place(total[rows], total_lse[rows], part, lse)
            meter.remove(part, lse)
            del part, lse
        if piece.is_last:
            out[piece.item, piece.first_query : piece.last_query] = total[: piece.last_query - piece.first_query]
    meter.remove(total, total_lse)
    return count


def iter_resident(
    keys: Tensor, values: Tensor, shape: AttentionShape, sizes: PieceSizes
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Yield each piece with views of its K and V."""
    for piece in iter_pieces(shape, sizes):
        span = slice(piece.first_key, piece.last_key)
        yield piece, keys[piece.item, span], values[piece.item, span]


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attend query [T, heads, dim] to keys [L, kv_heads, dim]; causal with the queries at the end.

    Returns ([T, heads, dim], log-sum-exp [T, heads], which may be strided).
    """
    if query.is_cuda:
        out, lse = _flash(query[None], keys[None], values[None], scale, is_causal=is_causal, num_splits=1)
        return out[0], lse[0].transpose(0, 1)
    past = keys.shape[0] - query.shape[0]
    if not is_causal or not past:
        return cpu_attention(query, keys, values, scale, is_causal=is_causal)
    # torch's kernel aligns its mask to the first key, so the queries' own keys need a call of their own.
    before, before_lse = cpu_attention(query, keys[:past], values[:past], scale)
    out, lse = cpu_attention(query, keys[past:], values[past:], scale, is_causal=True)
    total, total_lse = before.to(lse.dtype).contiguous(), before_lse.contiguous()
    merge_in_place(total, total_lse, out, lse)
    return total.to(query.dtype), total_lse


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, *, is_causal: bool, num_splits: int
) -> tuple[Tensor, Tensor]:
    """Return ([n, T, heads, dim], log-sum-exp [n, heads, T]); with num_splits=1 nothing else is allocated."""
    flash: Any = importlib.import_module("flash_attn")
    out, lse = flash.flash_attn_with_kvcache(
        query,
        keys,
        values,
        softmax_scale=scale,
        causal=is_causal,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return out, lse
