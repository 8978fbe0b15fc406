"""What a command prints reaches every terminal, file and pipe, or it says in one line why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT

from tierkv.policies.idle_buckets import NUM_BUCKETS
from tierkv.policies.learned import FEATURES, LearnedModel
from tierkv.storage.cold import ColdStore
from tierkv.tools import cli, store_commands
from tierkv.tools.terminal import OutputError, print_json, visible
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

Command = Callable[..., Any]
NAME = "[/b] :smile: \x1b[31m“你” …"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prompts, a trace, and a store with a namespace of an odd name."""
    path = tmp_path_factory.mktemp("terminal")
    (path / "p.txt").write_text(NAME)
    (path / "t.jsonl").write_text('{"hash_ids": [1, 2, 3]}\n' * 2)
    layout = BlockLayout.uniform(num_layers=1, block_size=16, kv_heads=1, head_dim=8, dtype="float32")
    with ColdStore(path / "store", quota_bytes=64 << 20, min_free_bytes=0) as store:
        for number in range(2):
            store.open_namespace(Namespace(weights="w", layout=layout, salt=str(number), name=NAME))
    return path


@pytest.fixture
def stored(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return the function that runs a command, in that folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TIERKV_STORE", str(folder / "store"))
    return command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "cp437"])
def test_every_command_prints_on_a_terminal_of_any_encoding(stored: Command, encoding: str) -> None:
    for words in (
        *(["-h"], ["…"], ["inspect"], ["stats"], ["stats", "--store", "…"], ["verify"], ["evict", "--to", "1G"]),
        *(["top", "--store", "store", "--once"], ["replay", "t.jsonl", "--capacity", "1"], ["warm", "…"]),
        *(["inspect", "--namespace", "…"], ["daemon", "status"], ["run", "", "--salt", "…"]),
    ):
        got, expected = stored(*words, encoding=encoding), stored(*words)
        assert got.code == expected.code, words
        assert (got.out.strip() or got.err.strip().startswith("tierkv: ")) and "Traceback" not in got.err, words


def test_commands_with_a_model_print_on_a_terminal_of_any_encoding(stored: Command, tmp_path: Path) -> None:
    """The embedded model is random: its answer is of signs that few terminals have."""
    options = ("--store", tmp_path / "new", "--max-new-tokens", 24)
    assert "?" in stored("run", "你好", *options, encoding="ascii").out.splitlines()[0]
    assert stored("warm", "p.txt", "--dry-run", "--store", tmp_path / "new", encoding="ascii").code == 0


def test_json_is_ascii_whatever_the_terminal(stored: Command) -> None:
    for words in (["inspect"], ["stats"], ["verify"], ["top", "--store", "store"]):
        plain = stored(*words, "--json", encoding="latin-1")
        assert plain.code == 0 and plain.out.isascii()
        json.loads(plain.out)
    assert NAME.replace("\x1b", "\\x1b") in json.loads(stored("inspect", "--json").out)["namespaces"][0]["name"]


def test_a_name_is_shown_as_it_is_and_steers_no_terminal(stored: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are no markup, colons no emoji; an escape character is printed, not obeyed."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = stored("inspect")
    assert shown.code == 0 and NAME.replace("\x1b", "\\x1b") in shown.out
    assert "\\x1b[31m" in stored("top", "--store", "store", "--once").out
    refused = stored("stats", "--store", "a\x1b[31m\nb")
    assert refused.code == 2 and "a\\x1b[31m b" in refused.err


def test_paths_that_look_like_markup_or_are_not_utf8_are_printed(command: Command, tmp_path: Path) -> None:
    name = "[b] :smile:\udcff"
    (tmp_path / name).write_text('{"hash_ids": [1, 2, 3]}\n')
    policy = tmp_path / "[i] [/b]"
    policy.parent.mkdir()
    LearnedModel(weights=(0.0,) * len(FEATURES), bias=0.0, edges=(), chances=((0.5,) * NUM_BUCKETS,)).save(policy)
    shown = command("replay", name, "--policy", "learned:[i] [/b]", "--capacity", 1)
    assert shown.code == 0 and name in shown.out and "[i] [/b]" in shown.out, shown.err
    with ColdStore(tmp_path / "[b]s[/i]", quota_bytes=64 << 20, min_free_bytes=0):
        pass
    assert "[b]s[/i]" in command("stats", "--store", "[b]s[/i]").out


def test_control_characters_are_made_visible() -> None:
    assert visible("a\x1b[0m\x07\x9b é\t\n") == "a\\x1b[0m\\x07\\x9b é\t\n"


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), (1.5, float("inf"))], "b": "\ud800"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": [None, [1.5, None]], "b": "\ud800"} and out.isascii()


