"""`tierkv save` and `tierkv load`: a namespace's blocks, or a whole store, written into one file, and put back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tierkv.errors import ConfigError, CorruptBlockError, StoreError
from tierkv.storage.backup import BackupFile, is_backup, write_backup
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import NO_DESCRIPTION
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord, parse_record
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.storage.whole_store import StoredBlock, put_stored, restore_settings
from tierkv.tools.options import AsJson, ColdSize, MinFree, StatePath, parse_optional_size, spread
from tierkv.tools.stores import StoreOptions, find_namespace, open_existing, require_place
from tierkv.tools.tenants import TenantNames
from tierkv.tools.terminal import print_json, visible
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
    namespace: Annotated[str | None, typer.Option(help="Leading hex digits or name, where there are several.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="A backup: every namespace, with tenants' settings, ages and pins.")
    ] = False,
    tenant: Annotated[
        str | None, typer.Option(help="A backup of one tenant: its name, leading digits of its id, or its salt.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a store's blocks into one file, atomically: of one namespace, or with --all of the whole store.

    Damaged blocks are left out and counted. tierkv load puts either file back.
    """
    if everything or tenant is not None:
        if namespace is not None or (everything and tenant is not None):
            raise ConfigError("say one of --namespace, --tenant and --all")
        _save_backup(file, where, tenant, as_json=as_json)
        return
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
    _print_saved({"blocks": saved.blocks, "bytes_file": saved.file_bytes, "blocks_left_out": left_out}, file, as_json)


def _save_backup(file: Path, where: StoreOptions, tenant: str | None, *, as_json: bool) -> None:
    with open_existing(where.path) as store:
        wanted = None
        if tenant is not None:
            chosen = TenantNames.of(store).find(tenant)
            wanted = [each.digest for each in store.namespaces() if each.tenant == chosen]
        saved = write_backup(file, store, wanted)
    result = {"namespaces": saved.namespaces, "blocks": saved.blocks, "bytes_file": saved.file_bytes}
    _print_saved({**result, "blocks_left_out": saved.left_out}, file, as_json)


def _print_saved(result: dict[str, int], file: Path, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    of = f" of {result['namespaces']} namespaces" if "namespaces" in result else ""
    print(f"saved {result['blocks']} blocks{of}, {format_bytes(result['bytes_file'])}, to {file}")
    if result["blocks_left_out"]:
        print(
            f"{result['blocks_left_out']} damaged or of another version were left out: see `tierkv verify`",
            file=sys.stderr,
        )


@spread()
def load(
    file: StatePath,
    where: StoreOptions,
    cold: ColdSize = None,
    min_free: MinFree = None,
    check: Annotated[bool, typer.Option("--check", help="Read the whole file and store nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the sound blocks of a file of tierkv save into a store, which is made if need be.

    Fails, with what is stored kept, if not all blocks of the file are in the store afterwards.
    """
    if check:
        _check(file, as_json=as_json)
        return
    if is_backup(file):
        _load_backup(file, where, parse_optional_size(cold), parse_optional_size(min_free), as_json=as_json)
        return
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
    _print_loaded(path, len(state), outcomes, store.stats().evicted_blocks, as_json=as_json)


def _load_backup(
    file: Path, where: StoreOptions, cold_bytes: int | None, min_free_bytes: int | None, *, as_json: bool
) -> None:
    """Put a backup's blocks into a store. A new store gets the quota that the old one had, unless `cold_bytes`."""
    path = where.path
    with BackupFile(file) as backup:
        require_place(path, min_free_bytes=min_free_bytes)
        quota_bytes = cold_bytes or (None if (path / "data.mdb").exists() else backup.settings.quota_bytes)
        with ColdStore(path, quota_bytes=quota_bytes, min_free_bytes=min_free_bytes) as store:
            restore_settings(store, backup.settings)
            with translated_errors(f"cannot load {file}"):
                outcomes = put_stored(store, _blocks_of(backup, store))
            store.flush()
            _print_loaded(
                file, outcomes.total() + backup.damaged, outcomes, store.stats().evicted_blocks, as_json=as_json
            )


def _blocks_of(backup: BackupFile, store: ColdStore) -> Iterator[StoredBlock]:
    """Yield the blocks of a backup; register its namespaces before their blocks."""
    for each in backup.read():
        if isinstance(each, StoredBlock):
            yield each
        elif each[1] != NO_DESCRIPTION:  # else only its blocks are known
            store.register_namespace(*each)


def _check(file: Path, *, as_json: bool) -> None:
    """Read a state file or a backup; exit code 1 if it is not whole."""
    problem, blocks, damaged = "", 0, 0
    try:
        if is_backup(file):
            with BackupFile(file) as backup:
                for each in backup.read():
                    blocks += isinstance(each, StoredBlock)
                    damaged = backup.damaged
        else:
            with StateFile(file) as state:
                blocks = sum(1 for _ in state.iter_records())
                damaged = len(state) - blocks
    except CorruptBlockError as exc:
        problem = str(exc)
    is_whole = not problem and not damaged
    if as_json:
        print_json({"whole": is_whole, "blocks": blocks, "blocks_damaged": damaged, "problem": problem or None})
    else:
        print(visible(problem) if problem else f"{file}: {blocks} blocks are sound, {damaged} are damaged")
    if not is_whole:
        raise typer.Exit(1)


def _print_loaded(path: Path, total: int, outcomes: Counter[PutOutcome], evicted: int, *, as_json: bool) -> None:
    """Print what became of a file's blocks. Raises StoreError unless all are in the store."""
    stored, existing = outcomes[PutOutcome.STORED], outcomes[PutOutcome.EXISTS]
    if stored + existing < total:
        missing = {"damaged": total - outcomes.total()} | {why.value: count for why, count in outcomes.items()}
        reasons = ", ".join(f"{count} {why}" for why, count in missing.items() if count and why not in _IN_THE_STORE)
        raise StoreError(
            f"{stored + existing} of the {total} blocks of {path} are in the store now; not: {reasons}"
            + (f"; {evicted} blocks were evicted for them" if evicted else "")
        )
    if as_json:
        result = {"blocks": total, "blocks_stored": stored, "blocks_existing": existing}
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
