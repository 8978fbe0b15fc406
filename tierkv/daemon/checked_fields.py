"""Fields of clients' messages that are more than numbers: checked, and made what they stand for."""

from __future__ import annotations

import os
from pathlib import Path

from tierkv.daemon.messages import Hello
from tierkv.daemon.protocol import MAX_PATH_BYTES, ProtocolError
from tierkv.errors import ConfigError, DaemonError
from tierkv.storage.codecs import codec_by_name
from tierkv.values.block import HASH_BYTES
from tierkv.values.namespace import NamespaceDescription, parse_description

__all__ = ["absolute_path", "described_namespace"]


def described_namespace(message: Hello) -> NamespaceDescription:
    """Return the description of a client's namespace. Raises DaemonError if digest or block size do not match it."""
    try:
        described = parse_description(message.description)
        if described.lossy_codec and not codec_by_name(described.lossy_codec).is_lossy:
            raise ConfigError(f"the codec {described.lossy_codec} is not lossy")
    except ConfigError as exc:
        raise ProtocolError(f"the namespace's description is invalid: {exc}") from exc
    if described.digest != message.namespace:
        raise ProtocolError(
            f"the namespace {message.namespace[:HASH_BYTES].hex()} is named, but {described.digest.hex()} is described",
            hint="use the same version of tierkv on both sides",
        )
    block_bytes = described.layout.block_bytes
    if block_bytes != message.block_bytes:
        raise DaemonError(
            f"the client's blocks have {message.block_bytes} bytes, those of its namespace {block_bytes}",
            hint="the namespace must be that of the client's block size",
        )
    return described


def absolute_path(text: str) -> Path:
    """Return the path that a client names. Raises ProtocolError unless it is absolute, and a path."""
    path = Path(text)
    if not path.is_absolute() or len(os.fsencode(text)) > MAX_PATH_BYTES or "\0" in text:
        raise ProtocolError("a path must be absolute, and a path")
    return path
