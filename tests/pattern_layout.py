"""The layout of the tests' smallest blocks, where torch is not wanted."""

from __future__ import annotations

from collections.abc import Iterator

from tierkv.values.layout import BlockLayout

__all__ = ["iter_packed", "tiny_layout"]


def tiny_layout(*, block_size: int = 4, dtype: str = "float32") -> BlockLayout:
    """Two layers of one head of four elements."""
    return BlockLayout.uniform(num_layers=2, block_size=block_size, kv_heads=1, head_dim=4, dtype=dtype)


def iter_packed(layout: BlockLayout, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (offset in the block, offset in the packed bytes, length) for each run of a partial block."""
    packed = 0
    for run in layout.runs:
        length = run.token_bytes * num_tokens
        yield run.offset_bytes, packed, length
        packed += length
