"""RecordEncoder: encodes blocks of shared memory, in reader processes where there are any."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    """Blocks that are encoded together. places: of their records. num_failed: processes that had failed before."""

    places: contextlib.ExitStack
    is_awaited: Callable[[], bool]
    is_kept: bool
    num_failed: int


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
        num_at_once = self._readers.num_encoding if self._readers else 1
        self._memory = RecordMemory(most_kept=num_at_once)
        self._turn = threading.BoundedSemaphore(num_at_once)
        self._here = threading.Lock()

    @contextlib.contextmanager
    def encoding(
        self, blocks: Sequence[_Block], *, is_awaited: Callable[[], bool], is_kept: bool = False
    ) -> Iterator[list[EncodedRecord]]:
        """Yield the records of blocks, which must not change meanwhile. Their memory is used again afterwards.

        is_awaited: whether all threads of this process are to encode, asked for each block. Without it one of them
        does, and only what no process takes. is_kept: the records are needed for longer.
        """
        with contextlib.ExitStack() as places:
            job = _Job(places, is_awaited, is_kept, self._readers.num_failed if self._readers else 0)
            encode = partial(self._encode, job)
            if self._readers or is_awaited():
                yield self._threads.map(Priority.DEMOTION, encode, blocks)
            else:
                yield [encode(each) for each in blocks]

    def close(self) -> None:
        """Free the memory of records. May be called twice."""
        self._memory.close()

    def _encode(self, job: _Job, block: _Block) -> EncodedRecord:
        if self._readers and self._turn.acquire(blocking=not job.is_awaited()):
            try:
                found = self._encode_elsewhere(job, block, self._readers)
            except Exception:  # noqa: BLE001 - no record is lost for that; the process has ended
                _log.exception("a block was not encoded by a process")
                found = None
            finally:
                self._turn.release()
            if found:
                return replace(found, buffer=found.data.copy()) if job.is_kept else found
        with contextlib.nullcontext() if job.is_awaited() else self._here:
            return encode_record(block[0], block[1], layout=self._layout, codec=self._codec)

    def _encode_elsewhere(self, job: _Job, block: _Block, readers: ReaderPool) -> EncodedRecord | None:
        """Have a process encode a block into memory that is free again at the job's end. None where none does.

        Once a process has failed, none gets the job's other blocks: each of them may take as long to find that out.
        """

        def take_memory(num_bytes: int) -> Slab | None:
            place = self._memory.take(num_bytes)
            if place:
                job.places.callback(self._memory.put_back, place)
            return place

        if readers.num_failed != job.num_failed:
            return None
        return readers.encode(*block, layout=self._layout, codec=self._codec, take_memory=take_memory)
