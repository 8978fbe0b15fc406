"""Everything that a store holds, block after block: read for a backup or a move, and put into another store."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from tierkv.errors import CapacityError, ConfigError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import ColdEntry
from tierkv.storage.cold_tenants import TenantSettings
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord, parse_record
from tierkv.values.block import BlockHash

__all__ = ["StoreSettings", "StoredBlock", "iter_stored", "put_stored", "restore_settings"]

_BATCH_BLOCKS = 16
_BATCH_BYTES = 64 << 20
_ORDER = np.dtype([("namespace", "<u4"), ("depth", "<u4"), ("hash", "V16")])

_logger = logging.getLogger(__name__)


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a store keeps beside its blocks. tenants: by id."""

    quota_bytes: int
    tenants: dict[str, TenantSettings]


class StoredBlock(NamedTuple):
    """One block with what a store knows of it. pin_end: None for a pin without an end."""

    record: EncodedRecord
    entry: ColdEntry
    pin_end: float | None


def iter_stored(store: ColdStore, namespaces: Sequence[BlockHash]) -> Iterator[StoredBlock | None]:
    """Yield the blocks of namespaces, parents before children; None for each that cannot be had.

    That is a block that is damaged, of another version, or evicted meanwhile, and one that follows such a block, or one
    that was stored meanwhile. Takes 24 bytes of memory for each block, and the hashes of two levels of the tree.
    """
    number_of = {digest: number for number, digest in enumerate(namespaces)}
    rows = np.fromiter(
        (
            (number_of[entry.namespace], entry.depth, block_hash)
            for block_hash, entry in store.iter_entries()
            if entry.namespace in number_of
        ),
        dtype=_ORDER,
    )
    ends = store.pin_ends()
    parents: set[BlockHash] = set()
    yielded: set[BlockHash] = set()
    level = (-1, 0)
    for row in np.argsort(rows[["namespace", "depth"]], order=("namespace", "depth"), kind="stable"):
        number, depth = int(rows["namespace"][row]), int(rows["depth"][row])
        if (number, depth) != level:
            follows = level == (number, depth - 1)
            parents, yielded = yielded if follows else set() if depth else {namespaces[number]}, set()
            level = (number, depth)
        block_hash = rows["hash"][row].tobytes()
        entry = store.lookup(block_hash)
        data = store.read_record(block_hash) if entry is not None and entry.parent in parents else None
        if entry is None or data is None:
            yield None
            continue
        yielded.add(block_hash)
        yield StoredBlock(parse_record(data, cost_s=entry.cost_s), entry, ends.get(block_hash))


def put_stored(store: ColdStore, blocks: Iterable[StoredBlock]) -> Counter[PutOutcome]:
    """Put blocks, parents before children, with the times, counts and pins that they had. Return the outcomes.

    A block that is there already keeps its own.
    """
    outcomes: Counter[PutOutcome] = Counter()
    batch: list[StoredBlock] = []

    def flush() -> None:
        found = store.put([each.record for each in batch])
        outcomes.update(found)
        new = [each for each, outcome in zip(batch, found, strict=True) if outcome is PutOutcome.STORED]
        if new:
            store.set_history({each.record.info.block_hash: (each.entry, each.pin_end) for each in new})
        batch.clear()

    try:
        for block in blocks:
            batch.append(block)
            if len(batch) == _BATCH_BLOCKS or sum(each.record.stored_bytes for each in batch) >= _BATCH_BYTES:
                flush()
    finally:  # what came before a damaged frame is sound
        flush()
    return outcomes


def restore_settings(store: ColdStore, settings: StoreSettings) -> None:
    """Store the settings of those tenants that have none here. What contradicts others is left out, and logged.

    A store without any gets all of them as they were, also where their quota was lowered below the shares.
    """
    known = store.tenants()
    if not known:
        with contextlib.suppress(ConfigError):
            store.set_tenants(settings.tenants, may_exceed=True)
            return
    for tenant, each in settings.tenants.items():
        if tenant in known:
            continue
        try:
            store.set_tenants({tenant: each}, evict=False)
        except (ConfigError, CapacityError) as exc:
            _logger.warning("the settings of tenant %s are not restored: %s", ascii(each.name), exc)
