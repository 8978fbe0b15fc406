"""`tierkv move`: the store lies whole at its new place, or is untouched at its old one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import damage_record
from one_command import Command
from test_cli import tierkv
from test_tenants import blocks_of, fill

from tierkv.daemon.host import STORE_LOCK, exclusive_file
from tierkv.storage import move_store
from tierkv.storage.cold import ColdStore

__all__ = ["tierkv"]  # fixtures

HOLDER = """
import sys
from pathlib import Path
from tierkv.storage.cold import ColdStore
with ColdStore(Path(sys.argv[1]), read_only=True):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_store_is_moved_with_its_pins_settings_and_quota(tierkv: Command, tmp_path: Path) -> None:
    path, target = fill(tmp_path / "s"), tmp_path / "other" / "t"
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path, "--cold-limit", "1G")
    tierkv("quota", "300M", "--store", path)
    with ColdStore(path) as store:
        pinned = [block_hash for block_hash, _ in store.iter_entries()][:3]
        store.set_pinned(pinned, True, ttl_s=1000)
        before, ends = dict(store.iter_entries()), store.pin_ends()
    result = tierkv("move", target, "--store", path, "--json").json()
    assert result == {"blocks": 12, "store": str(target), "left": []}
    assert not path.exists()
    with ColdStore(target, read_only=True) as store:
        assert dict(store.iter_entries()) == before and store.pin_ends() == pytest.approx(ends)
        assert store.stats().quota_bytes == 300 << 20 and len(store.tenants()) == 1
    assert tierkv("verify", "--store", target).code == 0


def test_foreign_files_stay_and_are_named(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    (path / "notes.txt").write_text("mine")
    assert "notes.txt" in tierkv("move", tmp_path / "t", "--store", path).out
    assert os.listdir(path) == ["notes.txt"] and blocks_of(tmp_path / "t") == [4, 4, 4]


def test_a_store_that_is_in_use_stays(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    (tmp_path / "holder.py").write_text(HOLDER)
    holder = subprocess.Popen(
        command(tmp_path / "holder.py", path), env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == b"open\n"
        result = tierkv("move", tmp_path / "t", "--store", path)
        assert result.code == 2 and "is open in another process" in result.err
    with exclusive_file(path / STORE_LOCK, "the store"):
        assert "belongs to a daemon" in tierkv("move", tmp_path / "t", "--store", path).err
    assert blocks_of(path) == [4, 4, 4] and not (tmp_path / "t" / "data.mdb").exists()


def test_a_store_with_a_damaged_block_stays(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    with ColdStore(path) as store:
        damage_record(store, next(store.iter_entries())[0])
    result = tierkv("move", tmp_path / "t", "--store", path)
    assert result.code == 2 and "cannot be read" in result.err
    assert os.listdir(tmp_path / "t") == [] and (path / "data.mdb").exists()


def test_a_copy_that_is_not_sound_removes_nothing(tierkv: Command, tmp_path: Path, monkeypatch) -> None:
    path = fill(tmp_path / "s")
    put = move_store.put_stored

    def damaging(store: ColdStore, blocks: object) -> object:
        outcomes = put(store, blocks)  # type: ignore[arg-type]
        damage_record(store, next(store.iter_entries())[0])
        return outcomes

    monkeypatch.setattr(move_store, "put_stored", damaging)
    result = tierkv("move", tmp_path / "t", "--store", path)
    assert result.code == 2 and "damaged" in result.err
    assert blocks_of(path) == [4, 4, 4] and os.listdir(tmp_path / "t") == []


def test_a_target_that_is_a_store_or_lies_in_one_is_refused(tierkv: Command, tmp_path: Path) -> None:
    path, other = fill(tmp_path / "s"), fill(tmp_path / "t")
    assert "already" in tierkv("move", other, "--store", path).err
    for wrong in (path, path / "inner"):
        assert tierkv("move", wrong, "--store", path).code == 2
    assert blocks_of(path) == blocks_of(other) == [4, 4, 4]


def test_the_rest_of_a_move_that_was_killed_is_removed(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    (tmp_path / "t" / ".tierkv-move").mkdir(parents=True)
    (tmp_path / "t" / ".tierkv-move" / "data.mdb").write_bytes(b"half")
    assert tierkv("move", tmp_path / "t", "--store", path).code == 0
    assert blocks_of(tmp_path / "t") == [4, 4, 4] and not (tmp_path / "t" / ".tierkv-move").exists()
