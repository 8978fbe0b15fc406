"""The daemon ends in bounded time, whatever hangs, and says what it has lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from child_process import ENVIRONMENT, command
from daemon_process import SLOT_BYTES, TIMEOUT_S
from raw_client import chain_of, connect, tokens_of, write_prompt
from test_life_and_death import eventually

from tierkv.daemon.ending import Ending
from tierkv.daemon.host import read_lock_file
from tierkv.daemon.messages import Done, Flush, Found, Match
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.tools import daemon as tool

WORKER = Path(__file__).with_name("hanging_worker.py")
TOKENS = tokens_of(16)

HangingDaemon = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start_hanging(short_path: Path) -> HangingDaemon:
    def start(what: str) -> subprocess.Popen[str]:
        options = {
            "warm_bytes": 64 * SLOT_BYTES,
            "cold_bytes": 64 << 20,
            "min_free_bytes": 0,
            "stop_s": 0.5,
            "stall_s": 0.5,
        }
        options |= {"socket": str(short_path / "d.sock"), "store": str(short_path / "store")}
        with (short_path / "log").open("ab") as log:
            line = command(WORKER, json.dumps(options), what)
            process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "up\n", (short_path / "log").read_text()
        return process

    started: list[subprocess.Popen[str]] = []
    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.wait(TIMEOUT_S)
        assert process.stdout
        process.stdout.close()


def write_and_hang(short_path: Path) -> None:
    with connect(short_path / "d.sock") as client:
        assert write_prompt(client, TOKENS) == 4
    eventually(lambda: "a call hangs" in (short_path / "log").read_text())


def test_a_store_that_hangs_is_given_up_in_time_and_what_is_lost_is_counted(
    start_hanging: HangingDaemon, short_path: Path
) -> None:
    process = start_hanging("put")
    write_and_hang(short_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 1
    log = (short_path / "log").read_text()
    assert "4 blocks were not written to the store" in log
    assert read_lock_file(short_path / "d.sock.lock") == (False, [str(process.pid), "not written: 4"])
    assert not (short_path / "d.sock").exists()


def test_a_loop_that_hangs_does_not_keep_sigterm_from_ending_the_daemon(
    start_hanging: HangingDaemon, short_path: Path
) -> None:
    process = start_hanging("loop")
    with connect(short_path / "d.sock") as client, pytest.raises(DaemonGoneError):
        client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS), Found, timeout_s=0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 1


def test_stop_says_what_was_not_written(
    start_hanging: HangingDaemon, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_hanging("put")
    write_and_hang(short_path)
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    tool.stop(short_path / "d.sock")
    reaper.join()
    assert f"tierkv daemon {process.pid} has ended; 4 blocks were not written" in capsys.readouterr().out


def test_stop_ends_a_daemon_that_does_not_answer(
    start_hanging: HangingDaemon,
    short_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "_ANSWER_S", 0.3)
    monkeypatch.setattr("tierkv.daemon.client.CONNECT_TIMEOUT_S", 0.3)
    process = start_hanging("loop")
    with connect(short_path / "d.sock") as client, pytest.raises(DaemonGoneError):
        client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS), Found, timeout_s=0.2)
    tool.stop(short_path / "d.sock")
    said = capsys.readouterr()
    assert f"sending SIGTERM to process {process.pid}" in said.err and "has ended" in said.out


def test_stop_says_how_to_end_a_daemon_that_is_stopped(
    start_hanging: HangingDaemon, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "_ANSWER_S", 0.2)
    monkeypatch.setattr(tool, "_STOP_S", 0.3)
    monkeypatch.setattr("tierkv.daemon.client.CONNECT_TIMEOUT_S", 0.2)
    process = start_hanging("put")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DaemonError, match=f"kill -KILL {process.pid} ends it"):
        tool.stop(short_path / "d.sock")


def test_a_flush_to_a_store_that_hangs_is_refused_in_time(
    start_hanging: HangingDaemon, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hanging("put")
    write_and_hang(short_path)
    with connect(short_path / "d.sock") as client, pytest.raises(DaemonError, match="nothing was written"):
        client.call(Flush(), Done, timeout_s=10)


def test_an_end_that_comes_in_time_is_left_alone() -> None:
    stopped, left = threading.Event(), []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Ending(30, report_loss=lambda _: None, leave=left.append) as ending:
        ending.handle_signals(stopped.set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(5)
        ending.begin()
    assert left == [] and [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_end_whose_report_loss_hang_comes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.daemon.ending._REPORT_S", 0.1)
    left: list[int] = []
    with Ending(0.1, report_loss=lambda _: time.sleep(1), leave=left.append) as ending:
        ending.handle_signals(lambda: None)
        ending.begin()
        eventually(lambda: left == [1])
