"""A reader process: `python -m tierkv.readers.process SOCKET MEMORY MEMORY_BYTES PARENT`.

SOCKET and MEMORY are descriptors, PARENT is the number of a process. It reads and decodes, or encodes, what its parent
asks for, and ends with the socket or with the parent.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import sys

import msgspec
import numpy as np

from tierkv.errors import CorruptBlockError, FormatVersionError, TierKVError
from tierkv.readers.messages import (
    MAX_MESSAGE_BYTES,
    READY,
    BlockOutcome,
    BlockRequest,
    EncodeAnswer,
    EncodeRequest,
    ReadAnswer,
    ReadRequest,
)
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.record import BlockInfo, decode_record, encode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.values.layout import BlockLayout

__all__ = ["Places", "main", "serve"]

_MOST_MAPPED_BYTES = 8 << 30  # of shared memory with pages in this process: page tables of 16 MiB


class Places:
    """The shared memory with the places of blocks.

    The map is made anew once much has been used through it. A process keeps an entry of 8 bytes for each page of
    4 KiB that it has touched: for many processes and a large warm tier that would be GiB of page tables.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self._num_bytes = num_bytes
        self._map = self._map_all()
        self._touched_bytes = 0

    def view(self, at: int, num_bytes: int) -> Bytes:
        """Return the place at byte `at`; used until the next one is asked for."""
        if self._touched_bytes > _MOST_MAPPED_BYTES < self._num_bytes:
            with contextlib.suppress(BufferError):  # a view is still alive: that part ends with the view
                self._map.close()
            self._map, self._touched_bytes = self._map_all(), 0
        self._touched_bytes += num_bytes
        return np.frombuffer(self._map, dtype=np.uint8, count=num_bytes, offset=at)

    def _map_all(self) -> mmap.mmap:
        return mmap.mmap(self._fd, self._num_bytes)


class _Reader:
    """Answers requests, one after another."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._memory = ThreadMemory()
        self._layout_json = b""
        self._layout: BlockLayout | None = None

    def answer(self, request: ReadRequest | EncodeRequest, fd: int) -> ReadAnswer | EncodeAnswer:
        """Do what a request asks for. fd: the descriptor that came with it."""
        layout = self._layout_of(request.layout)
        if isinstance(request, EncodeRequest):
            return self._encode(request, fd, layout)
        return ReadAnswer(request.number, [self._decode(request, each, fd, layout) for each in request.blocks])

    def _layout_of(self, text: bytes) -> BlockLayout:
        if self._layout is None or text != self._layout_json:
            self._layout, self._layout_json = BlockLayout.from_dict(json.loads(text)), text
        return self._layout

    def _encode(self, request: EncodeRequest, memory_fd: int, layout: BlockLayout) -> EncodeAnswer:
        """Write the record of a block into the memory that came with the request."""
        info = _info_of(request, request.namespace)
        memory = np.frombuffer(mmap.mmap(memory_fd, request.room), dtype=np.uint8)  # unmapped with its last view
        try:
            block, codec = self._places.view(request.place, layout.block_bytes), codec_by_name(request.codec)
            record = encode_record(info, block, layout=layout, codec=codec, memory=memory)
        except TierKVError:
            return EncodeAnswer(request.number)
        return EncodeAnswer(request.number, record.codec, record.stored_bytes)

    def _decode(self, request: ReadRequest, block: BlockRequest, data_fd: int, layout: BlockLayout) -> BlockOutcome:
        expected = _info_of(block, request.namespace)
        record = FileRecord(data_fd, offset=block.offset, size=block.size, memory=self._memory)
        try:
            out = self._places.view(block.place, layout.block_bytes)
            reason = decode_record(record, out, expected=expected, layout=layout, lossy_codec=request.lossy_codec)
            return BlockOutcome(reason is None)
        except (CorruptBlockError, FormatVersionError):
            return BlockOutcome(False)
        except OSError as exc:
            return BlockOutcome(False, exc.errno or 0, exc.strerror or str(exc))


def _info_of(block: BlockRequest | EncodeRequest, namespace: bytes) -> BlockInfo:
    """Return the identity that a request names."""
    return BlockInfo(
        block_hash=block.block_hash,
        parent=block.parent,
        namespace=namespace,
        content_digest=block.content_digest,
        token_bytes=block.token_bytes,
    )


def serve(connection: socket.socket, places: Places, parent: int | None) -> None:
    """Answer requests until the socket ends or the parent has ended. parent: descriptor of that process, or None."""
    reader = _Reader(places)
    decoder, encoder = msgspec.msgpack.Decoder(ReadRequest | EncodeRequest), msgspec.msgpack.Encoder()
    waiting = select.poll()
    for each in (connection.fileno(), parent):
        if each is not None:
            waiting.register(each, select.POLLIN)
    connection.send(READY)
    while True:
        if any(fd == parent for fd, _ in waiting.poll()):
            return
        message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
        try:
            if not message:
                return
            answer = reader.answer(decoder.decode(message), descriptors[0])
        finally:
            for fd in descriptors:
                os.close(fd)
        connection.send(encoder.encode(answer))


def _open_process(pid: int) -> int | None:
    """Return a descriptor of the parent, or None where the system has no such ones. Exit if that has ended."""
    found = None
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            found = os.pidfd_open(pid)
    if os.getppid() != pid:  # looked at last: another process may have got the number before
        sys.exit(0)
    return found


def main(arguments: list[str]) -> None:
    """Run a reader process."""
    connection_fd, memory_fd, memory_bytes, parent = map(int, arguments)
    for each in (signal.SIGINT, signal.SIGTERM):  # those are the parent's: it ends its readers
        signal.signal(each, signal.SIG_IGN)
    with socket.socket(fileno=connection_fd) as connection, contextlib.suppress(BrokenPipeError, ConnectionError):
        serve(connection, Places(memory_fd, memory_bytes), _open_process(parent))


if __name__ == "__main__":
    main(sys.argv[1:])