# Streams that are closed, full or a pipe that no one reads, in processes that load no torch.

PROGRAM = """
import os, sys
{before}
from tierkv.tools.terminal import OutputError, standard_streams
with standard_streams():
    code = 0
    try:
        print("result" * {times})
        sys.stdout.flush()
    except OutputError as exc:
        code = 141 if exc.is_reader_gone else 2
        print(f"tierkv: {{exc}}", file=sys.stderr)
    if os.open(os.devnull, os.O_RDONLY) < 3:
        code = 9
sys.exit(code)
"""


def child(shell: str, *, times: int = 1, before: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(times=times, before=before)
    words = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {shell}', sys.executable, program]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("shell", "times", "code", "error"),
    [
        (">&-", 1, 2, "tierkv: the output cannot be written: standard output is closed\n"),
        (">/dev/full", 1, 2, "tierkv: the output cannot be written: No space left on device\n"),
        (">/dev/full", 100_000, 2, "tierkv: the output cannot be written: No space left on device\n"),
        (">/dev/full 2>/dev/full", 1, 2, ""),
        (">&- 2>&-", 1, 2, ""),
        ("2>&-", 1, 0, ""),
        ("<&-", 1, 0, ""),
        ("<&- 2>&-", 1, 0, ""),
        ("| head -c 1", 1_000_000, 141, None),
    ],
)
def test_output_that_goes_nowhere_is_one_line_and_takes_no_file_with_it(
    shell: str, times: int, code: int, error: str | None
) -> None:
    """Exit code 9 were a file on a descriptor below 3, where a library's message could reach it."""
    done = child(shell, times=times)
    assert done.returncode == code
    assert error is None or done.stderr == error


def test_a_command_whose_reader_has_gone_ends_quietly(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OutputError("Broken pipe", is_reader_gone=True)

    monkeypatch.setattr(store_commands, "open_existing", refuse)
    done = command("stats")
    assert (done.code, done.out, done.err) == (141, "", "")


@pytest.mark.parametrize("words", [[], ["daemon"]])
def test_without_a_command_the_help_is_all_that_is_printed(command: Command, words: list[str]) -> None:
    shown = command(*words)
    assert "--help" in shown.out and not shown.err


ALONE = [
    "warm",
    "run",
    "serve",
    "explain",
    "report",
    "stats",
    "inspect",
    "save",
    "load",
    "evict",
    "quota",
    "compact",
    "verify",
    "top",
    "replay",
    "train-policy",
    "move",
    "metrics",
    "examples",
]
GROUPS = {
    "daemon": ["start", "status", "stop", "prefetch", "unit"],
    "tenant": ["list", "set", "remove"],
    "remote": ["check", "inspect"],
}
COMMANDS = [
    [],
    *([name] for name in [*GROUPS, *ALONE]),
    *([group, name] for group, names in GROUPS.items() for name in names),
]


def test_the_short_option_shows_the_help_of_every_command(command: Command) -> None:
    assert set(cli.COMMANDS) == {*ALONE, *GROUPS}
    for words in COMMANDS:
        short, long = command(*words, "-h"), command(*words, "--help")
        assert short.code == 0 and "--help" in short.out and short == long, words


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError: division by zero"),
        (MemoryError(), "there is not enough memory"),
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), "unexpected UnicodeEncodeError"),
    ],
)
def test_no_traceback_reaches_a_terminal_unless_it_is_asked_for(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise error

    monkeypatch.setattr(store_commands, "open_existing", fail)
    done = command("verify")
    assert done.code == 2 and done.err.startswith(f"tierkv: {line}") and done.err.count("\n") == 1
    monkeypatch.setenv("TIERKV_TRACEBACK", "1")
    assert ("Traceback" in command("verify").err) == ("unexpected" in line)
