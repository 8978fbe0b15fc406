"""bfloat16 blocks in 11 to 12 bits a value: the compressed format of the warm tier, made for a GPU.

Inside one channel (one dim of one head, K or V of one layer) the values of a block's tokens have nearly one scale.
So most exponents lie in the window of seven below the channel's largest: 3 bits name the place in the window, and
the rare others are escapes, whose exponents follow in a list. Sign and mantissa stay as they are. For normal
values that is 11.25 bits, a ratio of 1.42 where the order-0 entropy of the exponents would allow 1.50; but every
value has a place that is known beforehand, so a GPU decodes at the speed of its memory.

A block is cut into the groups of layers that are promoted together; each has a section of its own:

    escapes     uint32 and 12 bytes of zeros: how many escapes follow
    starts      uint32 a tile: how many escapes the tiles before it have
    bases       a byte for each channel of each run: the largest exponent
    rest        a byte a value: sign above the seven bits of mantissa
    codes       3 bits a value, as three planes of bits for each tile
    exponents   a byte for each escape

A tile is TILE consecutive values of one run (the last one of a run may be shorter and is padded). This module has the
sizes and the definition in numpy; kernels/windows.py is the same on a GPU. Everything here is torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError
from tierkv.storage.codec import Bytes, merge_planes, take_exponent, take_rest
from tierkv.values.layout import BlockLayout

__all__ = ["ESCAPE", "HEADER_BYTES", "TILE", "Section", "WindowFormat"]

TILE = 4096
ESCAPE = 7
HEADER_BYTES = 16
_MAX_ESCAPES = 8  # one value in eight; a block with more escapes does not fit its slot and is not kept compressed
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Where one group of layers lies in a compressed block, and its parts in the section. Units are bytes.

    tiles: [n, 5] int32: first value in the block, first value in its run, base of its run (in `bases`), channels
    of the run, values of the tile.
    """

    offset: int
    tiles: npt.NDArray[np.int32]
    bases_at: int
    rest_at: int
    codes_at: int
    escapes_at: int
    max_escapes: int

    @property
    def num_tiles(self) -> int:
        """How many tiles the group has."""
        return len(self.tiles)

    @property
    def capacity_bytes(self) -> int:
        """Bytes that the section has room for."""
        return self.escapes_at + self.max_escapes


