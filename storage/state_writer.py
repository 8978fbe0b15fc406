"""Writing a state file: beside its place, synced, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from tierkv.block import BlockHash
from tierkv.errors import StoreError
from tierkv.storage.lmdb_directory import sync_file
from tierkv.storage.record import read_header
from tierkv.storage.state_format import ALIGN_BYTES, ROW, StateHeader

__all__ = ["SavedState", "write_state_file"]


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a save wrote."""

    blocks: int
    file_bytes: int


def write_state_file(path: Path, *, namespace: BlockHash, description: bytes, records: Iterable[bytes]) -> SavedState:
    """Write records into one file, atomically: beside the target, synced, then renamed over it.

    Raises StoreError if the file cannot be written; the target is then what it was.
    What a save that was killed has left beside the target goes with the next one.
    """
    path = path.absolute()
    try:
        _remove_remains(path)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=_temporary_prefix(path))
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    try:
        with os.fdopen(fd, "wb") as file:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as this process lives, it is no remains
            state = _write(file, namespace, description, records)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_file(path.parent)
        return state
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}."


def _remove_remains(path: Path) -> None:
    """Remove what saves to `path` left behind that were killed; raises OSError."""
    for remains in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(remains, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remains.unlink()


def _write(file: BinaryIO, namespace: BlockHash, description: bytes, records: Iterable[bytes]) -> SavedState:
    file.write(b"\0" * ALIGN_BYTES)
    file.write(description)
    rows: list[tuple[bytes, bytes, int, int, int, int]] = []
    for record in records:
        info = read_header(record).info
        file.write(b"\0" * (-file.tell() % ALIGN_BYTES))
        rows.append((info.block_hash, info.parent, file.tell(), len(record), info.num_tokens, 0))
        file.write(record)
    file.write(b"\0" * (-file.tell() % ALIGN_BYTES))
    index_offset = file.tell()
    rows.sort()
    index = np.array(rows, dtype=ROW).tobytes()
    file.write(index)
    file_bytes = file.tell()
    file.seek(0)
    header = StateHeader(
        file_bytes=file_bytes,
        description_bytes=len(description),
        index_offset=index_offset,
        rows=len(rows),
        namespace=namespace,
        checksum=xxhash.xxh3_64_intdigest(description + index),
    )
    file.write(header.pack())
    return SavedState(len(rows), file_bytes)
