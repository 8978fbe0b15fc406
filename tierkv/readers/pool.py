"""ReaderPool: the reader processes of one piece of shared memory. Satisfies `RecordDecoders`."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
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
from tierkv.readers.processes import ReaderProcesses
from tierkv.readers.reader import Reader, ReaderFailedError
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import Codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import BlockInfo, EncodedRecord, record_room
from tierkv.storage.record_decoders import RecordToDecode
from tierkv.storage.record_source import FileRecord
from tierkv.storage.warm import Slab, WarmPool
from tierkv.values.layout import BlockLayout

__all__ = ["ReaderPool", "ReaderStats"]

_ANSWER_S = 15.0  # of one request: a disk of 2 MB/s delivers a block
_ENCODING_SHARE = 4  # of the processes, one in so many encodes: the others read for requests

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


class ReaderPool(ReaderProcesses):
    """Starts `num_processes` processes, and hands records and blocks to those that are free. Thread-safe.

    memory_fd: of the shared memory (a memfd), which lies at `address` in this process; duplicated. A place for a block
    elsewhere is not the pool's. num_in_process: how many threads of this process may decode at once.
    num_encoding: processes that are started to encode; the others read for requests.
    answer_s: a process that takes longer for a request is killed. No place is free before its process has ended.
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
        super().__init__(memory_fd, memory_bytes=memory_bytes, num_processes=num_processes)
        self.num_encoding: int = max(1, num_processes // _ENCODING_SHARE)
        self.in_process: AbstractContextManager[object] = threading.BoundedSemaphore(num_in_process)
        self._address = address
        self._answer_s = answer_s
        self._num_requests = self._num_blocks = self._num_encoded = 0
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

    def start_for(self, cold: ColdStore) -> None:
        """Start the processes if a store has blocks; for an empty one they are started when there is work for them."""
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
        place, room = self._place_in_memory(block, layout), record_room(layout, codec, info.num_tokens)
        raw_bytes = layout.token_bytes * info.num_tokens
        if place is None or raw_bytes < SMALLEST_RECORD_BYTES:
            return None
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
        message = self._message_of(request)
        found: EncodedRecord | None = None
        with self._a_process(is_wanted=message is not None, most=self.num_encoding) as reader:
            memory = take_memory(room) if reader else None
            if reader is None or message is None or memory is None or memory.fd is None:
                return None
            answer = self._ask(reader, message, memory.fd, self._encode_decoder, number=request.number)
            if answer.stored_bytes > room:
                raise ReaderFailedError("its record is longer than the memory for it")
            if answer.codec:
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

    def _next_number(self) -> int:
        with self._changed:
            self._num_requests += 1
            return self._num_requests

    def _message_of(self, request: ReadRequest | EncodeRequest) -> bytes | None:
        """Return the message of a request; None if it is too long for a socket."""
        message = self._encoder.encode(request)
        return message if len(message) <= MAX_MESSAGE_BYTES else None

    def _ask(
        self, reader: Reader, message: bytes, fd: int, decoder: msgspec.msgpack.Decoder[_Answer], *, number: int
    ) -> _Answer:
        """Send a request with a descriptor, and return the answer. Raises ReaderFailedError."""
        received = reader.ask(message, fd, timeout_s=self._answer_s)
        try:
            answer = decoder.decode(received)
        except msgspec.MsgspecError as exc:
            raise ReaderFailedError(f"its answer is not one: {exc}") from exc
        if answer.number != number:
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
        message = self._message_of(request)
        if message is None:
            return [None] * len(wanted)
        answer = self._ask(reader, message, data_fd, self._decoder, number=request.number)
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
