"""Coded blocks: a reader leaves their zstd frames coded, and a GPU decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import zstandard

from tierkv.errors import CorruptBlockError
from tierkv.storage.codec import FRAME_BYTES, Bytes
from tierkv.values.layout import BlockLayout

__all__ = ["CODED_ID", "CodedBlock", "CodedLayout", "check_frames", "claimed_bytes", "coded_layout", "zero_frames"]

CODED_ID = 2  # exponent16 of storage/codecs.py, the one codec whose frames a GPU decodes
_TILE = 4096
_MAGIC = 0xFD2FB528
_MOST_HEADER_BYTES = 18
_MOST_WINDOW_LOG = 31


@dataclass(slots=True)
class CodedBlock:
    """Filled by a reader that leaves a whole block coded: the sizes of its frames. Empty: the block is decoded."""

    frame_sizes: tuple[int, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Length of the frames together; 0 where the block has been decoded."""
        return sum(self.frame_sizes)


class CodedLayout:
    """Where the frames of a whole block of 16-bit floats belong, for one layout.

    planes: [frames] first value of each coded frame's plane in the block; plane_bytes: [frames] how many values.
    is_rest: of all frames, which ones are a run's raw rest; rest_bytes: [runs] how long those are.
    tiles: [n, 4] int32 for the merge: first value in the block, first value in its run, run, values.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        is_rest: list[bool] = []
        planes: list[int] = []
        plane_bytes: list[int] = []
        for run in layout.runs:
            count = run.token_bytes * layout.block_size // 2
            starts = range(0, count, FRAME_BYTES // 2)
            planes += [run.offset_bytes // 2 + start for start in starts]
            plane_bytes += [min(FRAME_BYTES // 2, count - start) for start in starts]
            is_rest += [False] * len(starts) + [True]
        self.is_rest: npt.NDArray[np.bool_] = np.array(is_rest)
        self.rest_bytes: npt.NDArray[np.int64] = np.array(
            [run.token_bytes * layout.block_size // 2 for run in layout.runs], dtype=np.int64
        )
        self.planes: npt.NDArray[np.int64] = np.array(planes, dtype=np.int64)
        self.plane_bytes: npt.NDArray[np.int64] = np.array(plane_bytes, dtype=np.int64)

    @cached_property
    def tiles(self) -> npt.NDArray[np.int32]:
        """Tiles of at most 4,096 values of one run."""
        rows = [
            (
                run.offset_bytes // 2 + start,
                start,
                number,
                min(_TILE, run.token_bytes * self.layout.block_size // 2 - start),
            )
            for number, run in enumerate(self.layout.runs)
            for start in range(0, run.token_bytes * self.layout.block_size // 2, _TILE)
        ]
        return np.array(rows, dtype=np.int32)

    def parts(
        self, frame_sizes: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return offsets and sizes of the coded frames in the payload, and the offsets of the runs' raw rests."""
        sizes = np.array(frame_sizes, dtype=np.int64)
        offsets = np.cumsum(sizes) - sizes
        return offsets[~self.is_rest], sizes[~self.is_rest], offsets[self.is_rest]


def zero_frames(layout: CodedLayout) -> list[bytes]:
    """Return the frames of a block of zeros, in the order in which they lie in its payload."""
    rests = iter(run.token_bytes * layout.layout.block_size // 2 for run in layout.layout.runs)
    planes = iter(layout.plane_bytes.tolist())
    coded = {
        size: min(bytes(size), zstandard.compress(bytes(size)), key=len) for size in set(layout.plane_bytes.tolist())
    }
    return [bytes(next(rests)) if is_rest else coded[next(planes)] for is_rest in layout.is_rest.tolist()]


@lru_cache(maxsize=8)
def coded_layout(layout: BlockLayout) -> CodedLayout:
    """Return the CodedLayout of a layout; every read of a block needs it."""
    return CodedLayout(layout)


def check_frames(payload: Bytes, frame_sizes: Sequence[int], layout: CodedLayout) -> None:
    """Raise CorruptBlockError unless every frame of a payload claims the size that the layout expects.

    All at once: a call for each frame would keep the interpreter's lock from the threads that read other blocks.
    """
    if len(frame_sizes) != layout.is_rest.size:
        raise CorruptBlockError("the record's frames are not those of the layout")
    offsets, sizes, _ = layout.parts(frame_sizes)
    if not np.array_equal(np.array(frame_sizes, dtype=np.int64)[layout.is_rest], layout.rest_bytes):
        raise CorruptBlockError("a run's rest does not have as many bytes as the run has values")
    is_coded = sizes != layout.plane_bytes
    if not np.array_equal(claimed_bytes(payload, offsets[is_coded], sizes[is_coded]), layout.plane_bytes[is_coded]):
        raise CorruptBlockError("a frame that is not of the size of its plane")


def claimed_bytes(
    payload: Bytes, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return what size each zstd frame in a payload claims to have decoded; -1 for what claims none, or is no frame.

    offsets, sizes: [n] of the frames, inside the payload. Source: RFC 8878, section 3.1.1.1.
    """
    padded = np.zeros((sizes.size, _MOST_HEADER_BYTES), dtype=np.int64)
    at = offsets[:, None] + np.arange(_MOST_HEADER_BYTES)
    is_inside = np.arange(_MOST_HEADER_BYTES) < sizes[:, None]
    padded[is_inside] = payload[at[is_inside]]
    magic = padded[:, :4] @ (1 << np.arange(0, 32, 8))
    descriptor = padded[:, 4]
    is_single = descriptor >> 5 & 1
    size_bytes = np.array([0, 2, 4, 8])[descriptor >> 6]
    size_bytes[(size_bytes == 0) & (is_single == 1)] = 1
    begin = 5 + (1 - is_single) + np.array([0, 1, 2, 4])[descriptor & 3]
    digits = np.arange(8)
    fields = np.take_along_axis(padded, np.minimum(begin[:, None] + digits, _MOST_HEADER_BYTES - 1), axis=1)
    fields[digits >= size_bytes[:, None]] = 0
    claimed = fields @ (1 << 8 * digits)
    claimed += 256 * (size_bytes == 2)
    has_window = (is_single == 1) | ((padded[:, 5] >> 3) + 10 <= _MOST_WINDOW_LOG)
    is_frame = (magic == _MAGIC) & (descriptor >> 3 & 1 == 0) & has_window & (sizes >= begin + size_bytes)
    claimed[~is_frame | (size_bytes == 0)] = -1
    return claimed
