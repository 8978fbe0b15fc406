"""`tierkv daemon start | status | stop | prefetch`: one warm cache for every process on the machine.

This module loads no torch: `start --detach` runs it as `python -m tierkv.tools.daemon CONFIG`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket as socket_module
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.host import check_folder, peer_of, read_lock_file
from tierkv.daemon.limits import Limits
from tierkv.daemon.log_file import BoundedHandler, open_log
from tierkv.daemon.messages import Compact, Done, Status, StatusReport, Stop
from tierkv.daemon.server import NOT_WRITTEN, serve
from tierkv.errors import DaemonError, DaemonGoneError, TierKVError
from tierkv.tools.render import format_age, format_bytes, open_console, print_json, visible

__all__ = ["compact", "evicted_of", "start", "status", "stop", "store_of"]

_START_S = 120.0  # a large slab takes its time to be touched
_STOP_S = 60.0
_POLL_S = 0.05
_ANSWER_S = 5.0
_MAX_SAID_BYTES = 64 << 10
_COMPACT_S = 3600.0


def start(config: DaemonConfig, *, detach: bool, warm_command: list[str]) -> None:
    """Serve until stopped; or, with `detach`, return when a process of its own serves.

    warm_command: what announces the prompts of --warm-file once clients may come; may be empty.
    """
    if not detach:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        serve(config, started=lambda: _announce(config, warm_command))
        return
    log = config.socket.with_name(config.socket.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(log.parent)
    command = [sys.executable, "-m", "tierkv.tools.daemon", _to_json(config, warm_command)]
    output = open_log(log)
    try:
        begin = os.fstat(output).st_size
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        pid = _wait_until_it_serves(process, config.socket, log, lambda: os.pread(output, _MAX_SAID_BYTES, begin))
    finally:
        os.close(output)
    process.returncode = 0  # it lives on and nobody waits for it: without this Python warns of a child left behind
    print(f"tierkv daemon {pid} serves on {config.socket}; its log is {log}")


def status(socket: Path, *, as_json: bool) -> None:
    """Print what the daemon holds. Raises DaemonGoneError where there is none."""
    with DaemonClient(socket) as client:
        report = client.call(Status(), StatusReport)
    if as_json:
        print_json(msgspec.to_builtins(_as_dict(report)))
        return
    console = open_console()
    console.print(_table(report))
    if report.tenants:
        console.print(_tenants(report))
    console.print(_limits(report))


def stop(socket: Path) -> None:
    """End the daemon; return when it has gone, and say what it has not written.

    A daemon that does not answer gets SIGTERM. It gives up what hangs after a time of its own (`DaemonConfig.stop_s`).
    """
    pid = _listener_of(socket)
    try:
        with DaemonClient(socket, timeout_s=_ANSWER_S) as client:
            client.call(Stop(), Done)
    except DaemonGoneError as exc:
        if not _is_running(pid):
            raise
        print(f"tierkv: {exc}; sending SIGTERM to process {pid}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        if not _is_running(pid) or not socket.exists():
            print(f"tierkv daemon {pid} has ended{_what_was_lost(socket, pid)}")
            return
        time.sleep(_POLL_S)
    raise DaemonError(
        f"the daemon, process {pid}, has not ended after {_STOP_S:.0f} s",
        hint=f"kill -KILL {pid} ends it; what it has not written is computed again",
    )


def compact(socket: Path) -> None:
    """Have the daemon give its store's free space back to the disk."""
    with DaemonClient(socket) as client:
        client.call(Compact(), Done, timeout_s=_COMPACT_S)


def store_of(socket: Path) -> Path:
    """Return the directory of the daemon's store. Raises DaemonError if it keeps nothing on disk."""
    with DaemonClient(socket) as client:
        if not client.welcome.has_cold:
            raise DaemonError(f"the daemon at {socket} keeps nothing on disk")
        return Path(client.welcome.store)


def evicted_of(socket: Path) -> int:
    """Return how many blocks a daemon has evicted from its store since it started. Raises DaemonGoneError."""
    with DaemonClient(socket) as client:
        return client.call(Status(), StatusReport).cold.get("evicted_blocks", 0)


