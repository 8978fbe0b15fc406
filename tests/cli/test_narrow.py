"""Commands are readable in 60 columns: no number, name or header is cut."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Start
from synthetic_traces import make_requests, write_trace

from tierkv.engine.models import load_model
from tierkv.engine.prompts import prefix_tokens, read_prompts
from tierkv.engine.runner import open_runner
from tierkv.storage.cold import ColdStore
from tierkv.tools.engine_options import EngineOptions

Command = Callable[..., Any]
WIDTH = 60


@pytest.fixture(scope="module")
def filled(embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prompts, and a store of two of them, one pinned, in two dtypes."""
    folder = tmp_path_factory.mktemp("filled")
    system = "You are a careful assistant. " * 12
    (folder / "prompts.txt").write_text(f"{system}Be brief.\n---\n{system}Be kind.\n")
    (folder / "pinned.txt").write_text(f"{system}Be both.\n")
    for dtype, file, pin in (
        ("float32", "prompts.txt", False),
        ("float32", "pinned.txt", True),
        ("bfloat16", "pinned.txt", False),
    ):
        options = EngineOptions(store=folder / "store", block_sizes=[16], dtype=dtype, no_daemon=True)
        loaded = load_model(None, cache_dir=embedded_cache / "tierkv", dtype=dtype)
        with open_runner(loaded, options.config()) as runner:
            for request in read_prompts(folder / file):
                tokens = prefix_tokens(loaded.tokenizer, request)
                runner.prefill(tokens)
                runner.cache.flush()
                if pin:
                    runner.cache.cold.set_pinned(runner.cache.match(tokens).block_hashes, True)  # type: ignore[union-attr]
    return folder


@pytest.fixture
def narrow(command: Command, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs a command on a copy of the filled store, in 60 columns."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def run(*arguments: object) -> str:
        printed = command(*arguments)
        assert printed.code == 0, printed.err
        text = printed.out + printed.err
        assert max(map(len, text.splitlines())) <= WIDTH
        return str(text)

    return run


def test_inspect_cuts_nothing_but_texts(narrow: Command, tmp_path: Path) -> None:
    text = narrow("inspect")
    for header in (
        "namespace",
        "model",
        "dtype",
        "size",
        "blocks",
        "shared",
        "stored",
        "used",
        "tokens",
        "age",
        "own text",
    ):
        assert re.search(rf"(^|\s){header}(\s|$)", text, re.MULTILINE), header
    with ColdStore(tmp_path / "store", read_only=True) as store:
        namespaces = store.namespaces()
    assert all(each.digest.hex()[:8] in text for each in namespaces) and len(namespaces) == 2
    assert "bfloat16" in text and "float32" in text and "embedded" in text
    assert len(re.findall(r"\d+\.\d [KM]iB", text)) >= 6
    lines = [line for line in text.splitlines() if "…" in line]
    assert lines and all(line.rstrip().endswith("…") for line in lines), "only the last column, a text, is cut"
    assert "pinned:" in text


def test_stats_shows_the_whole_path(narrow: Command, tmp_path: Path) -> None:
    long = tmp_path / ("a-long-name-" * 8)
    os.rename(tmp_path / "store", long)
    text = narrow("stats", "--store", long)
    assert "…" not in text and str(long) in re.sub(r"[\s│]", "", text)
    assert "bytes quota" in text and "64.0 GiB" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("warm", "prompts.txt", "--block-size", 16),
        ("warm", "prompts.txt", "--block-size", 16, "--dry-run"),
        ("run", "Hello", "--block-size", 16, "--max-new-tokens", 2),
        ("explain", "Hello", "--block-size", 16),
        ("explain", "Hello", "--block-size", 16, "--dtype", "float16"),
        ("top", "--once", "--store", "store"),
    ],
)
def test_other_tables_cut_nothing(narrow: Command, arguments: tuple[object, ...]) -> None:
    assert "…" not in narrow(*arguments)


def test_the_status_of_a_daemon_cuts_no_name(
    narrow: Command, command: Command, start_daemon: Start, tmp_path: Path
) -> None:
    daemon = start_daemon(slots=1024)
    store = daemon.socket.parent / "store"
    for name, limit in (("research-platform", "1000M"), ("default", "1000G")):
        salt = "s" * (name != "default")
        assert command("tenant", "set", name, "--salt", salt, "--store", store, "--cold-limit", limit).code == 0
        assert command("warm", "prompts.txt", "--block-size", 16, "--socket", daemon.socket, "--salt", salt).code == 0
    for arguments in (("daemon", "status", "--socket", daemon.socket), ("tenant", "list", "--store", store)):
        text = narrow(*arguments)
        assert "…" not in text and "research-platform" in text
        assert "1000.0 MiB" in text and "1000.0 GiB" in text, "no size is cut in two"
    status = narrow("daemon", "status", "--socket", daemon.socket)
    for name in ("namespace", "embedded", "reservations", "waiting requests", "claimed blocks", "1,048,576"):
        assert name in status, name
    assert "…" not in narrow("top", "--once", "--socket", daemon.socket)


def test_replay_and_train_policy_cut_no_name(narrow: Command, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", make_requests("scans")[:200])
    narrow("train-policy", trace, "--out", "a-policy-of-a-rather-long-name.json")
    names = f"lru,hit-density,learned:{tmp_path}/a-policy-of-a-rather-long-name.json"
    text = narrow("replay", trace, "--policy", names, "--capacity", "1%,5%")
    assert "…" not in text and text.startswith("t.jsonl"), "no line of progress where there is no terminal"
    policies = "".join(re.findall(r"^[│ ]([^│\n]*)│", text, re.MULTILINE)).replace(" ", "")
    assert "hit-density" in policies and "a-policy-of-a-rather-long-name.json" in policies


# -- top --------------------------------------------------------------------------------------------------


def test_q_ends_top_and_the_screen_says_so(narrow: Command, tmp_path: Path) -> None:
    assert _keys_of_top(tmp_path, b"q") == 0


def test_another_key_does_not(narrow: Command, tmp_path: Path) -> None:
    assert _keys_of_top(tmp_path, b"x", then=b"Q") == 0


def _keys_of_top(folder: Path, key: bytes, then: bytes = b"") -> int:
    """Press keys once the line that names them is there; return the exit code. `then` is pressed a little later."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_LEADER, "top", "--store", str(folder / "store"), "--interval", "600"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        _read_until(ours, b"q ends")
        os.write(ours, key)
        if then:
            _read_until(ours, b"q ends")  # it has looked at once, long before the interval is over
            assert process.poll() is None
            os.write(ours, then)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            _read_some(ours)
        return process.wait(1)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


_AS_LEADER = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from tierkv.tools import cli; sys.argv[0] = 'tierkv'; cli.main()"
)


def _read_some(terminal: int) -> bytes:
    if not select.select([terminal], [], [], 0.1)[0]:
        return b""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def _read_until(terminal: int, wanted: bytes) -> None:
    seen, deadline = b"", time.monotonic() + 30
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        seen += _read_some(terminal)
