"""The element-wise parts of a decoder layer: fused Triton kernels on a GPU, Transformers' own operations elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

_kernels: ModuleType | None
try:
    from tierkv.kernels import decoder as _decoder_kernels

    _kernels = _decoder_kernels
except ModuleNotFoundError:  # triton has no wheel for this machine
    _kernels = None

__all__ = ["Norm", "Places", "add_norm", "gate", "has_kernels", "heads_of"]


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: its weight and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(slots=True)
class Places:
    """Where K and V of new tokens are written: pages of one layer, and of each token the block id and the offset."""

    keys: Tensor
    values: Tensor
    block_ids: Tensor
    offsets: Tensor


def has_kernels() -> bool:
    """Return whether the fused kernels can be imported on this machine."""
    return _kernels is not None


def add_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of x + residual, and the sum. x, residual: [T, hidden]; both may be overwritten."""
    if x.is_cuda and _kernels is not None:
        normed = torch.empty_like(x)
        _kernels.add_rms_norm(x, residual, norm.weight, norm.epsilon, normed)
        return normed, x if residual is None else residual
    total = x if residual is None else residual + x
    return _rms_norm(total, norm), total


def heads_of(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    norms: tuple[Norm, Norm] | None,
    places: Places | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [T, heads, dim], keys and values [T, kv_heads, dim] of each token, normalised and rotated.

    qkv: [T, (heads + 2 * kv_heads) * dim]. rotary: cos and sin, [T, dim]. shape: heads, kv_heads, dim. norms: of the
    heads of queries and keys. places: K and V are written there too, unless it is None.
    """
    heads, kv_heads, dim = shape
    count = qkv.shape[0]
    value = qkv[:, (heads + kv_heads) * dim :].view(count, kv_heads, dim)
    if qkv.is_cuda and _kernels is not None:
        new_query, new_key = qkv.new_empty(count, heads, dim), qkv.new_empty(count, kv_heads, dim)
        _kernels.rotate_heads(
            qkv,
            *rotary,
            new_query,
            new_key,
            norms=_kernels.HeadNorms(norms[0].weight, norms[1].weight, norms[0].epsilon) if norms else None,
            slots=_kernels.PageSlots(places.keys, places.values, places.block_ids, places.offsets) if places else None,
        )
        return new_query, new_key, value
    query = qkv[:, : heads * dim].view(count, heads, dim)
    key = qkv[:, heads * dim : (heads + kv_heads) * dim].view(count, kv_heads, dim)
    if norms:
        query, key = _rms_norm(query, norms[0]), _rms_norm(key, norms[1])
    cos, sin = (each.unsqueeze(1) for each in rotary)
    query, key = (each * cos + _half_turned(each) * sin for each in (query, key))
    if places:
        places.keys[places.block_ids, places.offsets] = key
        places.values[places.block_ids, places.offsets] = value
    return query, key, value


def gate(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, width], of gate_up [T, 2 * width]."""
    if gate_up.is_cuda and _kernels is not None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        _kernels.silu_and_multiply(gate_up, out)
        return out
    opened, up = gate_up.chunk(2, dim=-1)
    return functional.silu(opened) * up


def _rms_norm(x: Tensor, norm: Norm) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    return norm.weight * wide.to(x.dtype)


def _half_turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)
