"""`tierkv remote check`, the option --remote, and TIERKV_REMOTE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stored_blocks import NAMESPACE

from tierkv.daemon.config import DaemonConfig
from tierkv.tools.daemon_process import environment_of, from_json, to_json
from tierkv.tools.logs import LogFormat

Command = Callable[..., Any]  # the fixture of conftest.py

SECRET = "pass-word-42"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def test_check_prints_times_and_what_a_first_token_gains(command: Command, shared: Path) -> None:
    printed = command("remote", "check", f"dir://{shared}", "--size", "1M", "--json")
    assert printed.code == 0, printed.err
    found = json.loads(printed.out)
    assert found["get_mb_per_s"] > 0 and found["prompt_s"] == pytest.approx(8192 / found["break_even_tokens_per_s"])
    again = command("remote", "check", f"dir://{shared}", "--size", "1M")
    assert again.code == 0 and "tokens a second" in " ".join(again.out.split())
    assert sum(path.stat().st_size for path in shared.rglob("*") if path.is_file()) == 4 << 20, "values are replaced"


def test_check_says_why_a_remote_tier_cannot_be_used(command: Command, tmp_path: Path) -> None:
    for url in (f"redis://app:{SECRET}@127.0.0.1:1", f"ftp://app:{SECRET}@host", f"dir://{tmp_path}/missing"):
        printed = command("remote", "check", url)
        assert printed.code == 2 and printed.err.startswith("tierkv: ") and len(printed.err.splitlines()) == 1
        assert SECRET not in printed.err + printed.out


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_second_machine_computes_nothing(
    command: Command, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (tmp_path / "prompts.txt").write_text("word " * 700)
    url = f"dir://{shared}?base_s=5"
    options = ["--remote", url] if by == "option" else []
    if by == "environment":
        monkeypatch.setenv("TIERKV_REMOTE", url)
    results = []
    for machine in ("first", "second"):
        printed = command("warm", "prompts.txt", "--store", tmp_path / machine, "--device", "cpu", "--json", *options)
        assert printed.code == 0, printed.err
        results.append(json.loads(printed.out))
    assert results[0]["blocks_computed"] > 0 and results[0]["blocks_reused"] == 0
    assert results[1]["blocks_reused"] >= results[0]["blocks_computed"] - 1, "all but the partial block"
    assert results[1]["blocks_computed"] <= 1
    if by == "option":
        printed = command("remote", "inspect", url, "--json")
        assert printed.code == 0, printed.err
        (namespace,) = json.loads(printed.out)["namespaces"]
        assert namespace["name"] and namespace["dtype"] == "float32"
        printed = command("remote", "inspect", url)
        assert printed.code == 0 and namespace["namespace"][:8] in printed.out and "float32" in printed.out


def test_inspect_counts_descriptions_that_cannot_be_read(command: Command, shared: Path) -> None:
    for number, text in enumerate((b"[1", bytes(1 << 20), b"{}")):
        folder = shared / "tkv2" / (f"{number}" * 32)
        folder.mkdir(parents=True)
        (folder / "namespace.json").write_bytes(text)
    printed = command("remote", "inspect", f"dir://{shared}")
    assert printed.code == 0 and "3 descriptions cannot be read" in printed.out


def test_inspect_cuts_no_name_in_60_columns(command: Command, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = replace(NAMESPACE, name="/models/of/a-research-group/" + "llama-3.1-8b-instruct-" * 3)
    folder = shared / "tkv2" / namespace.digest.hex()
    folder.mkdir(parents=True)
    (folder / "namespace.json").write_bytes(namespace.describe())
    monkeypatch.setenv("COLUMNS", "60")
    printed = command("remote", "inspect", f"dir://{shared}")
    lines = printed.out.splitlines()
    assert printed.code == 0 and "…" not in printed.out and max(map(len, lines)) <= 60
    rows = [line[11:].split() for line in lines if line.strip()]
    assert namespace.name in "".join(row[0] for row in rows if row)


def test_a_remote_tier_of_a_daemon_is_not_on_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"redis://app:{SECRET}@host"
    config = DaemonConfig(socket=tmp_path / "s", store=tmp_path / "store", warm_bytes=1 << 20, remote=[url, "dir:///x"])
    assert SECRET not in to_json(config, [], LogFormat.TEXT) + repr(config)
    monkeypatch.setenv("TIERKV_REMOTE", environment_of(config)["TIERKV_REMOTE"])
    assert from_json(to_json(config, [], LogFormat.TEXT)) == (config, [], LogFormat.TEXT)


def test_a_wrong_url_is_named_without_its_password(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("word")
    printed = command("warm", "prompts.txt", "--remote", f"redis://app:{SECRET}@host?no=1")
    assert printed.code == 2 and SECRET not in printed.err
