"""Checks of the cold store: `check_store` compares the databases with each other, `verify_store` reads every byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreBusyError, StoreError
from tierkv.storage.codecs import fits_namespace
from tierkv.storage.cold_children import ChildRow
from tierkv.storage.cold_descriptions import read_lossy_codec
from tierkv.storage.cold_reader import get_value
from tierkv.storage.cold_repair import rebuild_tree, restore_entry
from tierkv.storage.cold_rows import (
    OVERFLOW_HEADER_BYTES,
    ColdEntry,
    Databases,
    get_entry,
    iter_namespaces,
    read_block_info,
    unpack_entry,
)
from tierkv.storage.cold_writer import ColdWriter
from tierkv.storage.lmdb_env import LmdbEnv, ReadTransaction
from tierkv.storage.lmdb_file import CutShortError
from tierkv.storage.record import BlockInfo, read_header, verify_checksum
from tierkv.values.block import TOKEN_BYTES, BlockHash, hash_block

__all__ = ["VerifyReport", "check_store", "repair_store", "verify_block", "verify_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of `verify`. damaged: hashes of damaged blocks, each with its damage. problem: why the databases
    contradict each other, or None. removed: how many blocks a repair removed, with those that followed a damaged block.
    other_formats: sound blocks that another version of this code wrote; a repair keeps them.
    """

    blocks: int
    stored_bytes: int
    damaged: dict[BlockHash, str]
    problem: str | None = None
    removed: int = 0
    other_formats: dict[BlockHash, str] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damaged and self.problem is None


def check_store(txn: ReadTransaction, databases: Databases) -> None:
    """Raise StoreError unless all databases agree with each other."""
    entries = dict(_iter_index(txn, databases))
    stored = sum(txn.get(block_hash, db=databases.blocks) is not None for block_hash in entries)
    total = txn.stat(databases.blocks)["entries"]
    _require(stored == total == len(entries), "the blocks are not those of the index")
    with txn.cursor(db=databases.children) as cursor:
        rows_found = [ChildRow.unpack(key) for key in cursor.iternext(keys=True, values=False)]
    children = {(row.child, row.node) for row in rows_found if row.level == 0}
    _require({row.child for row in rows_found} <= entries.keys(), "a child is listed that is not stored")
    parents = {(block_hash, entry.parent) for block_hash, entry in entries.items()}
    _require(children == parents, "the children are not those of the index")
    totals: Counter[tuple[BlockHash, str]] = Counter()
    for block_hash, entry in entries.items():
        is_root = entry.parent == entry.namespace
        parent = None if is_root else entries.get(entry.parent)
        _require(is_root or parent is not None, f"block {block_hash.hex()} has lost its parent")
        depth = parent.depth + 1 if parent else 0
        _require(entry.depth == depth, f"block {block_hash.hex()} is at a wrong depth")
        for name in ("raw_bytes", "stored_bytes", "value_bytes"):
            totals[entry.namespace, name] += getattr(entry, name)
        totals[entry.namespace, "blocks"] += 1
    rows = dict(iter_namespaces(txn, databases))
    _require({namespace for namespace, _ in totals} <= rows.keys(), "a namespace has no row")
    for digest, row in rows.items():
        if row is None:
            raise CorruptBlockError(f"the row of namespace {digest.hex()} is damaged")
        for name in ("blocks", "raw_bytes", "stored_bytes", "value_bytes"):
            _require(
                getattr(row, name) == totals[digest, name],
                f"{name} of namespace {digest.hex()} is not the sum",
            )


def verify_store(env: LmdbEnv, progress: Callable[[int, int], None] | None) -> VerifyReport:
    """Read every record. Each in a transaction of its own, so that writers may reuse pages meanwhile."""
    try:
        env.check_trees()  # a cursor that comes to a page of another kind would end the process
        with env.read() as txn, txn.cursor(db=Databases(*env.handles).entries) as cursor:
            hashes = {bytes(key) for key in cursor.iternext(keys=True, values=False)}
    except StoreError as exc:
        return VerifyReport(blocks=0, stored_bytes=0, damaged={}, problem=str(exc))
    damaged: dict[BlockHash, str] = {}
    other_formats: dict[BlockHash, str] = {}
    stored_bytes = 0
    problem = None
    for done, block_hash in enumerate(sorted(hashes)):
        if progress is not None:
            progress(done, len(hashes))
        try:
            with env.read() as txn:
                stored_bytes += verify_block(env, txn, Databases(*env.handles), block_hash)
        except FormatVersionError as exc:
            other_formats[block_hash] = str(exc)
        except (StoreBusyError, CutShortError) as exc:  # the same holds for all that are left
            problem = f"{done} of {len(hashes)} blocks were read: {exc}"
            break
        except StoreError as exc:
            if not env.is_open:
                raise
            damaged[block_hash] = str(exc)
    if progress is not None:
        progress(len(hashes), len(hashes))
    if problem is None:
        try:
            with env.read() as txn:
                check_store(txn, Databases(*env.handles))
        except StoreError as exc:
            problem = str(exc)
    return VerifyReport(
        blocks=len(hashes), stored_bytes=stored_bytes, damaged=damaged, problem=problem, other_formats=other_formats
    )


