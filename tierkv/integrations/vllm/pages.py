"""The engine's KV tensors as pages that the block store copies, and the layout of a block that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from tierkv.errors import UnsupportedModelError
from tierkv.values.layout import DTYPE_BYTES, BlockLayout, LayerLayout

if TYPE_CHECKING:
    import torch

__all__ = ["LEFT_OUT", "EnginePages"]

LEFT_OUT = -1
"""Stands for an engine's block that is not loaded."""

_FP8_BYTES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class EnginePages:
    """The distinct KV tensors of an engine, each [pages, heads, tokens, content] or another shape behind dim 0.

    vLLM keeps K and V of a head in one row: `content` is K and V, one behind the other. The layout of a block therefore
    names halves of the content K and V; the bytes are copied as they lie. pages_per_engine_block: kernels may want
    smaller pages than the scheduler's blocks. layer_of: layer name -> its number here; layers may share a tensor.
    """

    tensors: list[torch.Tensor]
    layer_of: dict[str, int]
    engine_block_size: int
    pages_per_engine_block: int
    layout: BlockLayout

    @classmethod
    def of(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        num_engine_blocks: int,
        engine_block_size: int,
        block_tokens: int,
        cache_dtype: str = "auto",
    ) -> EnginePages:
        """Read what vLLM gives to `register_kv_caches`. cache_dtype: vLLM's name, which says what bytes of fp8 are.

        Raises UnsupportedModelError for tensors that are not pages of whole tokens.
        """
        tensors: list[torch.Tensor] = []
        layer_of: dict[str, int] = {}
        known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
        for name, tensor in kv_caches.items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
            if place not in known:
                known[place] = len(tensors)
                tensors.append(tensor)
            layer_of[name] = known[place]
        if not tensors:
            raise UnsupportedModelError("the engine has no KV cache: its model has no attention layers")
        counts = {tensor.shape[0] for tensor in tensors}
        if len(counts) != 1 or next(iter(counts)) % num_engine_blocks:
            raise UnsupportedModelError(f"layers of {sorted(counts)} pages do not divide {num_engine_blocks} blocks")
        ratio = next(iter(counts)) // num_engine_blocks
        if engine_block_size % ratio:
            raise UnsupportedModelError(f"{ratio} pages do not divide blocks of {engine_block_size} tokens")
        names = {_dtype_name(tensor, cache_dtype) for tensor in tensors}
        if len(names) != 1:
            raise UnsupportedModelError(f"layers keep their KV as {', '.join(sorted(names))}; one dtype is supported")
        layers = [_layer(tensor, engine_block_size // ratio) for tensor in tensors]
        layout = BlockLayout(block_size=block_tokens, dtype=names.pop(), layers=tuple(layers))
        return cls(tensors, layer_of, engine_block_size, ratio, layout)

    @property
    def pages_per_block(self) -> int:
        """Pages of a stored block, in each tensor."""
        return self.layout.block_size // self.engine_block_size * self.pages_per_engine_block

    def describe(self) -> dict[str, Any]:
        """Return what the order of a page's bytes hangs on: shapes, the order of the dims in memory, the layers."""
        return {
            "page_tokens": self.engine_block_size // self.pages_per_engine_block,
            "pages": [[list(tensor.shape[1:]), _order(tensor)] for tensor in self.tensors],
            "layers": self.layer_of,
        }

    def pages_of(self, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the pages of engine's blocks, LEFT_OUT for those that are left out."""
        ratio = self.pages_per_engine_block
        if ratio == 1:
            return [list(ids) for ids in blocks]
        return [
            [LEFT_OUT if block == LEFT_OUT else block * ratio + i for block in ids for i in range(ratio)]
            for ids in blocks
        ]


def _dtype_name(tensor: torch.Tensor, cache_dtype: str) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    name = _FP8_BYTES.get(cache_dtype, name) if name == "uint8" else name
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"KV of dtype {name} is not supported")
    return name


def _layer(tensor: torch.Tensor, page_tokens: int) -> LayerLayout:
    shape = tuple(tensor.shape[1:])
    items = prod(shape)
    heads = shape[0] if len(shape) == 3 else 1
    if items % page_tokens or items // page_tokens % heads or items // page_tokens // heads < 2:
        raise UnsupportedModelError(f"a page of shape {shape} does not hold {page_tokens} whole tokens")
    content = items // page_tokens // heads
    return LayerLayout(kv_heads=heads, k_dim=content // 2, v_dim=content - content // 2)


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the dims of a page from the outermost to the innermost in memory; dims of one item do not matter."""
    dims = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] > 1]
    strides = tensor.stride()
    return sorted(dims, key=lambda dim: -strides[dim])
