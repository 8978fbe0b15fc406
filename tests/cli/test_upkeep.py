"""`tierkv evict`, `compact` and `verify`: what they print, what they change, how they exit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cold_blocks import NAMESPACE, OTHER, chain_of, damage_record, record_of

from tierkv.storage.cold import ColdStore
from tierkv.tools import cli

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
def tierkv(store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs one command: exit code, JSON result, standard error."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["tierkv", *arguments, "--json", "--store", str(store_path)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        assert isinstance(code, int)
        return code, json.loads(captured.out) if captured.out else {}, captured.err

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
