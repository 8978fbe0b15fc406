"""RecordEncoder: encodes blocks of shared memory, in reader processes where there are any."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from tierkv.background.work_queue import Priority, PriorityThreadPool
from tierkv.readers.pool import ReaderPool
from tierkv.readers.record_memory import RecordMemory
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import RAW, Codec
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.storage.warm import Slab
from tierkv.values.layout import BlockLayout

__all__ = ["RecordEncoder"]

_Block: TypeAlias = tuple[BlockInfo, Bytes]

_SHARE = 4  # of the processes, one in so many encodes: the others read for requests


class RecordEncoder:
    """Encodes blocks of one layout. An engine that runs in this process hardly notices what processes encode.

    Encoding takes the interpreter's lock several hundred times a block. The engine's own thread gives that lock up in
    each call of torch, and waits for it after each.
    readers: of the memory where the blocks lie; None to encode by threads alone. threads: of this process.
    """

    def __init__(
        self, layout: BlockLayout, codec: Codec, *, readers: ReaderPool | None, threads: PriorityThreadPool
    ) -> None:
        self._layout = layout
        self._codec = codec
        self._readers = None if codec is RAW else readers  # to copy a raw block takes the lock once
        self._threads = threads
        num_processes = max(1, self._readers.num_processes // _SHARE) if self._readers else 0
        self._memory = RecordMemory(most_kept=num_processes)
        self._turn = threading.BoundedSemaphore(max(1, num_processes))
        self._here = threading.Lock()

    @contextlib.contextmanager
    def encoding(
        self, blocks: Sequence[_Block], *, is_awaited: bool, is_kept: bool = False
    ) -> Iterator[list[EncodedRecord]]:
        """Yield the records of blocks, which must not change meanwhile. Their memory is used again afterwards.

        is_awaited: all threads of this process encode. Without it one of them does, and only what no process takes.
        is_kept: the records are needed for longer.
        """
        places = contextlib.ExitStack()
        with places:
            encode = partial(self._encode, places=places, is_awaited=is_awaited, is_kept=is_kept)
            if self._readers or is_awaited:
                yield self._threads.map(Priority.DEMOTION, encode, blocks)
            else:
                yield [encode(each) for each in blocks]

    def close(self) -> None:
        """Free the memory of records. May be called twice."""
        self._memory.close()

    def _encode(self, block: _Block, *, places: contextlib.ExitStack, is_awaited: bool, is_kept: bool) -> EncodedRecord:
        if self._readers and self._turn.acquire(blocking=not is_awaited):
            try:
                found = self._encode_elsewhere(block, self._readers, places)
            finally:
                self._turn.release()
            if found:
                return replace(found, buffer=found.data.copy()) if is_kept else found
        with contextlib.nullcontext() if is_awaited else self._here:
            return encode_record(block[0], block[1], layout=self._layout, codec=self._codec)

    def _encode_elsewhere(
        self, block: _Block, readers: ReaderPool, places: contextlib.ExitStack
    ) -> EncodedRecord | None:
        """Have a process encode a block into memory that is free again when `places` closes. None where none does."""

        def take_memory(num_bytes: int) -> Slab | None:
            place = self._memory.take(num_bytes)
            if place:
                places.callback(self._memory.put_back, place)
            return place

        return readers.encode(*block, layout=self._layout, codec=self._codec, take_memory=take_memory)