def repair_store(env: LmdbEnv, writer: ColdWriter, report: VerifyReport) -> int:
    """Restore damaged entries, remove damaged blocks with all that follow them, and rebuild the tree.

    Return how many blocks were removed. Raises StoreError.
    """
    removed = sum(_repair(env, writer, block_hash) for block_hash in report.damaged)
    with writer.batch() as batch:
        rebuild_tree(batch)
    return removed


def _repair(env: LmdbEnv, writer: ColdWriter, block_hash: BlockHash) -> int:
    """Restore the entry of a block if only that is damaged; else remove the block. Return how many were removed."""
    try:
        writer.attempt(lambda batch: restore_entry(batch, block_hash))
        with env.read() as txn:
            verify_block(env, txn, Databases(*env.handles), block_hash)
    except FormatVersionError:
        return 0
    except StoreError as exc:
        # Another error, as a busy store's, says nothing about the block.
        if not isinstance(exc, CorruptBlockError) and not isinstance(exc.__cause__, OSError):
            raise
        return writer.attempt(lambda batch: batch.remove_subtree(block_hash))
    return 0


def verify_block(env: LmdbEnv, txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> int:
    """Return the length of a sound record, 0 for a block that is not stored any more.

    Raises CorruptBlockError, FormatVersionError for a sound record of another version.
    """
    entry = get_entry(txn, databases, block_hash)
    value = get_value(env, txn, databases, block_hash)
    if entry is None and value is None:
        return 0
    if entry is None or value is None:
        raise CorruptBlockError("its entry is missing" if entry is None else "its record is missing")
    header = read_header(value)
    verify_checksum(value, header)
    info = header.info
    if info.block_hash != block_hash or hash_block(info.parent, info.token_bytes) != block_hash:
        raise CorruptBlockError("its hash is not that of its parent and tokens")
    if not _follows_its_parent(txn, databases, info):
        raise CorruptBlockError("its content digest is not that of its parent and tokens")
    described = (entry.parent, entry.namespace, entry.stored_bytes, entry.num_tokens, entry.raw_bytes)
    num_tokens = len(info.token_bytes) // TOKEN_BYTES
    if described != (info.parent, info.namespace, header.record_bytes, num_tokens, header.raw_bytes):
        raise CorruptBlockError("its entry describes another record")
    if entry.value_bytes != len(value) + OVERFLOW_HEADER_BYTES:
        raise CorruptBlockError("its entry counts other bytes than it takes")
    lossy_codec = read_lossy_codec(txn, databases, info.namespace)
    if lossy_codec is not None and not fits_namespace(header.codec.name, lossy_codec):
        raise CorruptBlockError(f"its codec is {header.codec.name}, and its namespace does not say so")
    if entry.parent != entry.namespace and txn.get(entry.parent, db=databases.entries) is None:
        raise CorruptBlockError("its parent is not stored")
    return header.record_bytes


def _follows_its_parent(txn: ReadTransaction, databases: Databases, info: BlockInfo) -> bool:
    """Return whether a block's digest follows from its parent's. An unreadable parent is reported for itself."""
    if info.parent == info.namespace:
        return info.follows(None)
    parent = read_block_info(txn, databases, info.parent)
    return parent is None or info.follows(parent)


def _iter_index(txn: ReadTransaction, databases: Databases) -> Iterator[tuple[BlockHash, ColdEntry]]:
    with txn.cursor(db=databases.entries) as cursor:
        for key, value in cursor:
            block_hash = bytes(key)
            yield block_hash, unpack_entry(block_hash, value)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise StoreError(f"the cold store contradicts itself: {problem}", hint="run tierkv verify --repair")
