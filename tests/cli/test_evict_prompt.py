"""`tierkv evict --prompt`: what `tierkv warm` and `tierkv run` keep of a prompt is gone, other prompts are not."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from cold_blocks import NAMESPACE, chain_of
from one_command import Command
from test_cli import tierkv

from tierkv.daemon.eviction_log import EvictionLog
from tierkv.daemon.host import exclusive_file
from tierkv.storage.cold import ColdStore
from tierkv.storage.lmdb_env import _USER_LOCK_FILE
from tierkv.tools import evict as tool

__all__ = ["tierkv"]  # fixtures


def left_to_compute(tierkv: Command, path: Path) -> int:
    count: int = tierkv("warm", path, "--dry-run", "--json").json()["blocks_computed"]
    return count


def test_a_prompt_by_file_and_by_text_goes_with_what_continues_it(tierkv: Command, tmp_path: Path) -> None:
    kind, stern = tmp_path / "kind.txt", tmp_path / "stern.txt"
    kind.write_text("Be kind. " * 60)
    stern.write_text("Be stern. " * 60)
    for path in (kind, stern):
        tierkv("warm", path)
    tierkv("run", "Hello!", "--system", kind, "--max-new-tokens", 2)
    tierkv("warm", kind, "--codec", "lossy-int8")
    before = tierkv("stats", "--json").json()["blocks"]
    result = tierkv("evict", "--prompt", kind, "--json").json()
    assert result["blocks_left"] == before - result["blocks_evicted"] and not result["stayed"]
    assert left_to_compute(tierkv, kind) > 0 and left_to_compute(tierkv, stern) == 0
    assert tierkv("warm", kind, "--codec", "lossy-int8", "--dry-run", "--json").json()["blocks_reused"] == 0
    assert tierkv("evict", "--prompt", kind, "--json").json()["blocks_evicted"] == 0
    assert tierkv("evict", "--prompt", stern.read_text(), "--json").json()["blocks_left"] == 0


def test_a_prompt_of_another_salt_or_age_stays(tierkv: Command, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    tierkv("warm", path)
    assert tierkv("evict", "--prompt", path, "--salt", "tenant", "--json").json()["blocks_evicted"] == 0
    assert tierkv("evict", "--prompt", path, "--older-than", "1h", "--json").json()["blocks_evicted"] == 0
    assert left_to_compute(tierkv, path) == 0


def test_a_pinned_prompt_stays_and_is_told(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--pin")
    result = tierkv("evict", "--prompt", tmp_path / "prompts.txt")
    assert result.code == 0 and "stayed: " in result.out and "pinned" in result.out
    assert left_to_compute(tierkv, tmp_path / "prompts.txt") == 0


def test_an_empty_prompt_is_refused(tierkv: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    assert tierkv("evict", "--prompt", tmp_path / "empty").code == 2


def test_another_process_that_may_keep_copies_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "store"
    with ColdStore(path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        store.open_namespace(NAMESPACE)
        store.put(chain_of(4))
    with (path / _USER_LOCK_FILE).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as every process does that has the store open
        tool.evict(store=path, to="0")
        assert "another process has this store open" in capsys.readouterr().out
    tool.evict(store=path, to="0")
    assert "another process" not in capsys.readouterr().out


def test_what_a_daemon_will_have_to_tell_is_noted_where_one_had_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with ColdStore(path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        store.open_namespace(NAMESPACE)
        store.put(chain_of(4))
    tool.evict(store=path, to="20k", as_json=True)
    assert not (path / "daemon.evictions").exists()
    with exclusive_file(path / "daemon.lock", "it"):
        pass
    assert tool.daemon_for(path) is None
    tool.evict(store=path, to="8k", as_json=True)
    tool.evict(store=path, namespace=NAMESPACE.digest.hex(), older_than="1h", as_json=True)
    log = EvictionLog(path / "daemon.evictions")
    by_size, by_name = log.since(log.log, 0).evictions
    assert by_size.block_hashes and len(by_size.block_hashes) % 16 == 0
    assert (by_name.namespace, by_name.older_than_s, by_name.block_hashes) == (NAMESPACE.digest, 3600.0, None)
