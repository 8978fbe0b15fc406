"""A whole store in one file: every namespace, with the tenants' settings, ages, counts and pins.

The file is a stream of frames, written and read once from the first to the last, so a save and a load need memory for
one block and a few numbers for each. Each frame has a checksum; the last one counts the others and covers their
checksums. FORMAT.md has the layout.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import xxhash

from tierkv.background.call_thread import CallThread
from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import ENTRY_BYTES, pack_entry, unpack_entry
from tierkv.storage.record import parse_record
from tierkv.storage.unfinished_file import BACKUP_MAGIC, UNFINISHED_MAGIC, WRITE_WAIT_S, UnfinishedFile
from tierkv.storage.whole_store import StoredBlock, StoreSettings, iter_stored
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.files import check_path, open_regular, translated_errors
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = ["BackupFile", "SavedBackup", "is_backup", "write_backup"]

BACKUP_VERSION = 1
_HEADER = struct.Struct("<8sII")  # magic, version, 0
_FRAME = struct.Struct("<4sIQQ")  # kind, 0, bytes of the payload, xxh3-64 of kind, bytes and payload
_PIN_END = struct.Struct("<d")
_STORE, _NAMESPACE, _BLOCK, _END = b"STOR", b"NAME", b"BLOK", b"DONE"
_LIMITS = {
    _STORE: 1 << 20,
    _NAMESPACE: HASH_BYTES + DESCRIPTION_LIMIT_BYTES,
    _BLOCK: (1 << 32) + (1 << 20),
    _END: 1 << 10,
}
_NO_END = float("inf")

Decoded = TypeVar("Decoded")


class _Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The last frame. frames: those before it; checksum: xxh3-64 of their checksums."""

    blocks: int
    frames: int
    checksum: int


@dataclass(frozen=True, slots=True)
class SavedBackup:
    """The result of a save. left_out: blocks that are damaged, of another version, or follow such a block, and those
    that were evicted meanwhile.
    """

    namespaces: int
    blocks: int
    file_bytes: int
    left_out: int


def write_backup(path: Path, store: ColdStore, namespaces: Collection[BlockHash] | None = None) -> SavedBackup:
    """Write a store's namespaces, all where None, into one file, atomically: beside the target, synced, then renamed.

    Each record is checked as it is read. The target may be missing or a regular file; a symbolic link is refused.
    Raises StoreError if the file cannot be written; the target is then unchanged. Other processes may use the store.
    """
    path = check_path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(translated_errors(f"cannot write {path}"))
        path = path.absolute()
        calls = stack.enter_context(CallThread(f"cannot write {path}", wait_s=WRITE_WAIT_S))
        file = calls.call(partial(UnfinishedFile.beside, path), undo=UnfinishedFile.remove)
        try:
            writer = _Writer(file, calls)
            saved = _write_all(writer, store, namespaces)
            calls.call(file.sync)
            calls.call(partial(file.replace, path))
        except BaseException:
            calls.clean_up(file.remove)
            raise
        return saved


def is_backup(path: Path) -> bool:
    """Return whether a file begins as a backup does. Raises StoreError where it cannot be read."""
    with translated_errors(f"cannot read {path}"):
        fd = open_regular(check_path(path).absolute())
        try:
            return os.pread(fd, len(BACKUP_MAGIC), 0) == BACKUP_MAGIC
        finally:
            os.close(fd)


