"""A reader process: `python -m tierkv.readers.process SOCKET MEMORY MEMORY_BYTES PARENT`.

SOCKET and MEMORY are descriptors, PARENT is the number of a process. It reads and decodes what its parent asks for, and
ends with the socket or with the parent.
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

from tierkv.errors import CorruptBlockError, FormatVersionError
from tierkv.readers.messages import (
    MAX_MESSAGE_BYTES,
    READY,
    BlockOutcome,
    BlockRequest,
    ReadAnswer,
    ReadRequest,
)
from tierkv.storage.record import BlockInfo, decode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.values.layout import BlockLayout

__all__ = ["Places", "main", "serve"]

_MOST_MAPPED_BYTES = 8 << 30  # of shared memory with pages in this process: page tables of 16 MiB


class Places:
    """The shared memory with the places of blocks.

    The map is made anew once much has been written through it. A process keeps an entry of 8 bytes for each page of
    4 KiB that it has touched: for many processes and a large warm tier that would be GiB of page tables.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self._num_bytes = num_bytes
        self._map = self._map_all()
        self._touched_bytes = 0

    def decode(self, record: FileRecord, at: int, expected: BlockInfo, layout: BlockLayout, lossy_codec: str) -> bool:
        """Decode a record into the place at byte `at`. Return whether it is the expected block. Raises as that does."""
        if self._touched_bytes > _MOST_MAPPED_BYTES < self._num_bytes:
            with contextlib.suppress(BufferError):  # a view is still alive: that part ends with the view
                self._map.close()
            self._map, self._touched_bytes = self._map_all(), 0
        self._touched_bytes += layout.block_bytes
        out = np.frombuffer(self._map, dtype=np.uint8, count=layout.block_bytes, offset=at)
        return decode_record(record, out, expected=expected, layout=layout, lossy_codec=lossy_codec) is None

    def _map_all(self) -> mmap.mmap:
        return mmap.mmap(self._fd, self._num_bytes)


class _Reader:
    """Answers requests, one after another."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._memory = ThreadMemory()
        self._layout_json = b""
        self._layout: BlockLayout | None = None

    def answer(self, request: ReadRequest, data_fd: int) -> ReadAnswer:
        """Decode the records of a request."""
        if self._layout is None or request.layout != self._layout_json:
            self._layout, self._layout_json = BlockLayout.from_dict(json.loads(request.layout)), request.layout
        outcomes = [self._decode(request, each, data_fd, self._layout) for each in request.blocks]
        return ReadAnswer(request.number, outcomes)

    def _decode(self, request: ReadRequest, block: BlockRequest, data_fd: int, layout: BlockLayout) -> BlockOutcome:
        expected = BlockInfo(
            block_hash=block.block_hash,
            parent=block.parent,
            namespace=request.namespace,
            content_digest=block.content_digest,
            token_bytes=block.token_bytes,
        )
        record = FileRecord(data_fd, offset=block.offset, size=block.size, memory=self._memory)
        try:
            return BlockOutcome(self._places.decode(record, block.place, expected, layout, request.lossy_codec))
        except (CorruptBlockError, FormatVersionError):
            return BlockOutcome(False)
        except OSError as exc:
            return BlockOutcome(False, exc.errno or 0, exc.strerror or str(exc))


def serve(connection: socket.socket, places: Places, parent: int | None) -> None:
    """Answer requests until the socket ends or the parent has ended. parent: descriptor of that process, or None."""
    reader = _Reader(places)
    decoder, encoder = msgspec.msgpack.Decoder(ReadRequest), msgspec.msgpack.Encoder()
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
