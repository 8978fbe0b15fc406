"""The protocol: frames on a UNIX socket with msgpack inside, and its limits.

A frame is a header of 16 bytes, little-endian, and a body: body length (u32), protocol version (u16), request
number (u16, chosen by the client and repeated in the answer; 0 asks for no answer), boot id (u64). The boot id is the
daemon's, drawn at each start, and 0 in the first frame of a client, which does not know it yet. Version and boot id are
outside the body, so that a frame of another version can be refused without reading its body.
"""

from __future__ import annotations

import functools
import operator
import struct
from array import array
from typing import Any

import msgspec

import tierkv.daemon.eviction_messages  # noqa: F401 - its messages belong to the protocol
from tierkv.daemon.messages import Message
from tierkv.errors import DaemonError
from tierkv.values.block import HASH_BYTES

__all__ = [
    "HEADER",
    "MAX_BODY_BYTES",
    "MAX_PATH_BYTES",
    "PROTOCOL_VERSION",
    "FrameReader",
    "ProtocolError",
    "frame",
    "parse_body",
    "printable",
    "split_hashes",
    "split_numbers",
]

PROTOCOL_VERSION = 3
MAX_BODY_BYTES = 16 << 20
"""Four million token ids. A longer message closes the connection before it is read."""

MAX_PATH_BYTES = 4096

HEADER = struct.Struct("<IHHQ")


class ProtocolError(DaemonError):
    """A message that is invalid, or is not allowed now. is_fatal: nothing more can be read from the connection."""

    def __init__(self, message: str, *, is_fatal: bool = False, hint: str | None = None) -> None:
        self.is_fatal = is_fatal
        super().__init__(message, hint=hint)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: Any = msgspec.msgpack.Decoder(functools.reduce(operator.or_, Message.__subclasses__()))


def frame(message: Message, *, number: int, boot: int) -> bytearray:
    """Return a message as a frame. Raises ProtocolError for one that no frame can hold."""
    buffer = bytearray(HEADER.size)
    try:
        _ENCODER.encode_into(message, buffer, HEADER.size)
    except (msgspec.MsgspecError, ValueError, OverflowError, TypeError) as exc:  # UnicodeEncodeError is a ValueError
        raise ProtocolError(f"a {type(message).__name__} cannot be sent: {exc!a}") from exc
    size = len(buffer) - HEADER.size
    if size > MAX_BODY_BYTES:
        raise ProtocolError(f"a message of {size} bytes is longer than {MAX_BODY_BYTES}")
    HEADER.pack_into(buffer, 0, size, PROTOCOL_VERSION, number, boot)
    return buffer


def parse_body(body: bytes | memoryview) -> Message:
    """Return the message of a frame's body. Raises ProtocolError."""
    try:
        message: Message = _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"not a message: {exc}") from exc
    return message


def split_hashes(hashes: bytes) -> list[bytes]:
    """Split concatenated block hashes. Raises ProtocolError."""
    if len(hashes) % HASH_BYTES:
        raise ProtocolError(f"{len(hashes)} bytes are no block hashes")
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def split_numbers(raw: bytes) -> array[int]:
    """Split concatenated u32 numbers. Raises ProtocolError."""
    if len(raw) % 4:
        raise ProtocolError(f"{len(raw)} bytes are no list of numbers")
    numbers = array("I")
    numbers.frombytes(raw)
    return numbers


def printable(text: str, limit: int) -> str:
    """Return a client's text for status and log: one line, valid Unicode, at most `limit` characters."""
    text = text[:limit].encode(errors="backslashreplace").decode()
    return "".join(sign if sign.isprintable() else "?" for sign in text)[:limit]


class FrameReader:
    """Splits a stream of bytes into frames. `feed` bytes, then call `next` until it returns None.

    max_body_bytes: a longer message is refused as soon as its header is there. It may change between two messages.
    """

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.max_body_bytes = max_body_bytes
        self._buffer = bytearray()
        self._at = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that were fed and not yet returned."""
        return len(self._buffer) - self._at

    def clear(self) -> None:
        """Drop all bytes that were fed."""
        self._buffer = bytearray()
        self._at = 0

    def feed(self, data: bytes) -> None:
        """Add bytes of the stream."""
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> tuple[int, int, bytes] | None:
        """Return (request number, boot id, body) of the next whole frame. Raises a fatal ProtocolError."""
        start = self._at + HEADER.size
        if len(self._buffer) < start:
            if self._at == len(self._buffer):
                self.clear()  # frees the memory of a long message
            return None
        size, version, number, boot = HEADER.unpack_from(self._buffer, self._at)
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol version {version} is spoken here to a daemon or client of version {PROTOCOL_VERSION}",
                is_fatal=True,
                hint="use the same version of tierkv on both sides and restart the daemon",
            )
        if size > self.max_body_bytes:
            raise ProtocolError(f"a message of {size} bytes is longer than {self.max_body_bytes}", is_fatal=True)
        if len(self._buffer) < start + size:
            return None
        body = bytes(memoryview(self._buffer)[start : start + size])
        self._at = start + size
        return number, boot, body
