"""`tierkv examples` and `tierkv metrics`: what comes with an installed tierkv."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tierkv.metrics.catalogue import groups
from tierkv.tools.example_files import EXAMPLES

Command = Callable[..., Any]
FOLDER = Path(__file__).resolve().parents[2] / "examples"


def test_every_example_is_listed_and_printed_as_it_is(command: Command) -> None:
    assert set(EXAMPLES) == {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"}
    listed = command("examples").out
    for name in EXAMPLES:
        assert name in listed
        assert command("examples", name).out == (FOLDER / name).read_text("utf-8")
    assert json.loads(command("examples", "--json").out) == EXAMPLES


def test_examples_are_written_and_never_over_a_file(command: Command, tmp_path: Path) -> None:
    written = command("examples", "--write", tmp_path / "new")
    assert written.code == 0 and "system_prompts.txt" in written.out
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(EXAMPLES)
    assert os.access(tmp_path / "new" / "demo_daemon.sh", os.X_OK)
    for path in (tmp_path / "new").iterdir():
        if path.name != "openai_client.py":
            path.unlink()
    (tmp_path / "new" / "openai_client.py").write_text("mine")
    again = command("examples", "--write", tmp_path / "new")
    assert again.code == 2 and "openai_client.py exists" in again.err
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["mine"], "nothing was written"
    one = command("examples", "system_prompts.txt", "--write", tmp_path / "new", "--json")
    assert json.loads(one.out)["files"] == ["system_prompts.txt"]


def test_an_unknown_example_is_an_error(command: Command) -> None:
    for name in ("../pyproject.toml", "nothing"):
        failed = command("examples", name)
        assert failed.code == 2 and "there is no example" in failed.err


def test_the_written_prompts_can_be_warmed(command: Command, tmp_path: Path) -> None:
    assert command("examples", "system_prompts.txt", "--write", tmp_path).code == 0
    planned = command("warm", tmp_path / "system_prompts.txt", "--dry-run", "--json")
    assert json.loads(planned.out)["prompts"] == 6, planned.err


def test_the_list_of_metrics_has_each_with_type_labels_and_meaning(command: Command) -> None:
    text = command("metrics").out
    for some in groups().values():
        for each in some:
            assert f"  {each.exposed_name}" in text and each.kind.value in text
    assert "  tierkv_hits_total{tier}, counter\n    Blocks that the tier answered.\n" in text
    assert "  vllm:tierkv_not_cached_total{reason}, counter\n" in text
    only = json.loads(command("metrics", "daemon", "--json").out)
    assert list(only) == ["daemon"] and {"name", "type", "labels", "help"} == set(only["daemon"][0])
    assert command("metrics", "kitchen").code == 2


def test_the_list_is_readable_in_60_columns(command: Command, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = command("metrics").out.splitlines()
    assert all(len(line) <= 60 for line in lines if line.startswith("    "))
    assert not any("…" in line for line in lines)
