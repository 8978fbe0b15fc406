"""Frames: a plane of bytes as one standard zstd frame, or as it is where that is no longer.

Each frame has its content size and is independent of all others, so that threads, or a GPU, may decode them in
any order; nothing is allocated in proportion to a size that a frame claims and its reader does not expect.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from tierkv.errors import CorruptBlockError
from tierkv.storage.planes import Bytes

__all__ = ["FRAME_BYTES", "LEVEL_3", "LITERALS_ONLY", "FrameCoder"]

FRAME_BYTES = 256 << 10
"""Bytes of a run per coded frame: smaller costs ratio, larger leaves no work for parallel decoders."""

LEVEL_3 = zstandard.ZstdCompressionParameters.from_level(3)
LITERALS_ONLY = zstandard.ZstdCompressionParameters(
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)
"""A match finder that never finds: Huffman coding alone. A larger hash_log, a smaller min_match or a
target_length of 1 lose ratio and speed (the last turns Huffman off)."""


class FrameCoder(threading.local):
    """One zstd compressor and decompressor per thread: neither may be shared."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters) -> None:
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, plane: Bytes, out: Bytes) -> int:
        """Write the frame of `plane` at the start of `out`, or the plane where that is shorter."""
        frame = np.frombuffer(self._compressor.compress(plane.data), dtype=np.uint8)
        if frame.size >= plane.size:
            frame = plane
        out[: frame.size] = frame
        return frame.size

    def decode(self, frame: Bytes, plane_bytes: int) -> Bytes:
        """Return the plane of a frame; it is valid until the next call."""
        if frame.size == plane_bytes:
            return frame
        try:
            # The frame's own word on its size bounds what zstd allocates: read it first.
            if zstandard.frame_content_size(frame.data) != plane_bytes:
                raise CorruptBlockError(f"a frame that is not of {plane_bytes} bytes")
            plane = np.frombuffer(self._decompressor.decompress(frame.data), dtype=np.uint8)
        except zstandard.ZstdError as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        if plane.size != plane_bytes:
            raise CorruptBlockError(f"a frame of {plane.size} bytes where {plane_bytes} belong")
        return plane

    def decode_many(self, frames: Sequence[Bytes], plane_bytes: Sequence[int]) -> list[Bytes]:
        """Return the planes of many frames; all that are coded are decoded at once, without the GIL."""
        planes = list(frames)
        coded = [i for i, frame in enumerate(frames) if frame.size != plane_bytes[i]]
        if not coded:
            return planes
        try:
            for i in coded:  # a frame's own word on its size bounds what zstd writes
                if zstandard.frame_content_size(frames[i].data) != plane_bytes[i]:
                    raise CorruptBlockError(f"a frame that is not of {plane_bytes[i]} bytes")
            sizes = np.array([plane_bytes[i] for i in coded], dtype=np.uint64).tobytes()
            decoded = self._decompressor.multi_decompress_to_buffer(
                [frames[i].data for i in coded], decompressed_sizes=sizes
            )
        except (zstandard.ZstdError, ValueError) as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        for at, i in enumerate(coded):
            planes[i] = np.frombuffer(decoded[at], dtype=np.uint8)  # type: ignore[call-overload]  # it has the buffer protocol
            if planes[i].size != plane_bytes[i]:
                raise CorruptBlockError(f"a frame of {planes[i].size} bytes where {plane_bytes[i]} belong")
        return planes
