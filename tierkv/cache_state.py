"""Cache state: the record of every block that a cache holds, to be saved, and a saved file that fits the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tierkv.errors import NamespaceMismatchError
from tierkv.index import Entry
from tierkv.namespace import Namespace, differing_fields
from tierkv.storage.record import BlockInfo, encode_record
from tierkv.storage.state_file import StateFile
from tierkv.tiers import Tiers

__all__ = ["iter_records", "open_state"]


def open_state(path: Path, namespace: Namespace) -> StateFile:
    """Open a state file of this namespace; the caller closes it.

    Raises NamespaceMismatchError naming what differs, StoreError for a file that is none or not whole.
    """
    state = StateFile(path)
    if state.namespace != namespace.digest:
        state.close()
        mine = {"name": namespace.name, **namespace.identity()}
        names = ", ".join(differing_fields(state.description.fields, mine)) or "salt"
        raise NamespaceMismatchError(f"{path} was saved for another model or setting: {names} differ")
    return state


def iter_records(tiers: Tiers) -> Iterator[bytes]:
    """Yield the record of every block that some tier has, each once."""
    seen: set[bytes] = set()
    if cold := tiers.cold:
        for block_hash, _ in list(cold.iter_entries(tiers.namespace)):
            record = cold.read_record(block_hash)
            if record is not None:
                seen.add(block_hash)
                yield record
    with tiers.changed:
        entries = [entry for entry in tiers.index if entry.block_hash not in seen]
    for entry in entries:
        block = _copy_of(tiers, entry)
        if block is not None:
            seen.add(entry.block_hash)
            yield _encode(tiers, entry, block)
    for state in tiers.states:
        yield from state.iter_records(seen)


def _copy_of(tiers: Tiers, entry: Entry) -> npt.NDArray[np.uint8] | None:
    """Return a copy of an entry's bytes from the warm or the hot tier, or None if it has left both."""
    with tiers.changed:
        if entry.warm_slot is not None:
            return tiers.copy_warm(entry.warm_slot)
        if entry.block_id is not None:
            copied: npt.NDArray[np.uint8] = np.empty(tiers.layout.block_bytes, dtype=np.uint8)
            tiers.written(entry).wait()
            torch.from_numpy(copied).copy_(tiers.hot.bytes_view[entry.block_id])
            return copied
        return None


def _encode(tiers: Tiers, entry: Entry, block: npt.NDArray[np.uint8]) -> bytes:
    with tiers.changed:
        seal = tiers.index.seal_of(entry)
    info = BlockInfo(
        block_hash=entry.block_hash,
        parent=entry.parent_hash,
        namespace=tiers.namespace,
        seal=seal,
        token_bytes=entry.token_bytes,
    )
    return encode_record(info, block, layout=tiers.layout, codec=tiers.codec).data.tobytes()
