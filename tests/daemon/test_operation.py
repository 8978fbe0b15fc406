"""The daemon as its operator sees it: log lines, systemd's notifications, reload, and memory limits."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from child_process import ENVIRONMENT, TESTS
from daemon_process import TIMEOUT_S
from raw_client import connect, tokens_of, write_prompt
from test_life_and_death import eventually

from tierkv.daemon.log_lines import EVICTION_LINE_S, LogLines, reason_of
from tierkv.daemon.messages import Done, Flush, Release, Status, StatusReport, Stop
from tierkv.daemon.protocol import ProtocolError
from tierkv.daemon.service_manager import ServiceManager
from tierkv.errors import CapacityError, ConfigError, DaemonError, StoreError
from tierkv.tools.logs import LogFormat, configure_logs
from tierkv.tools.service import size_of_slab
from tierkv.values.free_memory import MemoryRoom, memory_room
from tierkv.values.log_event import LogEvent, LogLimit

MIB = 1 << 20

# --- The daemon as a command --------------------------------------------------------------------------------------


@contextmanager
def daemon_command(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tierkv daemon start` in the foreground; its log is the file `log`."""
    line = [sys.executable, "-m", "tierkv", "daemon", "start", "--socket", str(folder / "d.sock"), "--warm", "4M"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*line, "--min-free", "0", "--store", str(folder / "store"), *arguments],
            env={**ENVIRONMENT, **environment},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def objects_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log_of(folder).splitlines()]


