"""`tierkv save` and `tierkv load`: a store's blocks written into one file, and put back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord, parse_record
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.tools.options import AsJson, ColdSize, MinFree, StatePath, parse_optional_size, spread
from tierkv.tools.stores import StoreOptions, find_namespace, open_existing, require_place
from tierkv.tools.terminal import print_json
from tierkv.values.block import BlockHash
from tierkv.values.files import translated_errors
from tierkv.values.units import format_bytes

__all__ = ["load", "save"]

_BATCH_RECORDS = 16
_BATCH_BYTES = 64 << 20
_IN_THE_STORE = {PutOutcome.STORED.value, PutOutcome.EXISTS.value}


@spread()
def save(
    file: StatePath,
    where: StoreOptions,
    namespace: Annotated[str | None, typer.Option(help="Leading hex digits, where there are several.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a store's blocks of one namespace into one file, atomically. Damaged blocks are left out and counted."""
    with open_existing(where.path) as store:
        chosen = find_namespace(store, namespace)
        if not chosen.description:
            raise StoreError(
                f"namespace {chosen.digest.hex()} cannot be saved: {chosen.problem or 'its description is lost'}",
                hint="a command with its model writes the description again",
            )
        saved = write_state_file(
            file,
            namespace=chosen.digest,
            description=chosen.raw_description,
            records=_iter_records(store, chosen.digest),
        )
    left_out = max(0, chosen.blocks - saved.blocks)
    if as_json:
        print_json({"blocks": saved.blocks, "bytes_file": saved.file_bytes, "blocks_left_out": left_out})
    else:
        print(f"saved {saved.blocks} blocks, {format_bytes(saved.file_bytes)}, to {file}")
        if left_out:
            print(f"{left_out} damaged or of another version were left out: see `tierkv verify`", file=sys.stderr)


@spread()
def load(
    file: StatePath,
    where: StoreOptions,
    cold: ColdSize = None,
    min_free: MinFree = None,
    as_json: AsJson = False,
) -> None:
    """Put the sound blocks of a state file into a store, which is made if need be.

    Fails, with what is stored kept, if not all blocks of the file are in the store afterwards.
    """
    path, cold_bytes, min_free_bytes = where.path, parse_optional_size(cold), parse_optional_size(min_free)
    with StateFile(file) as state:
        require_place(path, min_free_bytes=min_free_bytes)
        with ColdStore(path, quota_bytes=cold_bytes, min_free_bytes=min_free_bytes) as store:
            _load(file, state, store, as_json=as_json)


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
        reasons = ", ".join(f"{count} {why}" for why, count in missing.items() if count and why not in _IN_THE_STORE)
        raise StoreError(
            f"{stored + existing} of the {len(state)} blocks of {path} are in the store now; not: {reasons}"
            + (f"; {evicted} blocks were evicted for them" if evicted else "")
        )
    if as_json:
        result = {"blocks": len(state), "blocks_stored": stored, "blocks_existing": existing}
        print_json({**result, "blocks_evicted": evicted})
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
