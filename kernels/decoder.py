"""Fused element-wise parts of a decoder layer: residual add with RMSNorm, heads with rotary embedding, SiLU gate.

They round where Transformers' modules round (the residual sum, the normalised numbers, SiLU's result), so their results
are the plain model's up to the order of sums and the last bit of a rotation.
The launchers' checks make no text and no set unless they fail: an eager pass launches 150 of these kernels.
Source: the fused kernels of vLLM and liger-kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.errors import ShapeError
from tierkv.kernels.launch import require_contiguous

__all__ = ["HeadNorms", "PageSlots", "add_rms_norm", "normalise", "rotate_heads", "silu_and_multiply"]

_GATE_BLOCK = 1024


@dataclass(slots=True)
class HeadNorms:
    """RMSNorm of each head of queries and keys: two weights [head_dim], and the epsilon of both."""

    query: Tensor
    key: Tensor
    epsilon: float


@dataclass(slots=True)
class PageSlots:
    """Where K and V of T tokens are written.

    keys, values: [num_blocks, block_size, kv_heads, head_dim], the last dim contiguous. block_ids, offsets: [T] int64.
    """

    keys: Tensor
    values: Tensor
    block_ids: Tensor
    offsets: Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, normed: Tensor) -> None:
    """Add x to the residual, in place, and write the RMSNorm of the sum.

    x, normed: [T, hidden]; residual: the same, updated in place, or None if x is the whole sum. weight: [hidden].
    All contiguous, of one dtype and device. Asynchronous on the current stream. Raises ShapeError before a launch.
    """
    sums = x if residual is None else residual
    shape, dtype, device = x.shape, x.dtype, x.device
    if not (
        len(shape) == 2
        and normed.shape == shape
        and sums.shape == shape
        and weight.shape == shape[1:]
        and normed.dtype == sums.dtype == weight.dtype == dtype
        and normed.device == sums.device == weight.device == device
    ):
        named = {"x": x, "residual": sums, "weight": weight, "normed": normed}
        raise ShapeError(f"a norm of {_describe(named)} does not fit")
    require_contiguous(x=x, residual=sums, normed=normed, weight=weight)
    count, hidden = shape
    if not count:
        return
    block = _power_of_two(hidden)
    _add_rms_norm[(count,)](
        x,
        sums,
        weight,
        normed,
        hidden,
        epsilon,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def rotate_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    norms: HeadNorms | None = None,
    slots: PageSlots | None = None,
) -> None:
    """Normalise and rotate the heads of queries and keys; write K and V into pages too.

    qkv: [T, (heads + 2 * kv_heads) * head_dim], contiguous. cos, sin: [T, head_dim], contiguous, of the same dtype.
    query: [T, heads, head_dim], key: [T, kv_heads, head_dim], contiguous, written entirely. Asynchronous on the
    current stream. Raises ShapeError before a launch.
    """
    count, heads, dim = query.shape
    kv_heads = key.shape[1]
    dtype, device = qkv.dtype, qkv.device
    if not (
        key.shape == (count, kv_heads, dim)
        and qkv.shape == (count, (heads + 2 * kv_heads) * dim)
        and cos.shape == sin.shape == (count, dim)
        and dim % 2 == 0
        and query.dtype == key.dtype == cos.dtype == sin.dtype == dtype
        and query.device == key.device == cos.device == sin.device == device
    ):
        named = {"qkv": qkv, "query": query, "key": key, "cos": cos, "sin": sin}
        raise ShapeError(f"heads of {_describe(named)} do not fit")
    require_contiguous(qkv=qkv, cos=cos, sin=sin, query=query, key=key)
    if norms is not None:
        weights = (norms.query, norms.key)
        if not all(each.shape == (dim,) and each.dtype == dtype and each.device == device for each in weights):
            raise ShapeError(f"norms of {_describe({'query': norms.query, 'key': norms.key})} do not fit")
        require_contiguous(query_norm=norms.query, key_norm=norms.key)
    if slots is not None:
        keys, values, places = slots.keys, slots.values, (slots.block_ids, slots.offsets)
        if not (
            keys.shape[2:] == values.shape[2:] == (kv_heads, dim)
            and keys.stride() == values.stride()
            and keys.stride(3) == 1
            and keys.dtype == values.dtype == dtype
            and keys.device == values.device == device
            and all(each.shape == (count,) and each.dtype == torch.int64 for each in places)
        ):
            named = {"keys": keys, "values": values, "block_ids": slots.block_ids, "offsets": slots.offsets}
            raise ShapeError(f"pages of {_describe(named)} do not fit {kv_heads} heads of {dim}")
        require_contiguous(block_ids=slots.block_ids, offsets=slots.offsets)
    if not count:
        return
    per_program = next(size for size in (8, 4, 2, 1) if heads % size == 0 and kv_heads % size == 0)
    pages = slots or PageSlots(key, key, query, query)
    strides = slots.keys.stride()[:3] if slots else (0, 0, 0)
    _rotate_heads[(count, (heads + 2 * kv_heads) // per_program)](
        qkv,
        cos,
        sin,
        query,
        key,
        norms.query if norms else cos,
        norms.key if norms else cos,
        pages.keys,
        pages.values,
        pages.block_ids,
        pages.offsets,
        *strides,
        norms.epsilon if norms else 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF_BLOCK=_power_of_two(dim // 2),
        PER_PROGRAM=per_program,
        HAS_NORMS=norms is not None,
        HAS_PAGES=slots is not None,
        num_warps=min(4, per_program),
    )


def silu_and_multiply(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up.

    gate_up: [T, 2 * width]: gate, then up; out: [T, width]; contiguous, of one dtype and device. Asynchronous on the
    current stream. Raises ShapeError before a launch.
    """
    count, width = out.shape
    same = gate_up.dtype == out.dtype and gate_up.device == out.device
    if gate_up.shape != (count, 2 * width) or not same:
        raise ShapeError(f"a gate of {_describe({'gate_up': gate_up, 'out': out})} does not fit")
    require_contiguous(gate_up=gate_up, out=out)
    if not count or not width:
        return
    _silu_and_multiply[(count, -(-width // _GATE_BLOCK))](gate_up, out, width, BLOCK=_GATE_BLOCK, num_warps=4)


def _describe(named: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(each.shape)} {each.dtype} on {each.device}" for name, each in named.items())


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@triton.jit
def _add_rms_norm(x, sums, weight, normed, hidden, epsilon, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token."""
    start = tl.program_id(0).to(tl.int64) * hidden
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    numbers = tl.load(x + start + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(sums + start + at, mask=inside, other=0.0)
        numbers = (numbers.to(tl.float32) + before.to(tl.float32)).to(numbers.dtype)
        tl.store(sums + start + at, numbers, mask=inside)
    factors = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(normed + start + at, normalise(numbers, factors, hidden, epsilon), mask=inside)


@triton.jit
def normalise(numbers, factors, hidden, epsilon):
    """Return the RMSNorm of one row. factors: the weight; numbers outside of the row are zero."""
    wide = numbers.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + epsilon)
    scaled = (wide * scale).to(numbers.dtype).to(tl.float32)
    return (scaled * factors.to(tl.float32)).to(numbers.dtype)


@triton.jit
def _rotate_heads(
    qkv,
    cos,
    sin,
    query,
    key,
    query_weight,
    key_weight,
    key_pages,
    value_pages,
    block_ids,
    offsets,
    block_stride,
    slot_stride,
    head_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_PAGES: tl.constexpr,
):
    """One program per token and some heads, all of queries, all of keys or all of values; a head as its two halves."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PER_PROGRAM
    head = first + tl.arange(0, PER_PROGRAM)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head >= 0) & (half < DIM // 2)
    source = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM + half
    left_in = tl.load(source, mask=inside, other=0.0)
    right_in = tl.load(source + DIM // 2, mask=inside, other=0.0)
    left, right = left_in.to(tl.float32), right_in.to(tl.float32)
    is_query, is_value = first < HEADS, first >= HEADS + KV_HEADS
    if not is_value:
        if HAS_NORMS:
            weight = query_weight
            if not is_query:
                weight = key_weight
            mean = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / DIM
            scale = tl.rsqrt(mean + epsilon)[:, None]
            left = (left * scale).to(left_in.dtype).to(tl.float32)
            right = (right * scale).to(left_in.dtype).to(tl.float32)
            left *= tl.load(weight + half, mask=half < DIM // 2, other=0.0).to(tl.float32)
            right *= tl.load(weight + DIM // 2 + half, mask=half < DIM // 2, other=0.0).to(tl.float32)
            left, right = left.to(left_in.dtype).to(tl.float32), right.to(left_in.dtype).to(tl.float32)
        angle = token * DIM + half
        cos1 = tl.load(cos + angle, mask=half < DIM // 2, other=0.0).to(tl.float32)
        sin1 = tl.load(sin + angle, mask=half < DIM // 2, other=0.0).to(tl.float32)
        cos2 = tl.load(cos + angle + DIM // 2, mask=half < DIM // 2, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + angle + DIM // 2, mask=half < DIM // 2, other=0.0).to(tl.float32)
        turned = left * cos1 - right * sin1
        right = right * cos2 + left * sin2
        left = turned
    out_left, out_right = left.to(left_in.dtype), right.to(left_in.dtype)
    if is_query:
        target = query + token * (HEADS * DIM) + head * DIM + half
        tl.store(target, out_left, mask=inside)
        tl.store(target + DIM // 2, out_right, mask=inside)
    else:
        own = head - HEADS
        if is_value:
            own = head - (HEADS + KV_HEADS)
        else:
            target = key + token * (KV_HEADS * DIM) + own * DIM + half
            tl.store(target, out_left, mask=inside)
            tl.store(target + DIM // 2, out_right, mask=inside)
        if HAS_PAGES:
            place = tl.load(block_ids + token) * block_stride + tl.load(offsets + token) * slot_stride
            place += own * head_stride + half
            if is_value:
                tl.store(value_pages + place, out_left, mask=inside)
                tl.store(value_pages + place + DIM // 2, out_right, mask=inside)
            else:
                tl.store(key_pages + place, out_left, mask=inside)
                tl.store(key_pages + place + DIM // 2, out_right, mask=inside)


@triton.jit
def _silu_and_multiply(gate_up, out, width, BLOCK: tl.constexpr):
    """One program per token and BLOCK numbers."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + token * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(gate_up + token * 2 * width + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + token * width + at, (opened * up.to(tl.float32)).to(gate.dtype), mask=inside)
