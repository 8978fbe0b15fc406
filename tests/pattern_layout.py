"""The layout of the tests' smallest blocks, where torch is not wanted."""

from __future__ import annotations

from tierkv.values.layout import BlockLayout

__all__ = ["tiny_layout"]


def tiny_layout(*, block_size: int = 4, dtype: str = "float32") -> BlockLayout:
    """Two layers of one head of four elements."""
    return BlockLayout.uniform(num_layers=2, block_size=block_size, kv_heads=1, head_dim=4, dtype=dtype)
