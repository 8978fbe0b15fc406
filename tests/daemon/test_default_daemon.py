"""Commands use the user's daemon where it runs, and are not disturbed by anything else at its place."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon_process import Start
from fake_daemon import FakeDaemon
from one_command import run_command

import tierkv.daemon.client_socket
from tierkv.daemon.messages import Welcome
from tierkv.engine.models import load_model
from tierkv.storage.cold import ColdStore
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.stores import StoreOptions

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default place of a daemon's socket; the default store is beside it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(short_path))
    monkeypatch.setenv("TIERKV_STORE", str(short_path / "store"))
    monkeypatch.delenv("TIERKV_SOCKET", raising=False)
    (short_path / "tierkv").mkdir(mode=0o700)
    return short_path / "tierkv" / "daemon.sock"


def test_a_daemon_at_the_default_place_is_used_and_named(
    place: Path, start_daemon: Start, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_daemon(socket="tierkv/daemon.sock")
    assert EngineOptions().config().socket == place
    assert capsys.readouterr().err == f"tierkv: using the daemon at {place} (--no-daemon does not)\n"
    assert StoreOptions().find_daemon() == place
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"no_daemon": True}, ""),
        ({"read_only": True}, ""),
        ({"codec": "lossy-int8"}, "--codec is for tiers of this process's own"),
        ({"cold": "1G", "warm": "1G"}, "--cold, --warm is for tiers of this process's own"),
        ({"min_free": "0"}, "--min-free is for tiers of this process's own"),
        ({"store": Path("/elsewhere")}, "has another store"),
    ],
)
def test_what_only_own_tiers_obey_leaves_the_daemon_out(
    place: Path, start_daemon: Start, capsys: pytest.CaptureFixture[str], options: dict[str, object], why: str
) -> None:
    start_daemon(socket="tierkv/daemon.sock")
    assert EngineOptions(**options).config().socket is None  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == bool(why)


def test_a_daemon_that_keeps_nothing_on_disk_is_not_used(
    place: Path, start_daemon: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start_daemon(socket="tierkv/daemon.sock", store=False)
    assert EngineOptions().config().socket is None
    assert "keeps nothing on disk, and is not used" in capsys.readouterr().err


def test_a_named_store_needs_no_daemon(place: Path, start_daemon: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start_daemon(socket="tierkv/daemon.sock")
    assert StoreOptions(store=Path("/elsewhere")).find_daemon() is None
    assert StoreOptions(no_daemon=True).find_daemon() is None
    assert capsys.readouterr().err == ""


def test_a_socket_and_no_daemon_are_refused(place: Path) -> None:
    for command in (["stats"], ["run", "hello"]):
        code, _, err = run_command(*command, "--socket", place, "--no-daemon")
        assert code == 2 and "not both" in err


# -- what is no daemon ------------------------------------------------------------------------------------


def stale(path: Path, _: ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def regular_file(path: Path, _: ExitStack) -> None:
    path.write_text("no socket")


def dangling_link(path: Path, _: ExitStack) -> None:
    path.symlink_to(path.with_name("nothing"))


def folder(path: Path, _: ExitStack) -> None:
    path.mkdir()


def listening(path: Path, stack: ExitStack, backlog: int) -> socket.socket:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def hanging(path: Path, stack: ExitStack) -> None:
    """Accept connections, as the kernel does for a stopped process, and say nothing."""
    listening(path, stack, 16)


def full(path: Path, stack: ExitStack) -> None:
    """Let no connection in: the queue of a stopped process is full."""
    listening(path, stack, 0)
    for _ in range(2):
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.setblocking(False)
        try:
            waiting.connect(str(path))
        except BlockingIOError:
            return


def babbling(path: Path, stack: ExitStack) -> None:
    stack.enter_context(FakeDaemon(path, welcome=lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4))


def lying(path: Path, stack: ExitStack) -> None:
    answer = Welcome(pid=-1, slab_bytes=-1, store="/", has_cold=True)
    stack.enter_context(FakeDaemon(path, welcome=lambda _: answer, descriptors=list))


SILENT = (stale, dangling_link, regular_file, folder)


@pytest.mark.parametrize("put", [*SILENT, hanging, full, babbling, lying])
def test_what_is_no_daemon_neither_disturbs_nor_delays_a_command(
    place: Path,
    short_path: Path,
    put: Callable[[Path, ExitStack], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ColdStore(short_path / "store", min_free_bytes=0):
        pass
    with ExitStack() as stack:
        put(place, stack)
        began = time.monotonic()
        code, out, err = run_command("compact", "--json")
        seconds = time.monotonic() - began
    assert code == 0 and json.loads(out)["bytes_after"] >= 0, err
    assert seconds < 4, "a second for the daemon, the rest for the command"
    assert err.count("\n") == (put not in SILENT)
    assert put in SILENT or "no daemon is used" in err


def test_a_daemon_of_another_user_is_not_used(
    place: Path, start_daemon: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_daemon(socket="tierkv/daemon.sock")
    monkeypatch.setattr(tierkv.daemon.client_socket, "peer_of", lambda _: (1, 12345))
    assert EngineOptions().config().socket is None
    said = capsys.readouterr().err
    assert "belongs to user 12345" in said and "no daemon is used" in said and said.count("\n") == 1


def test_without_a_home_there_is_no_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TIERKV_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIERKV_STORE", str(tmp_path))
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("tierkv.tools.options.home_directory", lambda _: None)
    assert EngineOptions().config().socket is None


# -- explain ----------------------------------------------------------------------------------------------


@pytest.fixture
def daemon_with_prompt(place: Path, start_daemon: Start, short_path: Path) -> Iterator[Path]:
    """Start a daemon of a warm tier that a prompt of the embedded model is in; return the file of the prompt."""
    load_model(None, cache_dir=short_path / "tierkv")
    start_daemon(slots=16_384, socket="tierkv/daemon.sock")
    path = short_path / "system.txt"
    path.write_text("You are a careful assistant. " * 12)
    code, _, err = run_command("warm", path, "--block-size", 16)
    assert code == 0 and "using the daemon" in err, err
    yield path
    assert os.path.exists(place)


def test_explain_asks_the_daemon_for_its_warm_tier(daemon_with_prompt: Path) -> None:
    asked = ("explain", "Hello", "--system", daemon_with_prompt, "--block-size", 16, "--json")
    code, out, err = run_command(*asked)
    assert code == 0 and "using the daemon" in err, err
    found = json.loads(out)
    assert found["cached_tokens"]["warm"] > 300 and found["found_tokens"] == sum(found["cached_tokens"].values())
    code, out, _ = run_command(*asked, "--no-daemon")
    alone = json.loads(out)
    assert alone["cached_tokens"] == {"warm": 0, "cold": found["found_tokens"]}


def test_explain_reads_the_weights_where_a_daemon_keeps_nothing_on_disk(
    place: Path, start_daemon: Start, short_path: Path
) -> None:
    load_model(None, cache_dir=short_path / "tierkv")
    daemon = start_daemon(slots=16_384, socket="other.sock", store=False)
    socket_option = ("--block-size", 16, "--socket", daemon.socket)
    assert run_command("run", "Hello there, " * 20, "--max-new-tokens", 1, *socket_option)[0] == 0
    code, out, err = run_command("explain", "Hello there, " * 20 + "you", "--json", *socket_option)
    assert code == 0, err
    found = json.loads(out)
    assert found["weights_compared"] and found["cached_tokens"]["warm"] > 200
    assert found["prompt"].startswith("you")
