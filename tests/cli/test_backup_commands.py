"""`tierkv save --all`, `--tenant`, `tierkv load` of a backup, and `tierkv load --check`."""

from __future__ import annotations

from pathlib import Path

from cold_blocks import damage_record
from one_command import Command
from test_cli import tierkv
from test_tenants import A, blocks_of, fill

from tierkv.storage.cold import ColdStore

__all__ = ["tierkv"]  # fixtures


def test_a_whole_store_is_saved_and_restored(tierkv: Command, tmp_path: Path) -> None:
    path, file, target = fill(tmp_path / "s"), tmp_path / "b", tmp_path / "t"
    tierkv("quota", "300M", "--store", path)
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path, "--cold-limit", "1G")
    result = tierkv("save", "--all", file, "--store", path, "--json").json()
    assert (result["namespaces"], result["blocks"], result["blocks_left_out"]) == (3, 12, 0)
    checked = tierkv("load", "--check", file, "--json").json()
    assert checked == {"whole": True, "blocks": 12, "blocks_damaged": 0, "problem": None}
    assert tierkv("load", file, "--store", target, "--json").json()["blocks_stored"] == 12
    assert blocks_of(target) == [4, 4, 4]
    assert tierkv("quota", "--store", target, "--json").json()["quota_bytes"] == 300 << 20
    assert tierkv("verify", "--store", target).code == 0
    with ColdStore(target, read_only=True) as store:
        assert [each.name for each in store.tenants().values()] == ["research"]
    again = tierkv("load", file, "--store", target, "--json").json()
    assert (again["blocks_stored"], again["blocks_existing"]) == (0, 12)


def test_one_tenant_is_saved_alone(tierkv: Command, tmp_path: Path) -> None:
    path, file = fill(tmp_path / "s"), tmp_path / "b"
    assert tierkv("save", "--tenant", "alpha", file, "--store", path, "--json").json()["blocks"] == 4
    tierkv("load", file, "--store", tmp_path / "t", "--cold", "1G")
    assert blocks_of(tmp_path / "t") == [0, 4, 0]
    assert tierkv("save", "--tenant", "alpha", "--all", file, "--store", path).code == 2


def test_a_namespace_is_saved_by_its_name(tierkv: Command, tmp_path: Path) -> None:
    path, file = fill(tmp_path / "s"), tmp_path / "b"
    assert tierkv("save", "--namespace", A.name, file, "--store", path, "--json").json()["blocks"] == 4
    assert tierkv("load", "--check", file).code == 0


def test_a_damaged_backup_stores_what_is_sound_and_fails(tierkv: Command, tmp_path: Path) -> None:
    path, file = fill(tmp_path / "s"), tmp_path / "b"
    with ColdStore(path, min_free_bytes=0) as store:
        leaf = max(store.iter_entries(A.digest), key=lambda each: each[1].depth)[0]
        record = store.read_record(leaf)
        damage_record(store, leaf)
    result = tierkv("save", "--all", file, "--store", path)
    assert result.code == 0 and "1 damaged or of another version were left out" in result.err
    data = file.read_bytes()
    file.write_bytes(data[:-30])
    result = tierkv("load", "--check", file)
    assert result.code == 1 and "cut short" in result.out
    result = tierkv("load", file, "--store", tmp_path / "t")
    assert result.code == 2 and "cut short" in result.err
    assert record is not None and blocks_of(tmp_path / "t") == [4, 3, 4]
