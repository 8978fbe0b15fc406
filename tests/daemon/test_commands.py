"""`tierkv daemon ...` and `--socket`, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import is_reachable
from one_command import Command, run_command


@pytest.fixture
def tierkv(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Return a function that runs one command; the daemon that it may have left is stopped at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("TIERKV_SOCKET", str(short_path / "d.sock"))
    monkeypatch.setenv("TIERKV_STORE", str(short_path / "store"))
    yield run_command
    if is_reachable(short_path / "d.sock"):
        run_command("daemon", "stop")


def test_start_status_stop(tierkv: Command, short_path: Path) -> None:
    code, out, err = tierkv("daemon", "start", "--detach", "--warm", "1M")
    assert code == 0 and "serves on" in out, err
    report = json.loads(tierkv("daemon", "status", "--json")[1])
    assert report["warm_bytes"] == 1 << 20 and report["store"] == str(short_path / "store")
    assert "tierkv daemon" in tierkv("daemon", "status")[1]
    assert json.loads(tierkv("stats", "--json")[1])["blocks"] == 0
    assert tierkv("compact", "--json")[0] == 0
    assert "has ended" in tierkv("daemon", "stop")[1]
    assert not (short_path / "d.sock").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["daemon", "status"], "no daemon answers at"),
        (["daemon", "stop"], "no daemon answers at"),
        (["stats"], "no daemon answers at"),
        (["stats", "--store", "/x", "--socket", "/y"], "not both"),
        (["daemon", "start", "--warm", "900T"], "does not fit"),
        (["daemon", "start", "--warm", "much"], "is not a size"),
        (["daemon", "start", "--socket", "/tmp/" + "x" * 120, "--warm", "1M"], "longer than 107 bytes"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(tierkv: Command, arguments: list[str], said: str) -> None:
    code, out, err = tierkv(*arguments)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1


def test_a_second_daemon_says_whose_the_socket_is_and_keeps_the_log(tierkv: Command, short_path: Path) -> None:
    assert tierkv("daemon", "start", "--detach", "--warm", "1M", "--no-store")[0] == 0
    before = (short_path / "d.sock.log").read_text()
    code, _, err = tierkv("daemon", "start", "--detach", "--warm", "1M", "--no-store")
    assert code == 2 and "belongs to another daemon, process" in err
    assert (short_path / "d.sock.log").read_text().startswith(before)
    code, _, err = tierkv("stats")
    assert code == 2 and "keeps nothing on disk" in err
