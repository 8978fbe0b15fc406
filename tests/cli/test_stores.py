"""Commands on stores of all kinds: their quota, small and read-only volumes, and what other programs prepared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cold_blocks import LAYOUT, NAMESPACE, OTHER, chain_of, record_of
from one_command import Command, run_command

from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_batch import WriteBatch
from tierkv.storage.cold_rows import padded_bytes
from tierkv.values.namespace import Namespace

SIZE = padded_bytes(record_of(0).stored_bytes)


@pytest.fixture
def tierkv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs one command on the store `tmp_path / "store"`."""
    monkeypatch.setenv("TIERKV_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return run_command


def fill(path: Path, count: int = 10, quota_bytes: int = 64 << 20) -> None:
    with ColdStore(path, quota_bytes=quota_bytes, min_free_bytes=0) as store:
        store.open_namespace(NAMESPACE)
        store.put([record_of(number) for number in range(count)])


def edit(path: Path, change: Callable[[WriteBatch], object]) -> None:
    with ColdStore(path, min_free_bytes=0) as store, store._writer.batch() as batch:
        change(batch)


def refused(result: tuple[int, str, str]) -> str:
    """Return the one line of a refusal."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if line.strip()]
    return line


# -- quota ----------------------------------------------------------------------------------------------


def test_quota_shows_and_sets_and_evicts_only_when_told(tierkv: Command, tmp_path: Path) -> None:
    fill(tmp_path / "store")
    assert json.loads(tierkv("quota", "--json")[1]) == {
        "quota_bytes": 64 << 20,
        "bytes_live": 10 * SIZE,
        "blocks": 10,
        "blocks_evicted": 0,
        "bytes_freed": 0,
    }
    line = refused(tierkv("quota", 4 * SIZE))
    assert "would evict 6 blocks" in line and "--evict" in line
    assert json.loads(tierkv("quota", "--json")[1])["blocks"] == 10
    code, out, _ = tierkv("quota", 4 * SIZE, "--evict")
    assert code == 0 and "evicted 6 blocks" in out
    code, out, _ = tierkv("quota", "1G")
    assert code == 0 and "quota 1.0 GiB" in out
    assert json.loads(tierkv("stats", "--json")[1])["bytes_quota"] == 1 << 30
    assert "not a size" in refused(tierkv("quota", "much"))
    assert "no store" in refused(tierkv("quota", "--store", tmp_path / "nothing"))


def test_load_says_what_it_pushes_out(tierkv: Command, tmp_path: Path) -> None:
    fill(tmp_path / "store")
    assert tierkv("save", tmp_path / "state.tkv")[0] == 0
    other = tmp_path / "other"
    with ColdStore(other, quota_bytes=12 * SIZE, min_free_bytes=0) as store:
        store.put([record_of(number, namespace=OTHER) for number in range(10)])
    code, out, err = tierkv("load", tmp_path / "state.tkv", "--store", other, "--min-free", "0", "--json")
    assert code == 0, err
    assert json.loads(out) == {"blocks": 10, "blocks_stored": 10, "blocks_existing": 0, "blocks_evicted": 8}
    with ColdStore(other, min_free_bytes=0) as store:
        store.evict(to_bytes=0)
        store.put([record_of(number, namespace=OTHER) for number in range(10)])
    code, out, _ = tierkv("load", tmp_path / "state.tkv", "--store", other, "--min-free", "0")
    assert code == 0 and "8 blocks were evicted to make room" in out


# -- volumes --------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts something at a folder, until the test ends."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting takes root and the command mount")
    paths: list[Path] = []

    def mount(path: Path, *options: str) -> Path:
        path.mkdir(exist_ok=True)
        if subprocess.run(["mount", *options, str(path)], capture_output=True, check=False).returncode:
            pytest.skip("this machine mounts nothing")
        paths.append(path)
        return path

    yield mount
    for path in reversed(paths):
        subprocess.run(["umount", str(path)], check=True)


def test_where_too_little_is_free_that_is_said_before_anything_is_computed(
    tierkv: Command, tmp_path: Path, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = mounted(tmp_path / "volume", "-t", "tmpfs", "-o", "size=8m", "none")
    (tmp_path / "prompts.txt").write_text("You are kind.")
    fill(tmp_path / "store", 2)
    tierkv("save", tmp_path / "state.tkv")
    monkeypatch.setattr("tierkv.tools.engines.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for command in (["warm", tmp_path / "prompts.txt"], ["load", tmp_path / "state.tkv"]):
        line = refused(tierkv(*command, "--store", volume / "s", "--min-free", "1G"))
        assert "must stay free" in line and "--min-free" in line
    line = refused(tierkv("daemon", "start", "--store", volume / "s", "--min-free", "1G", "--socket", volume / "d"))
    assert "must stay free" in line and "--min-free" in line
    assert not (volume / "s").exists()
    assert tierkv("load", tmp_path / "state.tkv", "--store", volume / "s")[0] == 0  # a 20th of it stays free
    assert json.loads(tierkv("stats", "--store", volume / "s", "--json")[1])["blocks"] == 2


def test_a_store_on_a_read_only_file_system_can_be_looked_at_and_not_written(
    tierkv: Command, tmp_path: Path, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    fill(store)
    mounted(store, "--bind", str(store))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(store)], check=True)
    (tmp_path / "prompts.txt").write_text("You are kind.")
    for command in (["stats"], ["inspect"], ["verify"], ["quota"], ["save", tmp_path / "state.tkv"]):
        code, _, err = tierkv(*command)
        assert code == 0, f"{command}: {err}"
    monkeypatch.setattr("tierkv.tools.engines.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "nothing can be stored" in refused(tierkv("warm", tmp_path / "prompts.txt"))
    assert "nothing can be stored" in refused(tierkv("load", tmp_path / "state.tkv"))
    for command in (["evict", "--to", "0"], ["compact"], ["verify", "--repair"], ["quota", "1G"]):
        assert "read-only file system" in refused(tierkv(*command)), command


# -- stores that others prepared --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.mdb", "users.lock", "lock.mdb"])
def test_a_fifo_in_a_store_is_refused_by_every_command(tierkv: Command, tmp_path: Path, name: str) -> None:
    fill(tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    os.mkfifo(tmp_path / "store" / name)
    for command in (["stats"], ["inspect"], ["verify"], ["compact"], ["evict", "--to", "0"], ["quota", "1G"]):
        assert "is a FIFO, not a regular file" in refused(tierkv(*command))


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"NaN", b'{"name": "[/b]"}', b"[" * 50_000, OTHER.describe()])
def test_a_description_that_is_none_is_shown_as_unreadable(tierkv: Command, tmp_path: Path, text: bytes) -> None:
    fill(tmp_path / "store")
    edit(tmp_path / "store", lambda batch: batch.register(NAMESPACE.digest, text))
    code, out, err = tierkv("inspect")
    assert code == 0 and "unreadable" in out, err
    code, out, err = tierkv("inspect", "--json")
    (shown,) = json.loads(out)["namespaces"]
    assert shown["problem"] and shown["blocks"] == 10
    assert json.loads(tierkv("stats", "--json")[1])["namespaces_unreadable"] == 1
    assert "unreadable" in tierkv("stats")[1]
    assert "cannot be saved" in refused(tierkv("save", tmp_path / "state.tkv"))
    assert tierkv("verify")[0] == 0
    assert tierkv("top", "--once", "--store", tmp_path / "store")[0] == 0


def test_a_name_that_looks_like_markup_or_terminal_codes_is_shown_as_it_is(tierkv: Command, tmp_path: Path) -> None:
    for number, name in enumerate(("[/b]", "[red]x", "a\x1b[2Jb", "\ud800")):
        namespace = replace(NAMESPACE, name=name, weights=f"w{number}")
        with ColdStore(tmp_path / "store", min_free_bytes=0) as store:
            store.open_namespace(namespace)
    out = tierkv("inspect")[1]
    assert "[/b]" in out and "[red]x" in out and "a\\x1b[2Jb" in out and "\\ud800" in out and "\x1b" not in out


def test_inspecting_entries_whose_parents_are_a_cycle_ends(tierkv: Command, tmp_path: Path) -> None:
    chain = chain_of(3)
    hashes = [record.info.block_hash for record in chain]
    with ColdStore(tmp_path / "store", min_free_bytes=0) as store:
        store.open_namespace(NAMESPACE)
        store.put(chain)

    def bend(batch: WriteBatch) -> None:
        entry = batch.entry(hashes[0])
        assert entry is not None
        batch.write_entry(hashes[0], replace(entry, parent=hashes[1]))

    edit(tmp_path / "store", bend)
    code, out, err = tierkv("inspect", "--json")
    assert code == 0, err
    (prefix,) = json.loads(out)["prefixes"]
    assert prefix["blocks"] == 3
    assert tierkv("verify")[0] == 1
    assert tierkv("verify", "--repair")[0] == 0
    assert tierkv("verify")[0] == 0


def test_a_long_description_of_a_decent_namespace_is_kept(tierkv: Command, tmp_path: Path) -> None:
    namespace = Namespace(weights="w", layout=LAYOUT, architecture={"layers": ["x" * 100] * 500}, name="long")
    with ColdStore(tmp_path / "store", min_free_bytes=0) as store:
        store.open_namespace(namespace)
    assert "long" in tierkv("inspect")[1]