class BackupFile:
    """A backup that is read from its begin to its end. Context manager.

    settings: of the store. damaged: how many blocks were damaged so far, each in a whole frame.
    Raises StoreError unless there is a regular file, CorruptBlockError where it is no backup, FormatVersionError.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = check_path(path)
        self.damaged: int = 0
        with translated_errors(f"cannot read the backup {self.path}"):
            self._file: BinaryIO = os.fdopen(open_regular(self.path.absolute()), "rb")
            self._num_left = os.fstat(self._file.fileno()).st_size - _HEADER.size
            self._checksums = xxhash.xxh3_64()
            self._frames = 0
            try:
                self.settings: StoreSettings = self._begin()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> BackupFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def read(self) -> Iterator[tuple[BlockHash, bytes] | StoredBlock]:
        """Yield namespaces, (digest, description), each before its blocks, and blocks, parents before children.

        Raises CorruptBlockError at the end unless the file is whole: what was yielded before was sound for itself.
        """
        blocks = 0
        while True:
            kind, payload = self._next()
            if kind == _END:
                totals = self._decoded(payload, _Totals)
                self._require(
                    (totals.blocks, totals.frames, totals.checksum)
                    == (blocks, self._frames - 1, self._checksum_before),
                    "frames are missing or damaged",
                )
                self._require(not self._file.read(1), "something follows its end")
                return
            if kind == _NAMESPACE:
                yield payload[:HASH_BYTES], payload[HASH_BYTES:]
            elif kind == _BLOCK:
                blocks += 1
                try:
                    block = _unpack_block(payload)
                except StoreError:
                    self.damaged += 1
                    continue
                yield block

    def _begin(self) -> StoreSettings:
        header = self._file.read(_HEADER.size)
        self._require(len(header) == _HEADER.size and header[:8] == BACKUP_MAGIC, "it is no backup")
        version = _HEADER.unpack(header)[1]
        if version != BACKUP_VERSION:
            raise FormatVersionError(
                f"the backup {self.path} has format {version}, this tierkv reads {BACKUP_VERSION}",
                hint="use the version of tierkv that wrote it",
            )
        kind, payload = self._next()
        self._require(kind == _STORE, "it does not begin with the store")
        settings = self._decoded(payload, StoreSettings)
        self._require(0 < settings.quota_bytes < 1 << 62, "its quota is impossible")
        return settings

    def _next(self) -> tuple[bytes, bytes]:
        """Return the kind and the payload of the next frame. Raises CorruptBlockError unless it is whole.

        The payload of a block may be damaged: its record has a checksum of its own.
        """
        with translated_errors(f"cannot read the backup {self.path}"):
            header = self._file.read(_FRAME.size)
            self._require(len(header) == _FRAME.size, "it is cut short")
            kind, _, size, checksum = _FRAME.unpack(header)
            limit = min(_LIMITS.get(kind, 0), self._num_left - _FRAME.size)
            self._require(kind in _LIMITS and size <= limit, "it is cut short, or a frame is damaged")
            payload = self._file.read(size)
            self._num_left -= _FRAME.size + size
        self._require(len(payload) == size, "it is cut short")
        self._require(kind == _BLOCK or _checksum(kind, payload) == checksum, "a frame is damaged")
        self._checksum_before = self._checksums.intdigest()
        self._checksums.update(header[-8:])
        self._frames += 1
        if kind == _BLOCK and _checksum(kind, payload) != checksum:
            return kind, b""
        return kind, payload

    def _decoded(self, payload: bytes, kind: type[Decoded]) -> Decoded:
        try:
            return msgspec.msgpack.decode(payload, type=kind)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise CorruptBlockError(f"the backup {self.path} cannot be used: {exc}") from exc

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise CorruptBlockError(f"the backup {self.path} cannot be used: {problem}")


class _Writer:
    """Writes frames. Every call of the disk is on the thread of `calls`."""

    def __init__(self, file: UnfinishedFile, calls: CallThread) -> None:
        self._file = file
        self._calls = calls
        self._checksums = xxhash.xxh3_64()
        self._frames = 0
        self._append(UNFINISHED_MAGIC.ljust(_HEADER.size, b"\0"))

    def add(self, kind: bytes, *parts: bytes | memoryview) -> None:
        """Append one frame."""
        assert sum(map(len, parts)) <= _LIMITS[kind], "a frame that no reader accepts"
        checksum = _checksum(kind, *parts)
        self._append(_FRAME.pack(kind, 0, sum(map(len, parts)), checksum), *parts)
        self._checksums.update(checksum.to_bytes(8, "little"))
        self._frames += 1

    def finish(self, blocks: int) -> int:
        """Append the last frame, and write the header last. Return the file's length."""
        totals = _Totals(blocks=blocks, frames=self._frames, checksum=self._checksums.intdigest())
        self.add(_END, msgspec.msgpack.encode(totals))
        self._calls.call(partial(self._file.write_at, _HEADER.pack(BACKUP_MAGIC, BACKUP_VERSION, 0), 0))
        return self._file.size

    def _append(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._calls.call(partial(self._file.append, part))


def _write_all(writer: _Writer, store: ColdStore, namespaces: Collection[BlockHash] | None) -> SavedBackup:
    chosen = [each for each in store.namespaces() if namespaces is None or each.digest in namespaces]
    kept = {each.tenant for each in chosen}
    tenants = {tenant: each for tenant, each in store.tenants().items() if namespaces is None or tenant in kept}
    settings = StoreSettings(quota_bytes=store.stats().quota_bytes, tenants=tenants)
    writer.add(_STORE, msgspec.msgpack.encode(settings))
    for each in chosen:
        writer.add(_NAMESPACE, each.digest, each.raw_description)
    blocks = left_out = 0
    for block in iter_stored(store, [each.digest for each in chosen]):
        if block is None:
            left_out += 1
            continue
        entry = pack_entry(block.record.info.block_hash, block.entry)
        pin_end = _PIN_END.pack(_NO_END if block.pin_end is None else block.pin_end)
        writer.add(_BLOCK, block.record.info.block_hash, entry, pin_end, block.record.data.data)
        blocks += 1
    return SavedBackup(len(chosen), blocks, writer.finish(blocks), left_out)


def _unpack_block(payload: bytes) -> StoredBlock:
    """Return a block. Raises StoreError unless record and entry are sound and describe one block."""
    if len(payload) < HASH_BYTES + ENTRY_BYTES + _PIN_END.size:
        raise CorruptBlockError("a frame is damaged")
    view = memoryview(payload)
    block_hash, view = bytes(view[:HASH_BYTES]), view[HASH_BYTES:]
    entry = unpack_entry(block_hash, view[:ENTRY_BYTES])
    (pin_end,) = _PIN_END.unpack(view[ENTRY_BYTES : ENTRY_BYTES + _PIN_END.size])
    record = parse_record(view[ENTRY_BYTES + _PIN_END.size :], cost_s=entry.cost_s)
    info = record.info
    if (info.block_hash, info.parent, info.namespace) != (block_hash, entry.parent, entry.namespace):
        raise CorruptBlockError("the entry of a block describes another one")
    return StoredBlock(record, entry, None if pin_end == _NO_END or pin_end != pin_end else pin_end)


def _checksum(kind: bytes, *parts: bytes | memoryview) -> int:
    state = xxhash.xxh3_64(kind + sum(map(len, parts)).to_bytes(8, "little"))
    for part in parts:
        state.update(part)
    return state.intdigest()
