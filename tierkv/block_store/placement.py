"""Where the bytes of blocks lie in an engine: pages of its tensors, or buffers of one block each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tierkv.errors import ShapeError
from tierkv.movers.ready import AllReady, Done, Ready
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.record_header import as_bytes

if TYPE_CHECKING:
    import torch

    from tierkv.movers.engine_memory import EngineMemory

__all__ = ["Buffers", "Placement", "Strided"]


class Placement(Protocol):
    """One place for each of several blocks, in order."""

    def __len__(self) -> int: ...

    def mark(self) -> Ready:
        """Return the completion of the work that the caller has queued on the places so far."""

    def load(self, first: int, slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy warm slots to the places from `first` on. memory: [slots, block bytes]."""

    def save(self, places: Sequence[int], slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy places to warm slots."""


@dataclass(frozen=True, slots=True, eq=False)
class Strided:
    """Blocks in the tensors of an engine. memory: what `BlockStore.register` returned.

    pages: for each block its `pages_per_block` pages; -1 leaves a page as it is when a block is loaded.
    """

    memory: EngineMemory
    pages: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.pages)

    def mark(self) -> Ready:
        """Return the completion of the work queued on the current stream so far."""
        return self.memory.mark()

    def load(self, first: int, slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy warm slots to the pages of blocks; see `EngineMemory.load`."""
        return self.memory.load(slots, self.pages[first : first + len(slots)], memory, after=after)

    def load_coded(
        self,
        first: int,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        memory: Bytes,
        *,
        after: Sequence[Ready],
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        """Decode slots into the pages of blocks; see `EngineMemory.load_coded`."""
        pages = self.pages[first : first + len(slots)]
        return self.memory.load_coded(slots, coded, pages, memory, after=after, keeps_decoded=keeps_decoded)

    def save(self, places: Sequence[int], slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy the pages of blocks to warm slots; see `EngineMemory.save`."""
        return self.memory.save([self.pages[place] for place in places], slots, memory, after=after)


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Blocks in CPU memory, one contiguous buffer of a block's bytes each: a memoryview, an array or a tensor.

    A buffer that is loaded into is writable. Copies are done when the call returns.
    """

    buffers: Sequence[memoryview | bytearray | bytes | Bytes | torch.Tensor]

    def __len__(self) -> int:
        return len(self.buffers)

    def mark(self) -> Ready:
        """Nothing is queued on CPU memory."""
        return Done()

    def load(self, first: int, slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy warm slots to buffers. Raises ShapeError for a buffer that does not fit, before any is written."""
        AllReady(after).synchronize()
        found = [self._bytes_of(first + i, memory.shape[1], is_target=True) for i in range(len(slots))]
        for out, slot in zip(found, slots, strict=True):
            out[:] = memory[slot]
        return Done()

    def save(self, places: Sequence[int], slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        """Copy buffers to warm slots. Raises ShapeError for a buffer that does not fit, before any slot is written."""
        AllReady(after).synchronize()
        found = [self._bytes_of(place, memory.shape[1], is_target=False) for place in places]
        for source, slot in zip(found, slots, strict=True):
            memory[slot] = source
        return Done()

    def _bytes_of(self, place: int, block_bytes: int, *, is_target: bool) -> Bytes:
        buffer = self.buffers[place]
        try:
            if not isinstance(buffer, memoryview | bytearray | bytes | np.ndarray):
                buffer = _tensor_bytes(buffer)  # numpy knows no bfloat16
            found = as_bytes(buffer.cast("B") if isinstance(buffer, memoryview) else buffer)
        except (ValueError, TypeError, BufferError, AttributeError) as exc:
            raise ShapeError(f"buffer {place} is not contiguous bytes: {exc}") from exc
        if found.size != block_bytes:
            raise ShapeError(f"buffer {place} has {found.size} bytes, a block {block_bytes}")
        if is_target and not found.flags.writeable:
            raise ShapeError(f"buffer {place} cannot be written to")
        return found


def _tensor_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a CPU tensor as an array of bytes that shares its memory. Raises ShapeError."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ShapeError(f"a tensor used as a buffer is contiguous and on the CPU, this one is on {tensor.device}")
    import torch

    raw: Bytes = tensor.detach().view(-1).view(torch.uint8).numpy()
    return raw
