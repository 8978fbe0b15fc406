"""A user without a home, or with one that cannot be written: naming the store is enough for every command of it."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Start

from tierkv.daemon import eviction_log
from tierkv.daemon.host import STORE_LOCK, exclusive_file
from tierkv.engine.embedded_files import find_embedded_model
from tierkv.errors import ConfigError
from tierkv.storage import lmdb_env
from tierkv.storage.cold import ColdStore
from tierkv.tools import model_place
from tierkv.tools.model_place import embedded_directory

Command = Callable[..., Any]
SMALL = ("--block-size", 16, "--hot", "64M", "--warm", "16M")


def test_the_store_alone_is_enough_for_every_command_with_the_embedded_model(
    command: Command, homeless: None, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("You are a careful assistant. " * 4)
    warm = ("warm", "p.txt", *SMALL, "--store", "s", "--json")
    first, second = (json.loads(command(*warm).out) for _ in range(2))
    assert first["blocks_computed"] == second["blocks_reused"] > 0 == second["blocks_computed"]
    assert find_embedded_model(tmp_path / "s") == tmp_path / "s/embedded-model-1"
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o700
    answered = command("run", "Hello", "--system", "p.txt", *SMALL, "--store", "s", "--max-new-tokens", 1, "--json")
    assert json.loads(answered.out)["cached_tokens"]["cold"] > 100
    assert json.loads(command("explain", "Hello", "--system", "p.txt", "--store", "s", "--json").out)["prompt_tokens"]
    assert "You are" in json.loads(command("inspect", "--store", "s", "--json").out)["prefixes"][0]["text"]
    evicted = command("evict", "--prompt", "p.txt", "--block-size", 16, "--store", "s", "--dry-run", "--json")
    assert json.loads(evicted.out)["blocks_evicted"] > 0
    assert command("verify", "--store", "s").code == 0
    assert command("move", tmp_path / "other", "--store", "s").code == 0
    assert not (tmp_path / "s").exists(), "the model was the old store's, and is made again"


def test_a_home_that_cannot_be_written_is_as_good_as_none(
    command: Command, homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/1")
    assert embedded_directory(tmp_path / "s") == tmp_path / "s"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded_directory(tmp_path / "s") == tmp_path / ".cache/tierkv"


def test_a_cache_directory_that_has_the_model_need_not_be_writable(
    command: Command, embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_place, "_is_writable", lambda path: False)
    assert embedded_directory(tmp_path / "s") == embedded_cache / "tierkv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded_directory(tmp_path / "s") == tmp_path / "s"


def test_without_any_place_the_model_is_refused(command: Command, homeless: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no home"):
        embedded_directory(None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"no place: .*file.*XDG_CACHE_HOME"):
        embedded_directory(tmp_path / "file/s")


def test_a_user_without_a_home_uses_the_daemon_that_is_named(
    command: Command, homeless: None, tmp_path: Path, start_daemon: Start
) -> None:
    (tmp_path / "p.txt").write_text("You are a careful assistant. " * 4)
    daemon = start_daemon(slots=2048).socket
    ask = ("run", "Hello", "--block-size", 16, "--hot", "64M", "--socket", daemon, "--max-new-tokens", 1, "--json")
    assert command(*ask).code == 0
    announced = command("daemon", "prefetch", "p.txt", "--block-size", 16, "--socket", daemon, "--json")
    assert announced.code == 0 and json.loads(announced.out)["prompts"] == 1
    refused = command("run", "Hello", "--no-daemon")
    assert refused.code == 2 and "TIERKV_STORE" in refused.err


def test_places_that_cannot_be_made_are_named_with_the_option_that_helps(
    command: Command, homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("Be kind.")
    monkeypatch.setenv("HOME", "/proc/1")
    started = command("daemon", "start", "--store", "s", "--warm", "1M")
    assert started.code == 2 and "no socket can be made" in started.err and "--socket" in started.err
    refused = command("report", "p.txt", "--store", "s", "--output", "/proc/1/out")
    assert refused.code == 2 and "--output" in refused.err


def test_completion_is_refused_in_one_line(command: Command, homeless: None) -> None:
    refused = command("--install-completion", "bash")
    assert refused.code == 2 and refused.err == "tierkv: this user has no home directory (set HOME)\n"


def test_top_without_a_daemon_says_what_else_there_is(command: Command) -> None:
    refused = command("top", "--once")
    assert refused.code == 2 and "--store" in refused.err and "--url" in refused.err


def test_a_full_disk_is_named_with_what_helps(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ColdStore(tmp_path / "s", quota_bytes=64 << 20, min_free_bytes=0):
        pass

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lmdb_env, "copy_compacted", full)
    refused = command("compact", "--store", "s")
    assert refused.code == 2 and "No space left" in refused.err and "tierkv move" in refused.err
    with exclusive_file(tmp_path / "s" / STORE_LOCK, "it"):
        pass
    monkeypatch.setattr(eviction_log, "open_regular", full)
    evicted = command("evict", "--to", 0, "--store", "s")
    assert evicted.code == 0
    written = evicted.err.splitlines()[-1]
    assert written == "tierkv: the log of evictions s/daemon.evictions cannot be written: No space left on device"


def test_a_dry_run_shows_no_sizes_of_what_is_not_stored(command: Command, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("You are a careful assistant. " * 4)
    planned = command("warm", "p.txt", *SMALL, "--dry-run").out
    assert "blocks to compute" in planned and "bytes" not in planned