@pytest.fixture
def notifications(short_path: Path) -> Iterator[Callable[[], str]]:
    """Return a function that waits for the next datagram, as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_path / "notify"))
        manager.settimeout(TIMEOUT_S)
        yield lambda: manager.recv(4096).decode()


def test_the_daemon_tells_systemd_when_it_is_ready_alive_reloads_and_stops(
    short_path: Path, notifications: Callable[[], str]
) -> None:
    environment = {"NOTIFY_SOCKET": str(short_path / "notify"), "WATCHDOG_USEC": "100000"}
    with daemon_command(short_path, **environment) as process:
        ready = notifications().splitlines()
        assert ready[0] == "READY=1" and f"MAINPID={process.pid}" in ready
        with connect(short_path / "d.sock") as client:
            assert client.call(Status(), StatusReport).pid == process.pid
        assert notifications() == "WATCHDOG=1"
        process.send_signal(signal.SIGHUP)
        said = [notifications()]
        while not said[-1].startswith("READY=1"):
            said.append(notifications())
        assert any(each.startswith("RELOADING=1\nMONOTONIC_USEC=") for each in said)
        process.terminate()
        while (last := notifications()) == "WATCHDOG=1":
            pass
        assert last == "STOPPING=1"
        assert process.wait(TIMEOUT_S) == 0
    assert "msg=reloaded" in log_of(short_path)


def test_lines_have_time_in_utc_level_part_and_named_values(short_path: Path) -> None:
    with daemon_command(short_path) as process:
        eventually(lambda: "msg=serving" in log_of(short_path))
        with connect(short_path / "d.sock") as client, pytest.raises(DaemonError):
            client.call(Release(slots=b"123"), Done)
        process.terminate()
        process.wait(TIMEOUT_S)
    lines = log_of(short_path).splitlines()
    assert all(line.startswith("time=20") and "Z level=" in line and " part=daemon." in line for line in lines), lines
    (refused,) = (line for line in lines if "msg=refused" in line)
    assert "level=warning" in refused and "client=raw reason=protocol error=" in refused
    assert f"socket={short_path}/d.sock" in next(line for line in lines if "msg=serving" in line)
    assert any("msg=stopping reason=SIGTERM uptime_s=" in line for line in lines)
    assert "msg=stopped not_written=0" in lines[-1]


def test_json_lines_have_the_same_values(short_path: Path) -> None:
    with daemon_command(short_path, "--log-format", "json") as process:
        eventually(lambda: "serving" in log_of(short_path))
        with connect(short_path / "d.sock") as client:
            client.call(Stop(), Done)
        process.wait(TIMEOUT_S)
    serving, stopping, stopped = objects_of(short_path)
    assert serving["msg"] == "serving" and serving["pid"] == process.pid and serving["warm_bytes"] == 4 * MIB
    assert serving["level"] == "info" and str(serving["time"]).endswith("Z")
    assert stopping["reason"] == "asked by a client" and stopped["not_written"] == 0


def test_a_detached_daemon_opens_its_log_again_at_sighup(short_path: Path) -> None:
    line = [sys.executable, "-m", "tierkv", "daemon", "start", "--detach", "--no-store", "--warm", "4M"]
    subprocess.run([*line, "--socket", str(short_path / "d.sock")], env=ENVIRONMENT, check=True, capture_output=True)
    log, old = short_path / "d.sock.log", short_path / "old.log"
    with connect(short_path / "d.sock") as client:
        pid = client.welcome.pid
        try:
            log.rename(old)  # as logrotate does
            os.kill(pid, signal.SIGHUP)
            eventually(lambda: log.exists() and "msg=reloaded" in log.read_text())
            assert "msg=serving" in old.read_text() and "reloaded" not in old.read_text()
        finally:
            client.call(Stop(), Done)
    eventually(lambda: "msg=stopped" in log.read_text())
    assert "stopped" not in old.read_text()


def test_metrics_without_their_library_are_refused_before_anything_starts(short_path: Path) -> None:
    (short_path / "prometheus_client.py").write_text("raise ModuleNotFoundError('none', name='prometheus_client')")
    path = f"{short_path}:{ENVIRONMENT['PYTHONPATH']}"
    with daemon_command(short_path, "--metrics-port", "0", PYTHONPATH=path) as process:
        assert process.wait(TIMEOUT_S) == 2
    assert "pip install 'tierkv[metrics]'" in log_of(short_path)


# --- Evictions and refusals -----------------------------------------------------------------------------------------


def test_evictions_of_some_seconds_share_one_line(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    lines = LogLines(refusals_per_minute=1, clock=lambda: now)
    assert not lines.are_evictions_due
    now = EVICTION_LINE_S
    assert lines.are_evictions_due
    with caplog.at_level(logging.INFO):
        lines.evicted({"warm": 5, "cold": 0})
        assert not lines.are_evictions_due
        now = 3 * EVICTION_LINE_S
        lines.evicted({"warm": 7, "cold": 1})
        lines.evicted({"warm": 7, "cold": 1})
    assert caplog.messages == [
        "evicted tier=warm blocks=5 seconds=10",
        "evicted tier=warm blocks=2 seconds=20",
        "evicted tier=cold blocks=1 seconds=20",
    ]


def test_a_minute_has_so_many_refusals_and_the_next_one_says_how_many_were_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    lines = LogLines(refusals_per_minute=2, clock=lambda: now)
    for _ in range(5):
        lines.refused("a", "why not", reason="store")
    now = 60.0
    lines.refused("b", "no", reason="capacity")
    assert caplog.messages == [
        *['refused client=a reason=store error="why not"'] * 2,
        "refused more messages count=3",
        "refused client=b reason=capacity error=no",
    ]


def test_a_limit_that_is_not_reached_reports_nothing() -> None:
    now = 0.0
    limit = LogLimit(2, clock=lambda: now)
    assert [limit.take() for _ in range(3)] == [(True, 0), (True, 0), (False, 0)]
    now = 61.0
    assert [limit.take(), limit.take()] == [(True, 1), (True, 0)]


def test_each_error_has_a_reason() -> None:
    errors = [ProtocolError("x"), CapacityError("x"), StoreError("x"), DaemonError("x"), ValueError("x")]
    assert [reason_of(each) for each in errors] == ["protocol", "capacity", "store", "refused", "internal"]


def test_the_reasons_of_misses_and_refusals_are_counted(short_path: Path) -> None:
    with daemon_command(short_path), pytest.MonkeyPatch.context():
        eventually(lambda: "msg=serving" in log_of(short_path))
        with connect(short_path / "d.sock") as client:
            write_prompt(client, tokens_of(16))
            with pytest.raises(DaemonError):
                client.call(Release(slots=b"123"), Done)
            report = client.call(Status(), StatusReport)
    assert report.reasons["refused_messages"] == {"protocol": 1} and report.counters["refused_messages"] == 1
    assert report.version and report.tenants[0].owner == ""


# --- Lines ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root, ours = logging.getLogger(), logging.getLogger("tierkv")
    before = root.handlers[:], root.level, ours.handlers[:], ours.level
    yield root
    root.handlers[:], ours.handlers[:] = before[0], before[2]
    root.setLevel(before[1])
    ours.setLevel(before[3])


@pytest.mark.parametrize("log_format", LogFormat)
def test_a_record_is_one_line_whatever_it_holds(
    log_format: LogFormat, root_logger: logging.Logger, tmp_path: Path
) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    configure_logs(log_format, handler)
    log = logging.getLogger("tierkv.some.room")
    log.info(LogEvent("two\nlines", client='a "b"\n\x1b[1mc', empty="", share=0.25, time="mine"))
    log.warning("plain %d", 5)
    try:
        raise ValueError("it failed")
    except ValueError:
        log.exception("a failure")
    log.debug("unseen")
    handler.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 3 and "\x1b" not in "".join(lines)
    if log_format is LogFormat.JSON:
        first, second, third = map(json.loads, lines)
        assert first["client"] == 'a "b"\n\x1b[1mc' and first["share"] == 0.25 and first["time"] != "mine"
        assert (second["level"], second["part"], second["msg"]) == ("warning", "some.room", "plain 5")
        assert "ValueError: it failed" in third["traceback"]
    else:
        assert 'msg="two\\nlines" client="a \\"b\\"\\n\\u001b[1mc" empty="" share=0.25' in lines[0]
        assert 'level=warning part=some.room msg="plain 5"' in lines[1]
        assert "ValueError: it failed" in lines[2]


# --- systemd --------------------------------------------------------------------------------------------------------


def test_without_systemd_nothing_is_sent_and_nothing_fails(short_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "/no/such"}):
        manager = ServiceManager.of_environment({**environment, "WATCHDOG_USEC": "1"})
        manager.ready("x")
        manager.alive()
        manager.stopping()


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0tierkv-test-{os.getpid()}")
        ServiceManager(f"@tierkv-test-{os.getpid()}").stopping()
        manager.setblocking(False)
        assert manager.recv(100) == b"STOPPING=1"


def test_the_watchdog_of_another_process_is_not_served(short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_path / "n"))
        manager.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(short_path / "n"), "WATCHDOG_USEC": "60000000"}
        ServiceManager.of_environment({**environment, "WATCHDOG_PID": "1"}).alive()
        with pytest.raises(BlockingIOError):
            manager.recv(100)
        ours = ServiceManager.of_environment({**environment, "WATCHDOG_PID": str(os.getpid())})
        ours.alive()
        ours.alive()  # twice a minute is enough
        assert manager.recv(100) == b"WATCHDOG=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    command = tmp_path / "a 100% $folder" / "tierkv"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tierkv "$@"\n')
    command.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    made = subprocess.run(["tierkv", "daemon", "unit"], env=environment, capture_output=True, text=True, check=True)
    assert "Type=notify\n" in made.stdout and "MemoryMax=" in made.stdout
    unit = tmp_path / "tierkv-daemon.service"
    unit.write_text(made.stdout)
    for manager in ("--user", "--system"):
        checked = subprocess.run(
            ["systemd-analyze", manager, "verify", str(unit)],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


# --- Memory ---------------------------------------------------------------------------------------------------------


class Machine:
    """A machine's /proc and /sys/fs/cgroup in a folder."""

    def __init__(self, folder: Path, *, groups: str = "0::/a/b\n", available: int = 1000 * MIB) -> None:
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").write_text(groups)
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:    {available >> 10} kB\n")

    def group(self, path: str, **values: object) -> None:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("__", ".")).write_text(f"{value}\n")

    def room(self) -> MemoryRoom:
        return memory_room(proc=self.proc, groups=self.groups)


