"""Repairs of the cold store within a write transaction: of an entry, of a damaged block, of the whole tree."""

from __future__ import annotations

from dataclasses import replace

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.cold_batch import WriteBatch
from tierkv.storage.cold_children import ChildRow
from tierkv.storage.cold_rows import ColdEntry
from tierkv.storage.record import parse_record, read_header
from tierkv.values.block import BlockHash

__all__ = ["rebuild_tree", "repair_block", "restore_entry"]


def restore_entry(batch: WriteBatch, block_hash: BlockHash) -> ColdEntry | None:
    """Make the damaged entry of a sound block anew; return it, or None if the block is damaged too.

    Times, counts and a pin are lost.
    """
    value = batch.value(block_hash)
    if value is None or batch.entry(block_hash) is not None:
        return batch.entry(block_hash)
    try:
        record = parse_record(value)
    except StoreError:
        return None
    if record.info.block_hash != block_hash or not batch.is_behind_its_parent(record.info):
        return None
    entry = batch.new_entry(record)
    if entry is not None:
        batch.write_entry(block_hash, entry)
    return entry


def repair_block(batch: WriteBatch, block_hash: BlockHash) -> int:
    """Repair a block that a reader found damaged, or remove it with all that follow it; return how many were removed.

    A sound block, and a block of a format that this code does not know, stay. A damaged entry is made anew.
    """
    value = batch.value(block_hash)
    try:
        record = None if value is None else parse_record(value)
    except FormatVersionError:
        return 0
    except StoreError:
        record = None
    info = record.info if record and batch.allows_codec(record.info.namespace, record.codec) else None
    if info is not None and info.block_hash == block_hash and restore_entry(batch, block_hash) is not None:
        return 0
    return batch.remove_subtree(block_hash)


def rebuild_tree(batch: WriteBatch) -> None:
    """Make the children table and the namespaces' totals anew from entries and blocks.

    Rows of blocks of another format are kept: this code cannot read their tokens.
    """
    txn, databases = batch.txn, batch.databases
    with txn.cursor(db=databases.children) as cursor:
        keys = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
    kept = [key for key in keys if _is_row_of_another_format(batch, key)]
    txn.drop(databases.children, delete=False)
    for key in kept:
        txn.put(key, b"", db=databases.children)
    for row in batch.rows.values():
        row.blocks = row.raw_bytes = row.stored_bytes = row.value_bytes = 0
    with txn.cursor(db=databases.entries) as cursor:
        hashes = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
    for block_hash in hashes:
        entry, tokens = batch.entry(block_hash), batch.read_tokens(block_hash)
        if entry is not None and tokens is not None:
            batch.children.insert(entry.parent, tokens, block_hash, batch.read_tokens)
        if entry is not None and (tokens is not None or _is_of_another_format(batch, block_hash)):
            batch.count(entry, 1)
    _correct_depths(batch, hashes)


def _correct_depths(batch: WriteBatch, hashes: list[BlockHash]) -> None:
    """Correct how many blocks precede each of these blocks, in their entries; the chains may be cycles."""
    depths: dict[BlockHash, int] = {}
    for block_hash in hashes:
        chain: dict[BlockHash, ColdEntry] = {}
        at = block_hash
        while at not in depths and at not in chain and (entry := batch.entry(at)) is not None:
            chain[at] = entry
            at = entry.parent
        depth = depths.get(at, -1)
        for each, entry in reversed(chain.items()):
            depth += 1
            depths[each] = depth
            if entry.depth != depth:
                batch.write_entry(each, replace(entry, depth=depth))


def _is_row_of_another_format(batch: WriteBatch, key: bytes) -> bool:
    """Return whether a key is a row of a block of another format, under the parent that its entry names."""
    try:
        row = ChildRow.unpack(key)
    except CorruptBlockError:
        return False
    entry = batch.entry(row.child) if _is_of_another_format(batch, row.child) else None
    return entry is not None and (row.level > 0 or row.node == entry.parent)


def _is_of_another_format(batch: WriteBatch, block_hash: BlockHash) -> bool:
    value = batch.txn.get(block_hash, db=batch.databases.blocks)
    try:
        return value is not None and read_header(value) is None
    except FormatVersionError:
        return True
    except StoreError:
        return False
