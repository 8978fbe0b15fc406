"""The layout of a block's bytes, the same in every tier.

A block is contiguous: layer after layer, K `[block_size, kv_heads, k_dim]`, then V `[block_size, kv_heads, v_dim]`.
For equal layers that is `[layers, 2, block_size, kv_heads, head_dim]`. Layers may differ in heads and dims, and K from
V; the offsets say where each begins. A layer of multi-latent attention (MLA) may hold the latent in place of K and V:
one plane `[block_size, latent_dim]`, of which the rotated part of the keys is the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from tierkv.errors import ConfigError

__all__ = ["DTYPE_BYTES", "BlockLayout", "LayerLayout", "Run"]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}


_SIZE_LIMIT = (1 << 24) - 1
_LAYER_LIMIT = 4096
_BLOCK_LIMIT_BYTES = 1 << 40


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _SIZE_LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """Heads and dims of one attention layer. `k_dim` and `v_dim` differ in MLA.

    A `v_dim` of 0 means that the layer has one plane, the latent of MLA, as K of one head.
    """

    kv_heads: int
    k_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        if self.is_latent and self.kv_heads == 1 and _is_size(self.k_dim):
            return
        for value in (self.kv_heads, self.k_dim, self.v_dim):
            if not _is_size(value):
                raise ConfigError(
                    f"a layer's heads and dims must be whole numbers from 1 to {_SIZE_LIMIT}; v_dim 0 wants 1 head"
                )

    @classmethod
    def of_latent(cls, latent_dim: int) -> LayerLayout:
        """Return the layout of an MLA layer that holds the latent, `latent_dim` numbers a token."""
        return cls(kv_heads=1, k_dim=latent_dim, v_dim=0)

    @property
    def is_latent(self) -> bool:
        """Whether the layer holds the latent of MLA in place of K and V."""
        return type(self.v_dim) is int and self.v_dim == 0

    @property
    def plane_dims(self) -> tuple[int, ...]:
        """The dims of the layer's planes: of K and V, or of the latent alone."""
        return (self.k_dim,) if self.is_latent else (self.k_dim, self.v_dim)


@dataclass(frozen=True, slots=True)
class Run:
    """One plane inside a block, a layer's K, V or latent: `block_size` tokens of `token_bytes` from `offset_bytes`.

    A token has `heads` times `dim` numbers of `dtype`. is_key: K or the latent, not V.
    """

    offset_bytes: int
    token_bytes: int
    heads: int
    dim: int
    dtype: str
    is_key: bool


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Shape and dtype of a block. Equal layouts hold interchangeable bytes.

    >>> layout = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
    >>> layout.block_bytes  # 2 layers, K and V, 4 tokens, 1 head, 8 numbers of 4 bytes
    512
    """

    block_size: int
    dtype: str
    layers: tuple[LayerLayout, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not _is_size(self.block_size):
            raise ConfigError(f"block_size must be a whole number from 1 to {_SIZE_LIMIT}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}")
        if not self.layers:
            raise ConfigError("a layout needs at least one layer")
        if len(self.layers) > _LAYER_LIMIT or self.block_bytes > _BLOCK_LIMIT_BYTES:
            raise ConfigError(f"a layout has at most {_LAYER_LIMIT} layers and {_BLOCK_LIMIT_BYTES} bytes a block")

    @classmethod
    def uniform(cls, *, num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: str) -> BlockLayout:
        """Return the layout of a model with equal layers, whose K and V have the same dim."""
        layer = LayerLayout(kv_heads=kv_heads, k_dim=head_dim, v_dim=head_dim)
        return cls(block_size=block_size, dtype=dtype, layers=(layer,) * num_layers)

    @property
    def num_layers(self) -> int:
        """The number of attention layers."""
        return len(self.layers)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The contiguous runs of a block: K and V of layer 0, of layer 1, ...; one run for a layer's latent."""
        runs: list[Run] = []
        offset = 0
        for layer in self.layers:
            for plane, dim in enumerate(layer.plane_dims):
                token_bytes = layer.kv_heads * dim * self.item_bytes
                runs.append(Run(offset, token_bytes, layer.kv_heads, dim, self.dtype, plane == 0))
                offset += token_bytes * self.block_size
        return tuple(runs)

    @cached_property
    def first_runs(self) -> tuple[int, ...]:
        """For each layer the number of its first run, and at the end the number of all runs."""
        return (0, *accumulate(len(layer.plane_dims) for layer in self.layers))

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """The byte at which each layer begins, and at the end the bytes of the block."""
        return (*(self.runs[first].offset_bytes for first in self.first_runs[:-1]), self.block_bytes)

    @property
    def is_latent(self) -> bool:
        """Whether every layer holds the latent of MLA in place of K and V."""
        return all(layer.is_latent for layer in self.layers)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers: packed without gaps, n tokens take n times as many."""
        return sum(run.token_bytes for run in self.runs)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one whole block."""
        return self.token_bytes * self.block_size

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for the namespace and for humans."""
        return {
            "block_size": self.block_size,
            "dtype": self.dtype,
            "layers": [[layer.kv_heads, layer.k_dim, layer.v_dim] for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> BlockLayout:
        """Return the layout that `to_dict` described. Raises ConfigError for an invalid one."""
        try:
            layers = tuple(LayerLayout(kv_heads=h, k_dim=k, v_dim=v) for h, k, v in value["layers"])
            return cls(block_size=value["block_size"], dtype=value["dtype"], layers=layers)
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"not a block layout: {exc}") from exc
