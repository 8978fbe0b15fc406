"""ReaderPool: the reader processes of one piece of shared memory. Satisfies `RecordDecoders`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from tierkv.errors import StoreError
from tierkv.readers.choice import SMALLEST_RECORD_BYTES
from tierkv.readers.messages import (
    MAX_MESSAGE_BYTES,
    BlockRequest,
    EncodeAnswer,
    EncodeRequest,
    ReadAnswer,
    ReadRequest,
)
from tierkv.readers.reader import Reader, ReaderFailedError
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import Codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import BlockInfo, EncodedRecord, record_room
from tierkv.storage.record_decoders import RecordToDecode
from tierkv.storage.record_source import FileRecord
from tierkv.storage.warm import Slab, WarmPool
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition

__all__ = ["ReaderPool", "ReaderStats"]

_ANSWER_S = 15.0  # of one request: a disk of 2 MB/s delivers a block
_START_S = 60.0  # to import numpy on a busy machine, from a slow disk
_CLOSE_S = 5.0
_POLL_S = 0.1
_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", ReadAnswer, EncodeAnswer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderStats:
    """processes: started and not ended. ready: those of them that work, or can. blocks: decoded by them so far.

    encoded: blocks that they encoded. failed: processes that ended, or were killed because they did not answer, before
    the pool was closed.
    """

    processes: int
    ready: int
    blocks: int
    encoded: int
    failed: int


class ReaderPool:
    """Starts `num_processes` processes, and hands records and blocks to those that are free. Thread-safe.

    memory_fd: of the shared memory (a memfd), which lies at `address` in this process; duplicated. A place for a block
    elsewhere is not the pool's. num_in_process: how many threads of this process may decode at once.
    answer_s: a process that takes longer for a request is killed. No place is free before its process has ended.

    Close the pool before the shared memory. In the child of a fork it has no processes and does nothing.
    """

    def __init__(
        self,
        memory_fd: int,
        *,
        address: int,
        memory_bytes: int,
        num_processes: int,
        num_in_process: int,
        answer_s: float = _ANSWER_S,
    ) -> None:
        self.num_processes = num_processes
        self.in_process: AbstractContextManager[object] = threading.BoundedSemaphore(num_in_process)
        self._fd = os.dup(memory_fd)
        self._address = address
        self._memory_bytes = memory_bytes
        self._answer_s = answer_s
        self._pid = os.getpid()
        self._changed = OwnedCondition()
        self._idle: list[Reader] = []
        self._busy: set[Reader] = set()
        self._starting: set[Reader] = set()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._num_requests = self._num_blocks = self._num_encoded = self._num_failed = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ReadAnswer)
        self._encode_decoder = msgspec.msgpack.Decoder(EncodeAnswer)
        self._known_layout: tuple[BlockLayout, bytes] | None = None

    @classmethod
    def of_slab(cls, slab: Slab | WarmPool, *, num_processes: int, num_in_process: int) -> ReaderPool | None:
        """Return a pool for blocks in this memory; None without processes, or without a descriptor of the memory."""
        if num_processes < 1 or slab.fd is None:
            return None
        return cls(
            slab.fd,
            address=slab.address,
            memory_bytes=slab.slab_bytes if isinstance(slab, WarmPool) else slab.size_bytes,
            num_processes=num_processes,
            num_in_process=num_in_process,
        )

    def start(self) -> None:
        """Start the processes in the background. May be called more than once; later calls do nothing."""
        with self._changed:
            if self._thread is not None or self._is_closed or os.getpid() != self._pid:
                return
            self._thread = threading.Thread(target=self._start_all, name="tierkv-readers", daemon=True)
        self._thread.start()

    def start_for(self, cold: ColdStore) -> None:
        """Start the processes if a store has blocks; for an empty one the first large read starts them."""
        with contextlib.suppress(StoreError):  # such a store has nothing to read
            if cold.stats().blocks:
                self.start()

    def stats(self) -> ReaderStats:
        """Return the numbers of the pool."""
        with self._changed:
            return ReaderStats(
                processes=len(self._idle) + len(self._busy) + len(self._starting),
                ready=len(self._idle) + len(self._busy),
                blocks=self._num_blocks,
                encoded=self._num_encoded,
                failed=self._num_failed,
            )

    def pids(self) -> list[int]:
        """Return the numbers of the processes that are ready."""
        with self._changed:
            return [each.pid for each in (*self._idle, *self._busy)]

    def decode(
        self, wanted: Sequence[RecordToDecode], *, layout: BlockLayout, lossy_codec: str
    ) -> list[bool | OSError | None]:
        """Have a free process decode large records that are coded; see `RecordDecoders`.

        Left to the caller, with None: all where no process is free; what is raw, partial or small, or lies elsewhere.
        """
        outcomes: list[bool | OSError | None] = [None] * len(wanted)
        places = [self._place_of(each, layout) for each in wanted]
        handed = {at: place for at, place in enumerate(places) if place is not None}
        with self._a_process(is_wanted=bool(handed)) as reader:
            if reader is None:
                return outcomes
            found = self._ask_to_read(
                reader, [(wanted[at], place) for at, place in handed.items()], layout=layout, lossy_codec=lossy_codec
            )
            for at, outcome in zip(handed, found, strict=True):
                outcomes[at] = outcome
            with self._changed:
                self._num_blocks += sum(each is True for each in found)
        return outcomes

    def encode(
        self,
        info: BlockInfo,
        block: Bytes,
        *,
        layout: BlockLayout,
        codec: Codec,
        take_memory: Callable[[int], Slab | None],
    ) -> EncodedRecord | None:
        """Have a free process encode a block of the shared memory.

        Left to the caller, with None, where no process is free or one fails, and for a block that is small or lies
        elsewhere. take_memory: called once there is a process; returns memory of so many bytes for the record, if any.
        No process writes into it any more when this returns or raises.
        """
        place = self._place_in_memory(block, layout)
        raw_bytes = layout.token_bytes * info.num_tokens
        found: EncodedRecord | None = None
        with self._a_process(is_wanted=place is not None and raw_bytes >= SMALLEST_RECORD_BYTES) as reader:
            room = record_room(layout, codec, info.num_tokens)
            memory = take_memory(room) if reader else None
            if reader is None or memory is None or memory.fd is None:
                return None
            assert place is not None
            request = EncodeRequest(
                number=self._next_number(),
                layout=self._json_of(layout),
                codec=codec.name,
                place=place,
                room=room,
                namespace=info.namespace,
                block_hash=info.block_hash,
                parent=info.parent,
                content_digest=info.content_digest,
                token_bytes=info.token_bytes,
            )
            answer = self._ask(reader, request, memory.fd, self._encode_decoder)
            if answer is not None and answer.stored_bytes > room:
                raise ReaderFailedError("its record is longer than the memory for it")
            if answer is not None and answer.codec:
                found = EncodedRecord(
                    info=info,
                    codec=answer.codec,
                    raw_bytes=raw_bytes,
                    stored_bytes=answer.stored_bytes,
                    buffer=memory.bytes[:room],
                )
                with self._changed:
                    self._num_encoded += 1
        return found

    def wait_until_ready(self, has_ended: Callable[[], bool]) -> None:
        """Wait until every process that is being started is ready or has failed, or `has_ended` returns True."""
        while self._thread is not None and self._thread.is_alive() and not has_ended():
            self._thread.join(_POLL_S)

    def close(self) -> None:
        """End the processes; a request in work is left to its caller. Bounded. May be called twice."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            idle, self._idle = self._idle, []
            for each in (*self._busy, *self._starting):
                each.kill()  # the thread that uses it waits for its end
            thread = self._thread
        deadline = time.monotonic() + _CLOSE_S
        for each in idle:
            each.kill()
        hanging = [each for each in idle if not each.end(max(0.0, deadline - time.monotonic()))]
        with self._changed:
            self._changed.wait_for(lambda: not (self._busy or self._starting), max(0.0, deadline - time.monotonic()))
            hanging += [*self._busy, *self._starting]
        if thread:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not (thread and thread.is_alive()):
            os.close(self._fd)  # that thread may still start a process with it
        for each in hanging:
            _log.warning("reader process %d does not end: the system holds it", each.pid)

    def _start_all(self) -> None:
        """Start all processes, then wait until each is ready. Runs on a thread of its own."""
        starting: list[Reader] = []
        for _ in range(self.num_processes):
            if self._is_closed:
                return
            try:
                reader = self._start_one()
            except OSError as exc:
                _log.warning("%d of %d reader processes were started: %s", len(starting), self.num_processes, exc)
                break
            if reader is None:
                break
            starting.append(reader)
        deadline = time.monotonic() + _START_S
        for reader in starting:
            try:
                reader.wait_until_ready(max(0.1, deadline - time.monotonic()))
            except ReaderFailedError as exc:
                self._drop(reader, str(exc))
            else:
                self._put_back(reader)

    def _start_one(self) -> Reader | None:
        """Start a process; None once the pool is closed."""
        if not sys.executable:
            raise OSError("this interpreter has no program of its own to run")
        reader = Reader(self._fd, self._memory_bytes)
        with self._changed:
            if not self._is_closed:
                self._starting.add(reader)
                return reader
        reader.end()
        return None

    def _take(self) -> Reader | None:
        """Return a free process; None if there is none, or this is the child of a fork."""
        if os.getpid() != self._pid:
            return None
        self.start()
        with self._changed:
            if not self._idle:
                return None
            reader = self._idle.pop()
            self._busy.add(reader)
            return reader

    def _put_back(self, reader: Reader) -> None:
        with self._changed:
            if not self._is_closed:
                self._forget(reader)
                self._idle.append(reader)
                return
        self._drop(reader, "the pool is closed")

    def _drop(self, reader: Reader, why: str) -> None:
        """End a process and wait for that, however long it takes: until then it may write into a place."""
        reader.end()
        with self._changed:
            self._forget(reader)
            left = len(self._idle) + len(self._busy) + len(self._starting)
            is_failure = not self._is_closed
            self._num_failed += is_failure
            self._changed.notify_all()
        if is_failure:
            how = reader.describe_end()
            _log.warning("reader process %d was lost: %s (%s); %d are left", reader.pid, why, how, left)

    def _forget(self, reader: Reader) -> None:
        """Forget that a process is busy, or is being started; the caller holds the lock."""
        assert self._changed.is_owned()
        self._busy.discard(reader)
        self._starting.discard(reader)

    @contextlib.contextmanager
    def _a_process(self, *, is_wanted: bool) -> Iterator[Reader | None]:
        """A free process, None if there is none; its failure in the body ends the process, and the body."""
        reader = self._take() if is_wanted else None
        try:
            yield reader
        except ReaderFailedError as exc:
            assert reader is not None
            self._drop(reader, str(exc))
        except BaseException:  # an interrupt: the process may still write
            if reader is not None:
                self._drop(reader, "a request was interrupted")
            raise
        else:
            if reader is not None:
                self._put_back(reader)

    def _next_number(self) -> int:
        with self._changed:
            self._num_requests += 1
            return self._num_requests

    def _ask(
        self, reader: Reader, request: ReadRequest | EncodeRequest, fd: int, decoder: msgspec.msgpack.Decoder[_Answer]
    ) -> _Answer | None:
        """Send a request with a descriptor and return the answer; None if it is too long. Raises ReaderFailedError."""
        message = self._encoder.encode(request)
        if len(message) > MAX_MESSAGE_BYTES:
            return None
        received = reader.ask(message, fd, timeout_s=self._answer_s)
        try:
            answer = decoder.decode(received)
        except msgspec.MsgspecError as exc:
            raise ReaderFailedError(f"its answer is not one: {exc}") from exc
        if answer.number != request.number:
            raise ReaderFailedError("its answer is that of another request")
        return answer

    def _ask_to_read(
        self,
        reader: Reader,
        wanted: Sequence[tuple[RecordToDecode, int]],
        *,
        layout: BlockLayout,
        lossy_codec: str,
    ) -> list[bool | OSError | None]:
        """Hand records, each with its place, to a process and wait for what came of them. Raises ReaderFailedError."""
        blocks: list[BlockRequest] = []
        data_fd = -1
        for each, place in wanted:
            record, info = each.record, each.expected
            assert isinstance(record, FileRecord), "only such a record has a place"
            data_fd = record.fd
            blocks.append(
                BlockRequest(
                    offset=record.offset,
                    size=record.size,
                    place=place,
                    block_hash=info.block_hash,
                    parent=info.parent,
                    content_digest=info.content_digest,
                    token_bytes=info.token_bytes,
                )
            )
        namespace = wanted[0][0].expected.namespace
        request = ReadRequest(self._next_number(), namespace, self._json_of(layout), lossy_codec, blocks)
        answer = self._ask(reader, request, data_fd, self._decoder)
        if answer is None:
            return [None] * len(wanted)
        if len(answer.outcomes) != len(wanted):
            raise ReaderFailedError("its answer is that of another request")
        return [OSError(each.errno, each.text) if each.errno else each.is_right for each in answer.outcomes]

    def _place_of(self, wanted: RecordToDecode, layout: BlockLayout) -> int | None:
        """Return the byte of the shared memory where a record's block goes, or None if the record is not for a process.

        A record as long as a block is raw: it is read by one call, without the interpreter's lock. A GPU decodes one
        that may stay coded.
        """
        record, out = wanted.record, wanted.out
        if not isinstance(record, FileRecord) or not isinstance(out, np.ndarray) or wanted.coded is not None:
            return None
        is_coded = SMALLEST_RECORD_BYTES <= record.size < layout.block_bytes
        if not is_coded or wanted.expected.num_tokens != layout.block_size:
            return None
        return self._place_in_memory(out, layout)

    def _place_in_memory(self, block: Bytes, layout: BlockLayout) -> int | None:
        """Return the byte of the shared memory where a block begins; None for one that lies elsewhere."""
        place = int(block.ctypes.data) - self._address
        is_inside = place >= 0 and place + layout.block_bytes <= self._memory_bytes
        is_whole = block.nbytes == layout.block_bytes and block.flags.c_contiguous
        return place if is_inside and is_whole else None

    def _json_of(self, layout: BlockLayout) -> bytes:
        """Return the text of a layout; that of the layout before is kept."""
        known = self._known_layout
        if known is None or known[0] is not layout:
            known = self._known_layout = layout, json.dumps(layout.to_dict()).encode()
        return known[1]
