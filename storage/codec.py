"""What a codec is: a run of a block (one layer's K or V) into frames and back.

A coded frame covers at most FRAME_BYTES of the run and never straddles two. Codecs are immutable and may be used
by many threads; scratch memory is one set per thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from tierkv.storage.planes import Bytes
from tierkv.values.layout import Run

__all__ = ["Codec", "decode_one_by_one", "iter_runs"]


class Codec(Protocol):
    """Turns one run into frames and back. The record names it by id and version.

    run: where the run lies in a block, and what its values are; the lossless ones care for its length alone.
    The number of tokens follows from the number of bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def codec_id(self) -> int: ...

    @property
    def version(self) -> int: ...

    @property
    def is_lossy(self) -> bool:
        """Whether what comes back is only near what went in."""

    def num_frames(self, run: Run, num_tokens: int) -> int:
        """Return how many frames so many tokens of a run have."""

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int] | None:
        """Write the frames of `values` one after another into `out`, which is as long; return their sizes.

        None if the codec cannot hold these values: the block is then stored raw. Raises ConfigError for a
        dtype that is not the codec's.
        """

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        """Write the run into `out`. Raises CorruptBlockError; allocates no more than some frames' planes."""

    def decode_runs(
        self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, runs: Sequence[Run], num_tokens: int
    ) -> None:
        """Write so many tokens of all runs where they belong in `block`. Raises as `decode_run` does."""


def decode_one_by_one(
    codec: Codec, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, runs: Sequence[Run], num_tokens: int
) -> None:
    """Decode the runs of a block one after another."""
    first = begin = 0
    for run, values in iter_runs(block, runs, num_tokens):
        last = first + codec.num_frames(run, num_tokens)
        sizes = frame_sizes[first:last]
        end = begin + sum(sizes)
        codec.decode_run(payload[begin:end], sizes, run, values)
        first, begin = last, end


def iter_runs(block: Bytes, runs: Sequence[Run], num_tokens: int) -> Iterator[tuple[Run, Bytes]]:
    """Yield each run and the bytes of its first tokens."""
    for run in runs:
        yield run, block[run.offset_bytes : run.offset_bytes + run.token_bytes * num_tokens]
