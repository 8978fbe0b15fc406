"""Cache state: saves every block that a cache holds into one file, and loads such a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import torch

from tierkv.background.call_thread import CallThread
from tierkv.errors import ClosedError, NamespaceMismatchError
from tierkv.index.index import Entry
from tierkv.storage.record import BlockInfo, encode_record
from tierkv.storage.state_file import WRITE_WAIT_S, SavedState, StateFile, write_state_file
from tierkv.transfer.tiers import Tiers
from tierkv.values.files import check_path, translated_errors
from tierkv.values.namespace import Namespace, differing_fields

__all__ = ["FILE_WAIT_S", "load_state", "open_state", "save_state"]

FILE_WAIT_S = WRITE_WAIT_S
"""How long a file system may take to open a state file, or for one read or write of it."""

_NAMES_SHOWN = 8


def save_state(tiers: Tiers, path: str | Path, namespace: Namespace, *, must_end: Callable[[], bool]) -> SavedState:
    """Write the record of every block that some tier has into one file, atomically.

    must_end: whether the cache is being closed. Raises StoreError, ConfigError, ClosedError.
    """
    path = check_path(path)
    what = f"cannot write {path}"
    with (
        translated_errors(what, lmdb.Error, RuntimeError),
        CallThread(what, wait_s=FILE_WAIT_S, must_end=must_end) as calls,
    ):
        return write_state_file(
            path,
            namespace=namespace.digest,
            description=namespace.describe(),
            records=_iter_records(tiers, calls, must_end),
            calls=calls,
        )


def load_state(tiers: Tiers, path: str | Path, namespace: Namespace, *, must_end: Callable[[], bool]) -> StateFile:
    """Make a state file of this namespace one more source of blocks; a file that is loaded already is kept.

    Raises as `open_state` does; CapacityError where too many are loaded.
    """
    return tiers.states.add(open_state(path, namespace, must_end=must_end))


def open_state(path: str | Path, namespace: Namespace, *, must_end: Callable[[], bool] = lambda: False) -> StateFile:
    """Open a state file of this namespace; the caller closes it.

    must_end: whether the cache is being closed.
    Raises NamespaceMismatchError naming what differs, StoreError for a file that is none or not whole, ConfigError for
    what is no path, ClosedError.
    """
    path = check_path(path)
    with CallThread(f"cannot read the state file {path}", wait_s=FILE_WAIT_S, must_end=must_end) as calls:
        state = calls.call(partial(StateFile, path), undo=StateFile.close)
    if state.namespace != namespace.digest:
        state.close()
        mine = {"name": namespace.name, **namespace.identity()}
        names = [ascii(name)[1:-1] for name in differing_fields(state.description.fields, mine)] or ["salt"]
        more = [f"and {len(names) - _NAMES_SHOWN} more"] if len(names) > _NAMES_SHOWN else []
        raise NamespaceMismatchError(
            f"{path} was saved for another model or setting: {', '.join(names[:_NAMES_SHOWN] + more)} differ"
        )
    return state


def _iter_records(tiers: Tiers, calls: CallThread, must_end: Callable[[], bool]) -> Iterator[bytes]:
    """Yield the record of every block that some tier has, each once. What cannot be read is left out."""
    seen: set[bytes] = set()
    if cold := tiers.cold:
        for block_hash, _ in calls.call(lambda: list(cold.iter_entries(tiers.namespace))):
            record = calls.call(partial(cold.read_record, block_hash))
            if record is not None:
                seen.add(block_hash)
                yield record
    with tiers.changed:
        entries = [entry for entry in tiers.index if entry.block_hash not in seen]
    for entry in entries:
        if must_end():
            raise ClosedError("the cache is being closed")
        block = _copy_of(tiers, entry)
        if block is not None:
            seen.add(entry.block_hash)
            yield _encode(tiers, entry, block)
    for state in tiers.states.files:
        records = state.iter_records(seen)
        while (record := calls.call(partial(next, records, None))) is not None:
            yield record


def _copy_of(tiers: Tiers, entry: Entry) -> npt.NDArray[np.uint8] | None:
    """Return a copy of an entry's bytes from the warm or the hot tier, or None if it has left both."""
    with tiers.changed:
        if entry.warm_slot is not None:
            return tiers.memory.copy_warm(entry.warm_slot)
        if entry.block_id is not None:
            copied: npt.NDArray[np.uint8] = np.empty(tiers.layout.block_bytes, dtype=np.uint8)
            tiers.copies.written(entry).wait()
            torch.from_numpy(copied).copy_(tiers.memory.hot.bytes_view[entry.block_id])
            return copied
        return None


def _encode(tiers: Tiers, entry: Entry, block: npt.NDArray[np.uint8]) -> bytes:
    with tiers.changed:
        content_digest = tiers.index.content_digest_of(entry)
    info = BlockInfo.of(entry, namespace=tiers.namespace, content_digest=content_digest)
    return encode_record(info, block, layout=tiers.layout, codec=tiers.memory.codec).data.tobytes()
