"""Writing a state file: beside its place, synced, then renamed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from tierkv.background.call_thread import CallThread
from tierkv.errors import ConfigError, StoreError
from tierkv.storage.record import parse_record
from tierkv.storage.state_format import ALIGN_BYTES, ROW, ROW_LIMIT, StateHeader
from tierkv.storage.unfinished_file import UNFINISHED_MAGIC, WRITE_WAIT_S, UnfinishedFile
from tierkv.values.block import BlockHash
from tierkv.values.files import check_path, translated_errors
from tierkv.values.namespace import parse_description

__all__ = ["WRITE_WAIT_S", "SavedState", "write_state_file"]


@dataclass(frozen=True, slots=True)
class SavedState:
    """The result of a save. left_out: records that were damaged, or of another format."""

    blocks: int
    file_bytes: int
    left_out: int = 0


def write_state_file(
    path: Path,
    *,
    namespace: BlockHash,
    description: bytes,
    records: Iterable[bytes],
    calls: CallThread | None = None,
) -> SavedState:
    """Write records into one file, atomically: beside the target, synced, then renamed over it.

    records: each is checked as a reader checks it. Left out are damaged records, those of another format or namespace,
    those whose codec does not fit the namespace, and repeated blocks. calls: the thread that waits for the disk; by
    default a new one.
    Raises StoreError if the file cannot be written, also where the disk does not answer; the target is then unchanged.
    It may be missing or a regular file; anything else, a symbolic link too, is refused. Raises ConfigError if `path` is
    no path. A later save removes the unfinished files of saves that were killed.
    """
    path = check_path(path)
    with ExitStack() as stack:
        stack.enter_context(translated_errors(f"cannot write {path}"))
        lossy_codec = _lossy_codec_of(namespace, description)
        path = path.absolute()
        calls = calls or stack.enter_context(CallThread(f"cannot write {path}", wait_s=WRITE_WAIT_S))
        unfinished = calls.call(partial(UnfinishedFile.beside, path), undo=UnfinishedFile.remove)
        try:
            writer = _Writer(unfinished, namespace, description, lossy_codec)
            calls.call(writer.begin)
            for record in records:
                calls.call(partial(writer.add, record))
            saved = calls.call(writer.finish)
            calls.call(unfinished.sync)
            calls.call(partial(unfinished.replace, path))
        except BaseException:
            calls.clean_up(unfinished.remove)
            raise
        return saved


def _lossy_codec_of(namespace: BlockHash, description: bytes) -> str:
    """Return the codec that a description names. Raises StoreError unless the namespace's digest is computed of it."""
    try:
        parsed = parse_description(description)
    except ConfigError as exc:
        raise StoreError(f"the namespace {namespace.hex()} cannot be saved: {exc}") from exc
    if parsed.digest != namespace:
        raise StoreError(
            f"the namespace {namespace.hex()} cannot be saved: its description is that of another namespace"
        )
    return parsed.lossy_codec


class _Writer:
    """Writes the parts of a state file in order."""

    def __init__(self, file: UnfinishedFile, namespace: BlockHash, description: bytes, lossy_codec: str) -> None:
        self._file = file
        self._namespace = namespace
        self._description = description
        self._lossy_codec = lossy_codec
        self._rows: dict[BlockHash, tuple[bytes, bytes, int, int, int, int]] = {}
        self._left_out = 0

    def begin(self) -> None:
        """Write a header that says that the file is not finished, and the description."""
        self._file.append(UNFINISHED_MAGIC.ljust(ALIGN_BYTES, b"\0"))
        self._file.append(self._description)
        self._pad()

    def add(self, record: bytes) -> None:
        """Write a record, if it is sound."""
        try:
            parsed = parse_record(record, lossy_codec=self._lossy_codec)
        except StoreError:
            self._left_out += 1
            return
        info = parsed.info
        if info.namespace != self._namespace:
            self._left_out += 1
            return
        if info.block_hash in self._rows:
            return
        if len(self._rows) == ROW_LIMIT:
            raise StoreError(f"a state file has at most {ROW_LIMIT} blocks")
        row = (info.block_hash, info.parent, self._file.size, parsed.stored_bytes, info.num_tokens, 0)
        self._rows[info.block_hash] = row
        self._file.append(parsed.data.data)
        self._pad()

    def finish(self) -> SavedState:
        """Write the index, and the header last."""
        index_offset = self._file.size
        index = np.array(sorted(self._rows.values()), dtype=ROW).tobytes()
        self._file.append(index)
        header = StateHeader(
            file_bytes=self._file.size,
            description_bytes=len(self._description),
            index_offset=index_offset,
            rows=len(self._rows),
            namespace=self._namespace,
            checksum=xxhash.xxh3_64_intdigest(self._description + index),
        )
        self._file.write_at(header.pack(), 0)
        return SavedState(len(self._rows), header.file_bytes, self._left_out)

    def _pad(self) -> None:
        self._file.append(b"\0" * (-self._file.size % ALIGN_BYTES))
