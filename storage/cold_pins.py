"""Pins of the cold store that end: when each does, in the store, so that every process unpins the block then.

Two rows of `meta` for each such pin: by block hash, when it ends; and by time, so that the first row is the pin that
ends first. A pin for good has none.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from tierkv.errors import CorruptBlockError
from tierkv.storage.cold_rows import Databases, add_checksum, checked_value
from tierkv.storage.lmdb_env import ReadTransaction, WriteTransaction
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = ["PIN_PREFIX", "UNPIN_PREFIX", "expired_pins", "iter_pin_ends", "set_pin_end"]

PIN_PREFIX = b"pin"
UNPIN_PREFIX = b"unpin"
_TIME = struct.Struct(">Q")  # microseconds, big-endian: sorted as they are
_MAX_TIME = (1 << 63) - 1


def set_pin_end(txn: WriteTransaction, databases: Databases, block_hash: BlockHash, until: float | None) -> None:
    """Note when the pin of a block ends, in place of what was noted before. until: None for never, or no pin."""
    key = PIN_PREFIX + block_hash
    old = _unpack(txn.get(key, db=databases.meta))
    if old is not None:
        txn.delete(UNPIN_PREFIX + old + block_hash, db=databases.meta)
    if until is None:
        txn.delete(key, db=databases.meta)
        return
    packed = _TIME.pack(_microseconds(until))
    txn.put(key, add_checksum(packed), db=databases.meta)
    txn.put(UNPIN_PREFIX + packed + block_hash, b"", db=databases.meta)


def expired_pins(txn: WriteTransaction, databases: Databases, now: float) -> list[BlockHash]:
    """Return the blocks whose pins have ended, and remove their rows. A block's own row decides."""
    found: list[BlockHash] = []
    keys: list[bytes] = []
    end = UNPIN_PREFIX + _TIME.pack(_microseconds(now))
    with txn.cursor(db=databases.meta) as cursor:
        more = cursor.set_range(UNPIN_PREFIX)
        while more and (key := bytes(cursor.key())).startswith(UNPIN_PREFIX) and key[: len(end)] <= end:
            keys.append(key)
            more = cursor.next()
    for key in keys:
        block_hash, packed = key[-HASH_BYTES:], key[len(UNPIN_PREFIX) : len(end)]
        txn.delete(key, db=databases.meta)
        if _unpack(txn.get(PIN_PREFIX + block_hash, db=databases.meta)) == packed:
            txn.delete(PIN_PREFIX + block_hash, db=databases.meta)
            found.append(block_hash)
    return found


def iter_pin_ends(txn: ReadTransaction, databases: Databases) -> Iterator[tuple[BlockHash, float]]:
    """Yield each block whose pin ends, and when, in seconds of the store's clock."""
    with txn.cursor(db=databases.meta) as cursor:
        more = cursor.set_range(PIN_PREFIX)
        while more and (key := bytes(cursor.key())).startswith(PIN_PREFIX):
            packed = _unpack(cursor.value())
            if packed is not None and len(key) == len(PIN_PREFIX) + HASH_BYTES:
                yield key[len(PIN_PREFIX) :], _TIME.unpack(packed)[0] / 1e6
            more = cursor.next()


def _microseconds(at: float) -> int:
    scaled = at * 1e6  # infinite also for finite times that a backup may have
    return math.ceil(scaled) if 0 <= scaled < _MAX_TIME else 0 if scaled < 0 else _MAX_TIME


def _unpack(packed: bytes | memoryview | None) -> bytes | None:
    """Return the packed time of a row; None without a row, and for a damaged one."""
    try:
        value = None if packed is None else checked_value(packed)
    except CorruptBlockError:
        return None
    return value if value is not None and len(value) == _TIME.size else None
