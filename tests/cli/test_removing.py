"""What removes something says before what it would remove, and asks at a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from cold_blocks import NAMESPACE, OTHER, chain_of, record_of
from one_command import Command
from test_stores import SIZE, fill, tierkv

from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_eviction import EvictionReport

__all__ = ["tierkv"]  # a fixture


class Terminal(io.StringIO):
    """Standard input at which a user sits."""

    def isatty(self) -> bool:
        return True


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(text))


def blocks_in(path: Path) -> int:
    with ColdStore(path, read_only=True) as store:
        return store.stats().blocks


EVICT = (
    ("evict", "--to", "0"),
    ("evict", "--namespace", NAMESPACE.digest.hex()[:6]),
    ("evict", "--older-than", "0s"),
)
ALL = (*EVICT, ("quota", str(4 * SIZE), "--evict"))


@pytest.mark.parametrize("arguments", ALL)
def test_a_dry_run_says_what_the_command_does_then(
    tierkv: Command, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store")
    answer(monkeypatch, "")  # a dry run does not ask
    before = json.loads(tierkv("quota", "--json")[1])
    code, out, err = tierkv(*arguments, "--dry-run", "--json")
    assert code == 0 and not err
    said = json.loads(out)
    assert said.pop("dry_run") and said["blocks_evicted"] > 0
    assert json.loads(tierkv("quota", "--json")[1]) == before
    assert "would evict" in tierkv(*arguments, "--dry-run")[1]
    done = json.loads(tierkv(*arguments, "--yes", "--json")[1])
    for name in ("blocks_evicted", "bytes_freed"):
        assert said[name] == done[name]
    assert blocks_in(tmp_path / "store") == 10 - done["blocks_evicted"]


@pytest.mark.parametrize("arguments", ALL)
@pytest.mark.parametrize("text", ["n\n", "\n", "", "yess\n"])
def test_without_a_yes_nothing_is_removed(
    tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    fill(tmp_path / "store")
    answer(monkeypatch, text)
    code, out, err = tierkv(*arguments)
    assert code == 1 and not out and "[y/N]" in err and "nothing was removed" in err
    assert blocks_in(tmp_path / "store") == 10


@pytest.mark.parametrize("arguments", ALL)
@pytest.mark.parametrize("text", ["y\n", "Yes\n"])
def test_with_a_yes_it_is(
    tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    fill(tmp_path / "store")
    answer(monkeypatch, text)
    code, out, err = tierkv(*arguments)
    assert code == 0 and "evicted" in out and "blocks," in err and err.count("[y/N]") == 1
    assert blocks_in(tmp_path / "store") < 10


def test_a_script_is_not_asked(tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert tierkv("evict", "--to", "0")[0] == 0
    assert blocks_in(tmp_path / "store") == 0


def test_a_quota_that_evicts_nothing_is_not_asked_about(
    tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store")
    answer(monkeypatch, "")
    assert tierkv("quota", "1G", "--evict")[0] == 0


def test_repairing_asks_before_it_removes(tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store")
    answer(monkeypatch, "n\n")
    code, _, err = tierkv("verify", "--repair")
    assert code == 1 and "remove the damaged blocks" in err and "nothing was removed" in err
    answer(monkeypatch, "")
    assert tierkv("verify", "--repair", "--yes")[0] == 0
    assert tierkv("verify")[0] == 0, "looking is not asked about"


def test_a_dry_run_of_the_store_counts_as_the_eviction_does(tmp_path: Path) -> None:
    with ColdStore(tmp_path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        store.put(chain_of(6))
        store.put([record_of(number, namespace=OTHER) for number in range(3)])
        leaf = chain_of(6)[-1].info.block_hash
        store.set_pinned([leaf], True)
        for request in (
            {"namespace": OTHER.digest},
            {"older_than_s": -1.0},
            {"to_bytes": 2 * SIZE},
            {"to_bytes": 0, "namespace": OTHER.digest},
        ):
            would = store.evict(**request, dry_run=True)  # type: ignore[arg-type]
            assert store.stats().blocks == 9 and would != EvictionReport(blocks=0, freed_bytes=0)
            with ColdStore(tmp_path / "copy", quota_bytes=64 << 20, min_free_bytes=0) as copy:
                copy.put(chain_of(6))
                copy.put([record_of(number, namespace=OTHER) for number in range(3)])
                copy.set_pinned([leaf], True)
                done = copy.evict(**request)  # type: ignore[arg-type]
                copy.evict(to_bytes=0)
                copy.set_pinned([leaf], False)
                copy.evict(to_bytes=0)
            assert (would.blocks, would.freed_bytes, set(would.hashes)) == (
                done.blocks,
                done.freed_bytes,
                set(done.hashes),
            )
            assert (would.num_pinned, would.num_continued) == (done.num_pinned, done.num_continued)
        store.check()
