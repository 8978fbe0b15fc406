"""`tierkv evict`, `compact`, `verify`, `save` and `load`: what they print, what they change, how they exit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cold_blocks import LAYOUT, NAMESPACE, OTHER, block_bytes, chain_of, damage_record, record_of
from crafted_state import state_of
from one_command import run_command

from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import encode_record
from tierkv.storage.state_file import StateFile

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Return a store of two namespaces: a chain of four blocks, and six blocks of their own."""
    path = tmp_path / "store"
    with ColdStore(path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        store.open_namespace(NAMESPACE)
        store.open_namespace(OTHER)
        store.put([*chain_of(4), *(record_of(n, namespace=OTHER) for n in range(6))])
    return path


@pytest.fixture
def tierkv(store_path: Path) -> Run:
    """Return a function that runs one command: exit code, JSON result, standard error."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code, out, err = run_command(*arguments, "--json", "--store", store_path)
        return code, json.loads(out) if out else {}, err

    return run


def damage(path: Path) -> None:
    with ColdStore(path, quota_bytes=64 << 20) as store:
        damage_record(store, chain_of(4)[2].info.block_hash)


def test_evicting_to_a_size_leaves_that_much(tierkv: Run) -> None:
    code, result, _ = tierkv("evict", "--to", "20k")
    assert code == 0
    assert result["bytes_live"] <= 20 << 10
    assert result["blocks_left"] == 10 - result["blocks_evicted"] > 0


def test_evicting_a_namespace_leaves_the_other(tierkv: Run) -> None:
    code, result, _ = tierkv("evict", "--namespace", OTHER.digest.hex()[:8])
    assert (code, result["blocks_evicted"], result["blocks_left"]) == (0, 6, 4)


def test_nothing_is_older_than_a_week(tierkv: Run) -> None:
    code, result, _ = tierkv("evict", "--older-than", "7d")
    assert (code, result["blocks_evicted"]) == (0, 0)


@pytest.mark.parametrize(
    "arguments", [(), ("--to", "much"), ("--older-than", "5"), ("--older-than", "old"), ("--namespace", "zz")]
)
def test_what_makes_no_sense_is_refused(tierkv: Run, arguments: tuple[str, ...]) -> None:
    code, _, error = tierkv("evict", *arguments)
    assert code == 2
    assert error.startswith("tierkv: ")


def test_compacting_gives_space_back(tierkv: Run) -> None:
    tierkv("evict", "--to", "0")
    code, result, _ = tierkv("compact")
    assert code == 0
    assert result["bytes_after"] < result["bytes_before"]


def test_a_sound_store_verifies(tierkv: Run) -> None:
    code, result, _ = tierkv("verify")
    assert (code, result["sound"], result["blocks"], result["damaged"]) == (0, True, 10, {})


def test_damage_is_reported_with_exit_code_1_and_gone_after_a_repair(tierkv: Run, store_path: Path) -> None:
    damage(store_path)
    code, result, _ = tierkv("verify")
    assert (code, result["sound"]) == (1, False)
    assert list(result["damaged"]) == [chain_of(4)[2].info.block_hash.hex()]
    code, result, _ = tierkv("verify", "--repair")
    assert (code, result["blocks_removed"]) == (0, 2)
    assert tierkv("verify")[0] == 0


def test_a_data_file_cut_short_is_reported_and_saved_by_a_repair(tierkv: Run, store_path: Path) -> None:
    os.truncate(store_path / "data.mdb", (store_path / "data.mdb").stat().st_size - 20_000)
    code, result, _ = tierkv("verify")
    assert (code, result["sound"]) == (1, False)
    code, result, _ = tierkv("verify", "--repair")
    assert code == 0
    assert result["set_aside"].endswith("data.mdb.damaged")
    assert result["blocks"] > 0


OWN = ("--namespace", NAMESPACE.digest.hex())


def test_the_sound_blocks_of_a_damaged_state_file_are_loaded_and_the_others_told(
    tierkv: Run, tmp_path: Path, store_path: Path
) -> None:
    chain = chain_of(8, first=100)
    data = bytearray(state_of(NAMESPACE, [record.data.tobytes() for record in chain]))
    data[data.find(chain[5].data.tobytes()) + 300] ^= 1
    (tmp_path / "state").write_bytes(data)
    code, result, error = tierkv("load", str(tmp_path / "state"))
    assert (code, result) == (2, {})
    assert "5 of the 8 blocks" in error and "1 damaged, 2 no_parent" in error
    with ColdStore(store_path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        assert [store.contains(record.info.block_hash) for record in chain] == [True] * 5 + [False] * 3


def test_lossy_records_of_an_exact_namespace_are_neither_loaded_nor_saved(
    tierkv: Run, tmp_path: Path, store_path: Path
) -> None:
    infos = [record.info for record in chain_of(3, first=100)]
    codec = codec_by_name("lossy-int8")
    records = [encode_record(info, block_bytes(), layout=LAYOUT, codec=codec) for info in infos]
    (tmp_path / "lossy").write_bytes(state_of(NAMESPACE, [record.data.tobytes() for record in records]))
    code, _, error = tierkv("load", str(tmp_path / "lossy"))
    assert code == 2 and "0 of the 3 blocks" in error and "3 damaged" in error
    with ColdStore(store_path, quota_bytes=64 << 20) as store, store._writer.batch() as batch:
        key = chain_of(4)[3].info.block_hash
        value = bytearray(batch.txn.get(key, db=batch.databases.blocks))
        lossy = encode_record(chain_of(4)[3].info, block_bytes(), layout=LAYOUT, codec=codec)
        value[: lossy.stored_bytes] = lossy.data.tobytes()
        batch.txn.put(key, bytes(value), db=batch.databases.blocks)
    code, result, error = tierkv("save", str(tmp_path / "state"), *OWN)
    assert (code, result["blocks"], result["blocks_left_out"]) == (0, 3, 1)
    with StateFile(tmp_path / "state") as state:
        assert list(state.iter_records()) == [record.data.tobytes() for record in chain_of(3)]


def test_what_is_no_regular_file_is_neither_loaded_nor_replaced(tierkv: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("state")
    for name in ("fifo", "folder", "link"):
        for command in (("load",), ("save", *OWN)):
            code, _, error = tierkv(*command, str(tmp_path / name))
            assert code == 2 and error.startswith("tierkv: ") and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link", "store"]


def test_a_namespace_that_the_store_cannot_describe_is_not_saved(tierkv: Run, tmp_path: Path, store_path: Path) -> None:
    with ColdStore(store_path, quota_bytes=64 << 20) as store, store._writer.batch() as batch:
        batch.namespace(NAMESPACE.digest).description = b"{}"
    code, _, error = tierkv("save", str(tmp_path / "state"), *OWN)
    assert code == 2 and "cannot be saved" in error
    assert not (tmp_path / "state").exists()
