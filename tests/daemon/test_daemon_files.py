"""The daemon's socket, lock and log: what another user may have put in their place is not touched."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

import pytest
from daemon_process import Start

from tierkv.daemon import host
from tierkv.daemon.host import check_folder, exclusive_file, listening_socket, read_lock_file
from tierkv.daemon.log_file import BoundedHandler, open_log, trim_log
from tierkv.errors import DaemonError


def listen(path: Path) -> None:
    with listening_socket(path):
        pass


def prepare(path: Path, kind: str, target: Path) -> None:
    """Put something at a path that is not the file that should be there."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "hard link":
        os.link(target, path)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO", "directory"])
def test_a_lock_or_a_log_that_is_no_own_file_is_refused_and_left_alone(short_path: Path, kind: str) -> None:
    precious = short_path / "precious"
    precious.write_text("precious")
    for name in ("d.sock.lock", "d.sock.log"):
        prepare(short_path / name, kind, precious)
    with pytest.raises(DaemonError, match="the lock file cannot be used"):
        listen(short_path / "d.sock")
    with pytest.raises(DaemonError, match="the log cannot be used"):
        open_log(short_path / "d.sock.log")
    assert precious.read_text() == "precious"
    assert not (short_path / "d.sock").exists()


def test_a_lock_names_its_process_and_what_it_notes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert read_lock_file(path) == (False, [])
    with exclusive_file(path, "it") as lock:
        lock.note("a", "b")
        assert read_lock_file(path) == (True, [str(os.getpid()), "a", "b"])
        lock.note("c")
        with pytest.raises(DaemonError, match=f"it belongs to another daemon, process {os.getpid()}"):
            host._open_locked(path, "it")
    assert read_lock_file(path) == (False, [str(os.getpid()), "c"])


def test_a_living_daemon_keeps_its_socket_where_its_lock_file_was_removed(short_path: Path) -> None:
    path = short_path / "d.sock"
    with listening_socket(path):
        path.with_name("d.sock.lock").unlink()
        with pytest.raises(DaemonError, match="a process listens"):
            listen(path)
        assert path.is_socket()


def test_the_socket_is_its_owners_alone_and_a_dead_daemons_is_replaced(short_path: Path) -> None:
    path = short_path / "d.sock"
    before = os.umask(0)
    try:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        with listening_socket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_socket_that_took_ones_place_is_not_removed_at_the_end(short_path: Path) -> None:
    path = short_path / "d.sock"
    with listening_socket(path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


@pytest.mark.parametrize("kind", ["link", "FIFO", "directory"])
def test_what_is_no_socket_is_not_replaced_by_one(short_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_path / "other"))
    prepare(short_path / "d.sock", kind, short_path / "other")
    with pytest.raises(DaemonError, match="exists and is no socket"):
        listen(short_path / "d.sock")
    assert os.path.lexists(short_path / "d.sock") and (short_path / "other").exists()


def test_a_socket_of_another_user_is_not_replaced(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_path / "d.sock"))
    monkeypatch.setattr(host.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DaemonError, match="is the socket of user"):
        host._remove_stale(short_path / "d.sock")


def test_a_folder_that_every_user_may_change_is_refused_a_groups_is_told(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = short_path / "place"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(DaemonError, match="every user may replace files"):
        listen(place / "d.sock")
    assert list(place.iterdir()) == []
    place.chmod(0o1777)
    check_folder(place)
    assert "may replace" not in caplog.text
    place.chmod(0o770)
    check_folder(place)
    assert "other users may replace files in" in caplog.text


def test_a_log_is_cut_to_its_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = open_log(path)
    try:
        os.write(fd, b"".join(b"line %d\n" % number for number in range(1000)))
        trim_log(fd, max_bytes=1 << 20)
        assert path.stat().st_size > 5000, "a short one stays"
        trim_log(fd, max_bytes=1000, kept_bytes=100)
        lines = path.read_text().splitlines()
        assert lines[-1] == "line 999" and len(lines) < 20 and all(line.startswith(("line", "(")) for line in lines)
        os.write(fd, b"more\n")
        assert path.read_text().endswith("line 999\nmore\n")
    finally:
        os.close(fd)


def test_a_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = open_log(tmp_path / "log")
    with os.fdopen(fd, "a") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        handler = BoundedHandler(max_bytes=4096, kept_bytes=1024)
        for number in range(1000):
            handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "message %d", (number,), None))
        assert (tmp_path / "log").stat().st_size <= 4096 + 64
    assert (tmp_path / "log").read_text().endswith("message 999\n")


def test_the_stores_lock_names_the_socket(start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon()
    assert daemon.process
    is_held, lines = read_lock_file(short_path / "store" / "daemon.lock")
    assert is_held and lines == [str(daemon.process.pid), str(daemon.socket)]


def test_a_lock_file_that_is_replaced_while_it_is_locked_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "lock", []
    flock = host.fcntl.flock

    def replaced_once(fd: int, kind: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()
            path.write_text("another's")
        flock(fd, kind)

    monkeypatch.setattr(host.fcntl, "flock", replaced_once)
    with exclusive_file(path, "it"):
        assert len(calls) == 2
        assert path.read_text() == f"{os.getpid()}\n"