def _listener_of(path: Path) -> int:
    """Return the process that listens on a socket, also of one that does not answer. Raises DaemonGoneError."""
    with socket_module.socket(socket_module.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(os.fspath(path))
        except (OSError, ValueError) as exc:
            raise DaemonGoneError(
                f"no daemon answers at {path}: {getattr(exc, 'strerror', None) or exc}",
                hint="tierkv daemon start --detach starts one",
            ) from exc
        pid, uid = peer_of(connection)
    if uid != os.geteuid():
        raise DaemonError(f"the daemon at {path} belongs to user {uid}")
    return pid


def _is_running(pid: int) -> bool:
    """Tell whether a process is there and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _what_was_lost(socket: Path, pid: int) -> str:
    """Return what a daemon that has ended says of blocks that it has not written; empty where there are none."""
    _, lines = read_lock_file(socket.with_name(socket.name + ".lock"))
    lost = lines[1].removeprefix(NOT_WRITTEN).strip() if len(lines) > 1 and lines[0] == str(pid) else "0"
    return "" if lost == "0" else f"; {visible(lost)} blocks were not written to the store, its log says why"


def _wait_until_it_serves(
    process: subprocess.Popen[bytes], socket: Path, log: Path, read_log: Callable[[], bytes]
) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = read_log().decode(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("tierkv: ") if lines else f"it ended with code {process.returncode}"
            raise DaemonError(why)
        try:
            with DaemonClient(socket) as client:
                if client.welcome.pid == process.pid:
                    return process.pid
        except DaemonGoneError:
            pass
        time.sleep(_POLL_S)
    raise DaemonError(f"the daemon does not answer after {_START_S:.0f} s; its log is {log}")


def _announce(config: DaemonConfig, warm_command: list[str]) -> None:
    logging.getLogger(__name__).info("clients are welcome at %s", config.socket)
    if warm_command:
        threading.Thread(target=_run_and_log, args=(warm_command,), daemon=True).start()


def _run_and_log(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    logging.getLogger(__name__).info("--warm-file: %s", said[-1] if said else f"ended with code {ended.returncode}")


def _to_json(config: DaemonConfig, warm_command: list[str]) -> str:
    return json.dumps({"config": asdict(config), "warm_command": warm_command}, default=str)


def _from_json(text: str) -> tuple[DaemonConfig, list[str]]:
    value = json.loads(text)
    config: dict[str, Any] = value["config"]
    paths = {name: Path(config[name]) if config[name] else None for name in ("socket", "store")}
    limits = Limits(**config["limits"])
    return DaemonConfig(**{**config, **paths, "limits": limits}), value["warm_command"]


def _as_dict(report: StatusReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def _table(report: StatusReport) -> Table:
    table = Table(title="tierkv daemon", show_header=False)
    used = report.warm_bytes - report.warm_free_bytes
    table.add_row(
        "process", f"{report.pid}, up {format_age(report.uptime_s)}, {format_bytes(report.rss_bytes)} of its own"
    )
    table.add_row("socket", visible(report.socket))
    table.add_row("store", visible(report.store or "none"))
    table.add_row("warm tier", f"{format_bytes(used)} of {format_bytes(report.warm_bytes)}")
    if report.cold:
        live, quota = format_bytes(report.cold["live_bytes"]), format_bytes(report.cold["quota_bytes"])
        table.add_row("cold tier", f"{live} of {quota}, {report.cold['blocks']:,} blocks")
    table.add_row("clients", f"{report.clients - 1:,}")  # without this command
    table.add_row("slots lent to read, to write", f"{report.leased_slots:,}, {report.reserved_slots:,}")
    table.add_row("blocks promised, being stored", f"{report.claims:,}, {report.pending_writes:,}")
    table.add_row("socket, in and out", f"{format_bytes(report.bytes_received)}, {format_bytes(report.bytes_sent)}")
    for name, count in sorted(report.counters.items()):
        table.add_row(name.replace("_", " "), f"{count:,}")
    return table


def _tenants(report: StatusReport) -> Table:
    table = Table("namespace", "model", "clients", "warm", "pinned")
    for tenant in report.tenants:
        table.add_row(
            tenant.namespace[:12],
            visible(tenant.name or "unnamed"),
            f"{tenant.clients:,}",
            format_bytes(tenant.warm_blocks * tenant.block_bytes),
            format_bytes(tenant.pinned_bytes),
        )
    return table


def _limits(report: StatusReport) -> Table:
    """Return what clients hold of everything that is bounded."""
    table = Table("held by clients", "now", "at most", "largest", "one at most")
    for each in report.limits:
        show = format_bytes if each.name.endswith("_bytes") else "{:,}".format
        one = (show(each.largest), show(each.limit_of_one)) if each.limit_of_one else ("", "")
        table.add_row(each.name.removesuffix("_bytes").replace("_", " "), show(each.used), show(each.limit), *one)
    return table


def _main() -> None:
    """Serve as told on the command line; what the user can mend is the log's last line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=[BoundedHandler()])
    try:
        config, warm_command = _from_json(sys.argv[1])
        serve(config, started=lambda: _announce(config, warm_command))
    except TierKVError as exc:
        print(f"tierkv: {exc}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
