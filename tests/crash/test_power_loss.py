"""A power failure may leave each page of the data file as any commit since the last sync left it: power_worker.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import open_store, record_of

from tierkv.storage import lmdb_env

WORKER = Path(__file__).with_name("power_worker.py")
TIMEOUT_S = 120


def test_what_was_synced_is_there_and_what_is_read_is_right(tmp_path: Path) -> None:
    done = subprocess.run(
        command(WORKER, tmp_path, 0, 4), env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_a_sync_includes_the_directory_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(lmdb_env, "sync_file", synced.append)
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        assert not synced
        store.flush(sync=True)
        assert set(synced) == {store.path, store.path.parent}
