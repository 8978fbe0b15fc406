"""How the command line begins: help, version, verbosity, completion, and what each command loads."""

from __future__ import annotations

import inspect
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from tierkv import __version__
from tierkv.storage.cold import ColdStore
from tierkv.tools import cli, terminal

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    logger = logging.getLogger("tierkv")
    before = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = before
    terminal.set_verbosity(0)


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("daemon",), ("daemon", "-h")])
def test_help_is_no_error(command: Command, arguments: tuple[str, ...]) -> None:
    printed = command(*arguments)
    assert printed.code == 0 and not printed.err
    assert "Usage:" in printed.out
    assert ("status" if "daemon" in arguments else "train-policy") in printed.out


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_printed(command: Command, option: str) -> None:
    assert command(option).out == f"{__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_summary_of_a_command_is_how_its_help_begins(command: Command, name: str) -> None:
    place = cli.COMMANDS[name]
    found = getattr(import_module(f"tierkv.tools.{place.module}"), place.name)
    text = found.info.help if isinstance(found, typer.Typer) else inspect.getdoc(found)
    assert text.startswith(place.summary) and place.summary.endswith(".")
    printed = command(name, "-h")
    assert printed.code == 0 and place.summary.split()[0] in printed.out


def loaded_by(*arguments: str) -> set[str]:
    """Run a command in a process of its own; return the modules that it has loaded."""
    code = (
        "import sys; from tierkv.tools import cli; sys.argv[0] = 'tierkv'\n"
        "try: cli.main()\n"
        "finally: print('\\n', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["-h"],
        ["stats"],
        ["inspect"],
        ["quota"],
        ["verify"],
        ["evict", "--to", "1G"],
        ["daemon", "status"],
        ["daemon", "stop"],
        ["daemon", "unit"],
        ["metrics"],
        ["examples"],
        ["top", "-h"],
        ["save", "-h"],
        ["load", "-h"],
        ["replay", "-h"],
    ],
)
def test_a_command_that_needs_no_model_starts_without_torch(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("You are a careful assistant. " * 20)
    if arguments == ["inspect"]:
        assert command("warm", "prompts.txt", "--block-size", 16).code == 0
        assert "im_start" in command("inspect").out, "it shows texts"
    heavy = {"torch", "transformers", "triton"} & loaded_by(*arguments)
    assert not heavy
    if arguments == ["--version"]:
        assert not {"numpy", "lmdb"} & loaded_by(*arguments)


A_COMMAND_OF_NOTHING = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import lmdb, numpy, rich.table, typer
app = typer.Typer()
app.command()(lambda: None)
app([])
"""


def cpu_seconds(*command: str) -> float:
    """Return the least CPU time that three runs of a Python command take."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize(
    "arguments", [["--version"], ["stats"], ["inspect"], ["daemon", "status"], ["evict", "--to", "1G"]], ids=" ".join
)
def test_a_command_that_needs_no_model_starts_at_once(command: Command, arguments: list[str], tmp_path: Path) -> None:
    """In 0.4 s of CPU time; on a machine that is slower or busy, in 2.5 times what a command of nothing takes there."""
    if arguments[0] != "--version":
        with ColdStore(tmp_path / "store", min_free_bytes=0):
            pass
    libraries = cpu_seconds("-c", A_COMMAND_OF_NOTHING)
    assert cpu_seconds("-m", "tierkv", *arguments) < max(0.4, 2.5 * libraries)


def test_a_command_that_computes_may_use_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    seen: list[str | None] = []
    original = cli.importlib.import_module

    def recorded(name: str) -> Any:
        seen.append(os.environ.get("OPENBLAS_NUM_THREADS"))
        return original(name)

    monkeypatch.setattr(cli.importlib, "import_module", recorded)
    for name in ("stats", "run"):
        cli.load_command(name)
    assert seen == ["1", None] and "OPENBLAS_NUM_THREADS" not in os.environ


def test_quiet_prints_the_result_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("You are a careful assistant. " * 20)
    loud = command("warm", "prompts.txt", "--block-size", 16)
    assert loud.code == 0
    quiet = command("-q", "run", "hello", "--max-new-tokens", 2)
    assert quiet.code == 0 and quiet.out and not quiet.err
    assert command("run", "hello", "--max-new-tokens", 2).err, "without -q there is more"
    failed = command("-q", "warm", "no such file")
    assert failed.code == 2 and failed.err


def test_verbose_logs_what_the_library_does(command: Command) -> None:
    printed = command("-vv", "stats")
    assert printed.code == 2
    assert logging.getLogger("tierkv").isEnabledFor(logging.DEBUG)
    command("-v", "stats")
    assert not logging.getLogger("tierkv").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("tierkv").isEnabledFor(logging.INFO)


def test_commands_and_options_are_completed() -> None:
    def complete(line: str) -> str:
        environment = {"_TIERKV_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from tierkv.tools import cli; sys.argv = ['tierkv']; cli.main()"],
            cwd=ROOT,
            env={"PATH": "", "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    assert complete("tierkv ins").split() == ["inspect"]
    assert "--namespace" in complete("tierkv inspect --na").split()
