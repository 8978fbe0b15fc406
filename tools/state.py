"""`tierkv save` and `tierkv load`: a store's blocks in one file, and back."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord, parse_record
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.tools.render import format_bytes
from tierkv.tools.stores import find_namespace, open_existing, require_place
from tierkv.values.block import BlockHash
from tierkv.values.files import translated_errors

__all__ = ["load", "save"]

_BATCH_RECORDS = 16
_BATCH_BYTES = 64 << 20
_IN_THE_STORE = {PutOutcome.STORED.value, PutOutcome.EXISTS.value}


def save(path: Path, store_path: Path, *, namespace: str | None, as_json: bool) -> None:
    """Write one namespace of a store into a state file, atomically. Damaged blocks are left out, and told."""
    with open_existing(store_path) as store:
        chosen = find_namespace(store, namespace)
        if not chosen.description:
            raise StoreError(
                f"namespace {chosen.digest.hex()} cannot be saved: {chosen.problem or 'its description is lost'}",
                hint="a command with its model writes the description again",
            )
        saved = write_state_file(
            path,
            namespace=chosen.digest,
            description=chosen.raw_description,
            records=_iter_records(store, chosen.digest),
        )
    left_out = max(0, chosen.blocks - saved.blocks)
    if as_json:
        print(json.dumps({"blocks": saved.blocks, "bytes_file": saved.file_bytes, "blocks_left_out": left_out}))
    else:
        print(f"saved {saved.blocks} blocks, {format_bytes(saved.file_bytes)}, to {path}")
        if left_out:
            print(f"{left_out} were left out: damaged, or of another version; `tierkv verify` tells", file=sys.stderr)


def load(path: Path, store_path: Path, *, cold_bytes: int | None, min_free_bytes: int | None, as_json: bool) -> None:
    """Put a state file's sound blocks into a store, made if need be.

    Raises StoreError for a file that is none, and afterwards, with what is stored, if not all blocks are in the store.
    """
    with StateFile(path) as state:
        require_place(store_path, min_free_bytes=min_free_bytes)
        with ColdStore(store_path, quota_bytes=cold_bytes, min_free_bytes=min_free_bytes) as store:
            _load(path, state, store, as_json=as_json)


def _load(path: Path, state: StateFile, store: ColdStore, *, as_json: bool) -> None:
    store.register_namespace(state.namespace, state.raw_description)
    with translated_errors(f"cannot load {path}"):
        outcomes = Counter(_put_all(state, store))
    store.flush()
    stored, existing = outcomes[PutOutcome.STORED], outcomes[PutOutcome.EXISTS]
    damaged = len(state) - outcomes.total()
    evicted = store.stats().evicted_blocks
    if stored + existing < len(state):
        missing = {"damaged": damaged} | {why.value: count for why, count in outcomes.items()}
        told = ", ".join(f"{count} {why}" for why, count in missing.items() if count and why not in _IN_THE_STORE)
        raise StoreError(
            f"{stored + existing} of the {len(state)} blocks of {path} are in the store now; not: {told}"
            + (f"; {evicted} blocks were evicted for them" if evicted else "")
        )
    if as_json:
        result = {"blocks": len(state), "blocks_stored": stored, "blocks_existing": existing}
        print(json.dumps({**result, "blocks_evicted": evicted}))
    else:
        print(
            f"loaded {stored} blocks from {path}; {existing} were there already"
            + (f"; {evicted} blocks were evicted to make room" if evicted else "")
        )


def _iter_records(store: ColdStore, namespace: BlockHash) -> Iterator[bytes]:
    for block_hash, _ in list(store.iter_entries(namespace)):
        record = store.read_record(block_hash)
        if record is not None:
            yield record


def _put_all(state: StateFile, store: ColdStore) -> Iterator[PutOutcome]:
    batch: list[EncodedRecord] = []
    for record in state.iter_records():
        batch.append(parse_record(record))
        if len(batch) == _BATCH_RECORDS or sum(each.stored_bytes for each in batch) >= _BATCH_BYTES:
            yield from store.put(batch)
            batch = []
    yield from store.put(batch)
