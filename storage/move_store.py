"""Moving a store to another directory, such as one on another disk: copied, read back, and only then removed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.lmdb_file import DATA_FILE, sync_file
from tierkv.storage.whole_store import StoredBlock, StoreSettings, iter_stored, put_stored, restore_settings
from tierkv.values.files import check_path, translated_errors

__all__ = ["move_store"]

_STAGING = ".tierkv-move"


def move_store(store: ColdStore, target: Path, *, min_free_bytes: int | None = None) -> int:
    """Copy a store's blocks, settings and pins into a new store, compare, and remove the old data file.

    Return how many blocks there are. No other process may have the store open; the caller closes it next. Every record
    is checked as it is read, and once more where it lies now. Raises StoreError, with the old store as it was and
    nothing at the target, if a block cannot be moved, such as a damaged one, or the target has a store already.
    """
    target = check_path(target).absolute()
    with translated_errors(f"cannot move the store {store.path} to {target}"), store.unshared():
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.lexists(target / DATA_FILE):
            raise StoreError(f"there is a store at {target} already", hint="name an empty directory")
        with _staging(target) as staging:
            blocks = _copy(store, staging, min_free_bytes)
            os.replace(staging / DATA_FILE, target / DATA_FILE)
            sync_file(target)
        os.unlink(store.path / DATA_FILE)
        sync_file(store.path)
        return blocks


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A directory for the copy. That of a move that was killed is removed first."""
    staging = target / _STAGING
    if staging.is_symlink():
        raise StoreError(f"{staging} is a symbolic link")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy(store: ColdStore, staging: Path, min_free_bytes: int | None) -> int:
    stats = store.stats()
    settings = StoreSettings(quota_bytes=stats.quota_bytes, tenants=store.tenants())
    quota_bytes = max(stats.quota_bytes, stats.live_bytes)  # pinned blocks may exceed a quota or a limit
    with ColdStore(staging, quota_bytes=quota_bytes, min_free_bytes=min_free_bytes) as copy:
        namespaces = store.namespaces()
        for each in namespaces:
            if each.description:
                copy.register_namespace(each.digest, each.raw_description)
        lost = 0

        def blocks() -> Iterator[StoredBlock]:
            nonlocal lost
            for block in iter_stored(store, [each.digest for each in namespaces]):
                if block is None:
                    lost += 1
                else:
                    yield block

        outcomes = put_stored(copy, blocks())
        restore_settings(copy, settings)
        if copy.tenants() != settings.tenants:
            raise StoreError("the settings of its tenants contradict each other", hint="tierkv tenant set changes them")
        copy.adopt_quota(settings.quota_bytes)
        copy.flush()
        expected = stats.blocks
        if lost or copy.stats().blocks != expected:
            why = ", ".join(f"{count} {outcome.value}" for outcome, count in outcomes.items())
            raise StoreError(
                f"{copy.stats().blocks} of {expected} blocks could be copied ({lost} cannot be read; {why})",
                hint="tierkv verify --repair removes damaged blocks",
            )
        report = copy.verify()
        if not report.is_sound:
            raise StoreError(f"the copy at {staging.parent} is damaged: {report.problem or len(report.damaged)}")
        return expected
