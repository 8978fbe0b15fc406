"""The messages between a cache and its reader processes. Both ends run the same version of this code."""

from __future__ import annotations

import msgspec

__all__ = [
    "MAX_MESSAGE_BYTES",
    "READY",
    "BlockOutcome",
    "BlockRequest",
    "EncodeAnswer",
    "EncodeRequest",
    "ReadAnswer",
    "ReadRequest",
]

MAX_MESSAGE_BYTES = 64 << 10
"""A longer message is not sent: what a socket takes at once without waiting, on every Linux."""

READY = b"ready"
"""The first message of a reader process, once it can work."""


class BlockRequest(msgspec.Struct, array_like=True, frozen=True):
    """One record to decode. offset, size: its bytes in the data file. place: byte of the shared memory where its block
    begins. The other fields are those of BlockInfo.
    """

    offset: int
    size: int
    place: int
    block_hash: bytes
    parent: bytes
    content_digest: bytes
    token_bytes: bytes


class ReadRequest(msgspec.Struct, array_like=True, frozen=True, tag="read"):
    """Records of one namespace. A descriptor of the data file comes with it. number: the answer repeats it.

    layout: JSON of `BlockLayout.to_dict`, bytes that are compared with those of the request before.
    """

    number: int
    namespace: bytes
    layout: bytes
    lossy_codec: str
    blocks: list[BlockRequest]


class BlockOutcome(msgspec.Struct, array_like=True, frozen=True):
    """What came of one record. errno: 0, or why the file was not read. is_right is False then."""

    is_right: bool
    errno: int = 0
    text: str = ""


class ReadAnswer(msgspec.Struct, array_like=True, frozen=True):
    """The outcomes of the records of a request, in their order."""

    number: int
    outcomes: list[BlockOutcome]


class EncodeRequest(msgspec.Struct, array_like=True, frozen=True, tag="encode"):
    """One block to encode. A descriptor of the memory for its record comes with it. number: the answer repeats it.

    layout: as in `ReadRequest`. codec: by name. place: byte of the shared memory where the block begins. room: bytes of
    the memory for the record. The other fields are those of BlockInfo.
    """

    number: int
    layout: bytes
    codec: str
    place: int
    room: int
    namespace: bytes
    block_hash: bytes
    parent: bytes
    content_digest: bytes
    token_bytes: bytes


class EncodeAnswer(msgspec.Struct, array_like=True, frozen=True):
    """The record that was written, by its codec and its bytes; no codec if the block was not encoded."""

    number: int
    codec: str = ""
    stored_bytes: int = 0