def test_without_control_groups_the_machine_limits(tmp_path: Path) -> None:
    assert Machine(tmp_path).room() == MemoryRoom(1000 * MIB, "this machine")
    assert Machine(tmp_path / "x", groups="").room().limited_by == "this machine"


def test_the_lowest_limit_up_the_tree_holds(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.group("", memory__max="max", memory__current=900 * MIB)
    machine.group("a", memory__max=300 * MIB, memory__current=100 * MIB)
    machine.group("a/b", memory__max=500 * MIB, memory__current=50 * MIB, memory__high="max")
    assert machine.room() == MemoryRoom(200 * MIB, "memory.max of control group /a")
    machine.group("a/b", memory__high=150 * MIB)
    assert machine.room() == MemoryRoom(100 * MIB, "memory.high of control group /a/b")
    machine.group("", memory__max=910 * MIB)
    assert machine.room() == MemoryRoom(10 * MIB, "memory.max of control group /.")


def test_pages_of_files_count_as_free(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    stat = f"anon {10 * MIB}\nfile 1\nactive_file {30 * MIB}\ninactive_file {40 * MIB}\nshmem {20 * MIB}"
    machine.group("a/b", memory__max=100 * MIB, memory__current=100 * MIB, memory__stat=stat)
    assert machine.room().free_bytes == 70 * MIB


def test_a_path_of_the_host_is_looked_for_at_the_top(tmp_path: Path) -> None:
    for number, path in enumerate(("/../../init", "/docker/1234")):
        machine = Machine(tmp_path / str(number), groups=f"0::{path}\n")
        machine.group("", memory__max=64 * MIB, memory__current=0)
        assert machine.room().free_bytes == 64 * MIB


def test_a_limit_of_the_first_version_of_control_groups_holds(tmp_path: Path) -> None:
    machine = Machine(tmp_path, groups="9:name=systemd:/\n4:memory:/job\n0::/\n")
    machine.group("memory", memory__limit_in_bytes=0x7FFFFFFFFFFFF000, memory__usage_in_bytes=5)
    stat = f"total_active_file {1 * MIB}\ntotal_inactive_file {1 * MIB}"
    used = 50 * MIB
    machine.group("memory/job", memory__limit_in_bytes=100 * MIB, memory__usage_in_bytes=used, memory__stat=stat)
    assert machine.room() == MemoryRoom(52 * MIB, "memory.limit_in_bytes of control group /job")


def test_the_slab_is_sized_from_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.tools.service.memory_room", lambda: MemoryRoom(600 * MIB + 5, "memory.max of it"))
    assert size_of_slab("50%") == 300 * MIB and size_of_slab(" 12.5 % ") == 75 * MIB
    assert size_of_slab(None) == 300 * MIB and size_of_slab("2G") == 2 << 30
    monkeypatch.setattr("tierkv.tools.service.memory_room", lambda: MemoryRoom(600 << 30, "this machine"))
    assert size_of_slab(None) == 1 << 30 and size_of_slab("50%") == 300 << 30
    for wrong in ("0%", "101%", "%", "-5%", "much"):
        with pytest.raises(ConfigError):
            size_of_slab(wrong)
    monkeypatch.setattr("tierkv.tools.service.memory_room", lambda: MemoryRoom(MIB, "memory.max of it"))
    with pytest.raises(ConfigError, match=r"memory\.max of it leaves 1\.0 MiB"):
        size_of_slab("50%")


EVICTING = """
import runpy, sys
import tierkv.daemon.log_lines as log_lines

log_lines.EVICTION_LINE_S = 0.2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_daemon_logs_what_its_tiers_evict(short_path: Path) -> None:
    options = {"socket": str(short_path / "d.sock"), "store": str(short_path / "store"), "warm_bytes": 16 * 4096}
    options |= {"cold_bytes": 64 << 10, "min_free_bytes": 0}
    line = [sys.executable, "-c", EVICTING, str(TESTS / "daemon_worker.py"), json.dumps(options)]
    with (short_path / "log").open("w") as log:
        process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout and process.stdout.readline() == b"up\n", log_of(short_path)
        with connect(short_path / "d.sock") as client:
            for start in range(0, 400, 20):
                write_prompt(client, tokens_of(16, start))
                client.call(Flush(), Done)
        eventually(lambda: "evicted tier=warm blocks=" in log_of(short_path))
        eventually(lambda: "evicted tier=cold blocks=" in log_of(short_path))
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        if process.stdout:
            process.stdout.close()
