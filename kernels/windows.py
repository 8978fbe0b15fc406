"""Compress blocks of bfloat16 in the hot pool into the warm tier's format and back, on the GPU.

The format is defined in storage/windows.py, in numpy; these kernels read and write the same bytes. Decoding a block
costs a GPU about a tenth of the time that its copy over PCIe takes, and coding it about a fifth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous
from tierkv.storage.windows import ESCAPE, HEADER_BYTES, TILE, Section

__all__ = ["compress_section", "decompress_section", "section_tiles"]

_ESCAPE = tl.constexpr(ESCAPE)
_HEADER_WORDS = tl.constexpr(HEADER_BYTES // 4)


def section_tiles(section: Section, device: torch.device | str) -> Tensor:
    """Return the section's table of tiles where the kernels want it: [n, 5] int32 on the device."""
    return torch.from_numpy(section.tiles).to(device)


def compress_section(
    pool: Tensor, block_ids: Tensor, num_tokens: Tensor, section: Section, tiles: Tensor, out: Tensor, totals: Tensor
) -> None:
    """Write one section of several blocks.

    pool: [num_blocks, values] bfloat16, contiguous. block_ids: [n] int64; num_tokens: [n] int32, tokens of each block
    that count. tiles: from `section_tiles`. out: [n, stride] uint8, contiguous, stride a multiple of 4 that holds the
    section: written up to its escapes, of which those beyond `section.max_escapes` are lost; the uint32 in front says
    how many there are. totals: [n] int32, the same numbers; in page-locked CPU memory they arrive there without a copy,
    which would wait behind large copies. All else on one device. Asynchronous on the current
    stream; raises ShapeError before launching.
    """
    _check(pool, block_ids, section, tiles, out)
    require(num_tokens.shape == block_ids.shape and num_tokens.dtype == torch.int32, "num_tokens must be [n] int32")
    require(totals.shape == block_ids.shape and totals.dtype == torch.int32, "totals must be [n] int32")
    require(totals.device == pool.device or totals.is_pinned(), "totals must lie on the device or be page-locked")
    count = block_ids.shape[0]
    if not count:
        return
    words, values = out.view(torch.int32), pool.view(torch.int16)
    grid = (section.num_tiles, count)
    widest = int(section.tiles[:, 3].max())
    _write_bases[(section.num_tiles, triton.cdiv(widest, 128), count)](
        values, block_ids, num_tokens, tiles, out, pool.shape[1], out.shape[1], section.bases_at, CHANNELS=128, ROWS=32
    )
    _write_codes[grid](
        values,
        block_ids,
        num_tokens,
        tiles,
        out,
        words,
        pool.shape[1],
        out.shape[1],
        section.bases_at,
        section.rest_at,
        section.codes_at,
        SIZE=TILE,
        num_warps=8,
    )
    _sum_starts[(count,)](words, totals, out.shape[1] // 4, section.num_tiles, STEP=1024)
    _write_escapes[grid](
        values,
        block_ids,
        tiles,
        out,
        words,
        pool.shape[1],
        out.shape[1],
        section.codes_at,
        section.escapes_at,
        section.max_escapes,
        SIZE=TILE,
        num_warps=8,
    )


def decompress_section(sections: Tensor, block_ids: Tensor, section: Section, tiles: Tensor, pool: Tensor) -> None:
    """Write one section of several blocks into the pool: the inverse of `compress_section`, same shapes."""
    _check(pool, block_ids, section, tiles, sections)
    count = block_ids.shape[0]
    if not count:
        return
    _decode[(section.num_tiles, count)](
        sections,
        sections.view(torch.int32),
        block_ids,
        tiles,
        pool.view(torch.int16),
        pool.shape[1],
        sections.shape[1],
        section.bases_at,
        section.rest_at,
        section.codes_at,
        section.escapes_at,
        SIZE=TILE,
        num_warps=8,
    )


def _check(pool: Tensor, block_ids: Tensor, section: Section, tiles: Tensor, sections: Tensor) -> None:
    require_contiguous(pool=pool, block_ids=block_ids, tiles=tiles, sections=sections)
    require(pool.dim() == 2 and pool.dtype == torch.bfloat16, "pool must be [num_blocks, values] bfloat16")
    require(block_ids.dim() == 1 and block_ids.dtype == torch.int64, "block_ids must be [n] int64")
    require(tuple(tiles.shape) == section.tiles.shape and tiles.dtype == torch.int32, "tiles are not the section's")
    require(sections.dim() == 2 and sections.dtype == torch.uint8, "sections must be [n, stride] uint8")
    require(sections.shape[0] == block_ids.shape[0], "there must be one section for each block id")
    require(sections.shape[1] % 4 == 0, "the stride of sections must be a multiple of 4")
    require(sections.shape[1] >= section.capacity_bytes, "the stride of sections is less than the section's capacity")
    require(len({t.device for t in (pool, block_ids, tiles, sections)}) == 1, "tensors lie on several devices")


@triton.jit
def _write_bases(
    values, block_ids, num_tokens, tiles, out, pool_stride, stride, bases_at, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):
    """The largest exponent of each channel of a run; only the programs of a run's first tile work."""
    tile, part, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(tiles + tile * 5)
    at = tl.load(tiles + tile * 5 + 1)
    base = tl.load(tiles + tile * 5 + 2)
    channels = tl.load(tiles + tile * 5 + 3)
    if at == 0:
        source = values + tl.load(block_ids + item) * pool_stride + first
        tokens = tl.load(num_tokens + item)
        channel = part * CHANNELS + tl.arange(0, CHANNELS)
        largest = tl.zeros((CHANNELS,), dtype=tl.int32)
        for start in range(0, tokens, ROWS):
            token = start + tl.arange(0, ROWS)
            inside = (token[:, None] < tokens) & (channel[None, :] < channels)
            bits = tl.load(source + token[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.int32)
            largest = tl.maximum(largest, tl.max((bits >> 7) & 0xFF, axis=0))
        tl.store(out + item * stride + bases_at + base + channel, largest.to(tl.uint8), mask=channel < channels)


@triton.jit
def _write_codes(
    values,
    block_ids,
    num_tokens,
    tiles,
    out,
    words,
    pool_stride,
    stride,
    bases_at,
    rest_at,
    codes_at,
    SIZE: tl.constexpr,
):
    """Codes and rest of one tile; how many escapes it has goes where its start will be."""
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + tile * 5)
    at = tl.load(tiles + tile * 5 + 1)
    base = tl.load(tiles + tile * 5 + 2)
    channels = tl.load(tiles + tile * 5 + 3)
    count = tl.load(tiles + tile * 5 + 4)
    own = out + item * stride
    i = tl.arange(0, SIZE)
    bits = tl.load(values + tl.load(block_ids + item) * pool_stride + first + i, mask=i < count, other=0).to(tl.int32)
    is_kept = (i < count) & (at + i < channels * tl.load(num_tokens + item))
    largest = tl.load(own + bases_at + base + (at + i) % channels, mask=i < count, other=0).to(tl.int32)
    code = tl.where(is_kept, tl.minimum(largest - ((bits >> 7) & 0xFF), _ESCAPE), 0)
    rest = tl.where(is_kept, ((bits >> 8) & 0x80) | (bits & 0x7F), 0)
    tl.store(own + rest_at + tile * SIZE + i, rest.to(tl.uint8))
    eights = tl.reshape(code, (SIZE // 8, 8))
    place = tl.arange(0, 8)[None, :]
    byte = codes_at + tile * (3 * SIZE // 8) + tl.arange(0, SIZE // 8)
    for bit in tl.static_range(3):
        plane = tl.sum(((eights >> bit) & 1) << place, axis=1)
        tl.store(own + byte + bit * (SIZE // 8), plane.to(tl.uint8))
    tl.store(words + item * (stride // 4) + _HEADER_WORDS + tile, tl.sum((code == _ESCAPE).to(tl.int32), axis=0))


@triton.jit
def _sum_starts(words, totals, stride_words, num_tiles, STEP: tl.constexpr):
    """Turn the tiles' counts into starts, and write the total in front and among the totals."""
    own = words + tl.program_id(0).to(tl.int64) * stride_words
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_tiles, STEP):
        tile = first + tl.arange(0, STEP)
        counts = tl.load(own + _HEADER_WORDS + tile, mask=tile < num_tiles, other=0)
        tl.store(own + _HEADER_WORDS + tile, total + tl.cumsum(counts, axis=0) - counts, mask=tile < num_tiles)
        total += tl.sum(counts, axis=0)
    tl.store(totals + tl.program_id(0), total)
    head = tl.arange(0, _HEADER_WORDS)
    tl.store(own + head, tl.where(head == 0, total, 0))


@triton.jit
def _write_escapes(
    values,
    block_ids,
    tiles,
    out,
    words,
    pool_stride,
    stride,
    codes_at,
    escapes_at,
    max_escapes,
    SIZE: tl.constexpr,
):
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + tile * 5)
    count = tl.load(tiles + tile * 5 + 4)
    own = out + item * stride
    i = tl.arange(0, SIZE)
    is_escape = _load_codes(own + codes_at + tile * (3 * SIZE // 8), i, SIZE) == _ESCAPE
    source = values + tl.load(block_ids + item) * pool_stride + first
    bits = tl.load(source + i, mask=is_escape & (i < count), other=0).to(tl.int32)
    place = tl.load(words + item * (stride // 4) + _HEADER_WORDS + tile) + tl.cumsum(is_escape.to(tl.int32), axis=0) - 1
    tl.store(own + escapes_at + place, ((bits >> 7) & 0xFF).to(tl.uint8), mask=is_escape & (place < max_escapes))


@triton.jit
def _decode(
    sections,
    words,
    block_ids,
    tiles,
    values,
    pool_stride,
    stride,
    bases_at,
    rest_at,
    codes_at,
    escapes_at,
    SIZE: tl.constexpr,
):
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + tile * 5)
    at = tl.load(tiles + tile * 5 + 1)
    base = tl.load(tiles + tile * 5 + 2)
    channels = tl.load(tiles + tile * 5 + 3)
    count = tl.load(tiles + tile * 5 + 4)
    own = sections + item * stride
    i = tl.arange(0, SIZE)
    code = _load_codes(own + codes_at + tile * (3 * SIZE // 8), i, SIZE)
    is_escape = code == _ESCAPE
    start = tl.load(words + item * (stride // 4) + _HEADER_WORDS + tile)
    place = start + tl.cumsum(is_escape.to(tl.int32), axis=0) - 1
    escaped = tl.load(own + escapes_at + place, mask=is_escape, other=0).to(tl.int32)
    largest = tl.load(own + bases_at + base + (at + i) % channels, mask=i < count, other=0).to(tl.int32)
    exponent = tl.where(is_escape, escaped, largest - code)
    rest = tl.load(own + rest_at + tile * SIZE + i).to(tl.int32)
    bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    tl.store(values + tl.load(block_ids + item) * pool_stride + first + i, bits.to(tl.int16), mask=i < count)


@triton.jit
def _load_codes(planes, i, SIZE: tl.constexpr):
    """The codes of a tile: bit b of value 8 j + k is bit k of byte j of plane b."""
    code = tl.zeros((SIZE,), dtype=tl.int32)
    for bit in tl.static_range(3):
        byte = tl.load(planes + bit * (SIZE // 8) + i // 8).to(tl.int32)
        code |= ((byte >> (i % 8)) & 1) << bit
    return code