class WindowFormat:
    """The format for one layout and its groups of layers. slot_bytes: of a compressed block, 0.75 of the raw block's.

    Raises ConfigError for a layout that is not of bfloat16.
    """

    def __init__(self, layout: BlockLayout, layer_groups: Sequence[int]) -> None:
        if layout.dtype != "bfloat16":
            raise ConfigError(f"only blocks of bfloat16 can be kept compressed in the warm tier, not {layout.dtype}")
        self.layout = layout
        self.layer_groups: tuple[int, ...] = tuple(layer_groups)
        self.sections: tuple[Section, ...] = tuple(self._make_sections())

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot: every section at its largest."""
        last = self.sections[-1]
        return _aligned(last.offset + last.capacity_bytes)

    def section_bytes(self, slot: Bytes, group: int) -> int:
        """Return how many bytes of a compressed block's section have to be copied."""
        section = self.sections[group]
        return section.escapes_at + int(slot[section.offset : section.offset + 4].view("<u4")[0])

    def compress(self, block: Bytes, slot: Bytes, *, num_tokens: int | None = None) -> bool:
        """Write a block into a slot; return False if it does not fit (the slot's contents are undefined then).

        block: [layout.block_bytes] uint8; its first `num_tokens` tokens are kept, the others become undefined.
        """
        count = self.layout.block_size if num_tokens is None else num_tokens
        words = block.view(np.uint16)
        return all(self._compress_section(words, slot, section, count) for section in self.sections)

    def decompress(self, slot: Bytes, block: Bytes) -> None:
        """Write the block that a slot holds: the inverse of `compress`."""
        words = block.view(np.uint16)
        for group, section in enumerate(self.sections):
            part = slot[section.offset : section.offset + self.section_bytes(slot, group)]
            self._decompress_section(part, words, section)

    def _make_sections(self) -> list[Section]:
        sections: list[Section] = []
        offset = 0
        for first, last in pairwise((0, *self.layer_groups)):
            tiles, num_bases = self._tiles(self.layout.first_runs[first], self.layout.first_runs[last])
            bases_at = HEADER_BYTES + _aligned(4 * len(tiles), 16)
            rest_at = bases_at + _aligned(num_bases, 16)
            codes_at = rest_at + len(tiles) * TILE
            section = Section(
                offset=offset,
                tiles=tiles,
                bases_at=bases_at,
                rest_at=rest_at,
                codes_at=codes_at,
                escapes_at=codes_at + len(tiles) * 3 * TILE // 8,
                max_escapes=len(tiles) * TILE // _MAX_ESCAPES,
            )
            sections.append(section)
            offset = _aligned(offset + section.capacity_bytes)
        return sections

    def _tiles(self, first_run: int, last_run: int) -> tuple[npt.NDArray[np.int32], int]:
        rows: list[tuple[int, int, int, int, int]] = []
        base = 0
        for run in self.layout.runs[first_run:last_run]:
            channels = run.token_bytes // 2
            count = channels * self.layout.block_size
            for start in range(0, count, TILE):
                rows.append((run.offset_bytes // 2 + start, start, base, channels, min(TILE, count - start)))
            base += channels
        return np.array(rows, dtype=np.int32), base

    def _compress_section(self, words: npt.NDArray[np.uint16], slot: Bytes, section: Section, num_tokens: int) -> bool:
        part = slot[section.offset : section.offset + section.capacity_bytes]
        part[: section.escapes_at] = 0
        starts = part[HEADER_BYTES:].view("<u4")
        escapes: list[Bytes] = []
        num_escapes = 0
        for tile, (value, at, base, channels, count) in enumerate(section.tiles.tolist()):
            bases = part[section.bases_at + base : section.bases_at + base + channels]
            if at == 0:
                kept = words[value : value + channels * num_tokens].reshape(num_tokens, channels)
                np.copyto(bases, ((kept >> 7) & 0xFF).max(axis=0).astype(np.uint8))
            exponent, rest = np.empty(count, np.uint8), np.empty(count, np.uint8)
            scratch = np.empty(count, np.uint16)
            take_exponent(words[value : value + count], exponent, scratch)
            take_rest(words[value : value + count], rest, scratch)
            is_kept = np.arange(at, at + count) < channels * num_tokens
            below = bases[np.arange(at, at + count) % channels].astype(np.int32) - exponent
            codes = np.where(is_kept, np.minimum(below, ESCAPE), 0).astype(np.uint8)
            part[section.rest_at + tile * TILE :][:count] = np.where(is_kept, rest, 0)
            _write_planes(codes, part[section.codes_at + tile * 3 * TILE // 8 :])
            starts[tile] = num_escapes
            escapes.append(exponent[codes == ESCAPE])
            num_escapes += escapes[-1].size
        if num_escapes > section.max_escapes:
            return False
        part[section.escapes_at : section.escapes_at + num_escapes] = np.concatenate(escapes)
        part[:4].view("<u4")[0] = num_escapes
        return True

    def _decompress_section(self, part: Bytes, words: npt.NDArray[np.uint16], section: Section) -> None:
        starts = part[HEADER_BYTES : section.bases_at].view("<u4")
        for tile, (value, at, base, channels, count) in enumerate(section.tiles.tolist()):
            bases = part[section.bases_at + base : section.bases_at + base + channels]
            codes = _read_planes(part[section.codes_at + tile * 3 * TILE // 8 :])[:count]
            exponent = bases[np.arange(at, at + count) % channels] - codes
            is_escape = codes == ESCAPE
            begin = section.escapes_at + int(starts[tile])
            exponent[is_escape] = part[begin : begin + int(is_escape.sum())]
            rest = part[section.rest_at + tile * TILE :][:count]
            merge_planes(exponent, rest, words[value : value + count], np.empty(count, np.uint16))


def _write_planes(codes: Bytes, out: Bytes) -> None:
    """Write the three planes of one tile: bit i of byte j belongs to value 8 j + i."""
    padded = np.zeros(TILE, np.uint8)
    padded[: codes.size] = codes
    for bit in range(3):
        out[bit * TILE // 8 : (bit + 1) * TILE // 8] = np.packbits((padded >> bit) & 1, bitorder="little")


def _read_planes(planes: Bytes) -> Bytes:
    codes = np.zeros(TILE, np.uint8)
    for bit in range(3):
        codes |= np.unpackbits(planes[bit * TILE // 8 : (bit + 1) * TILE // 8], bitorder="little") << np.uint8(bit)
    return codes


def _aligned(size_bytes: int, alignment_bytes: int = _ALIGNMENT_BYTES) -> int:
    return -(-size_bytes // alignment_bytes) * alignment_bytes
