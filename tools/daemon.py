"""`tierkv daemon start | status | stop | prefetch`: one warm cache for every process on the machine.

This module loads no torch: `start --detach` runs it as `python -m tierkv.tools.daemon CONFIG`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import Compact, Done, Status, StatusReport, Stop
from tierkv.daemon.server import DaemonConfig, serve
from tierkv.errors import DaemonError, DaemonGoneError, TierKVError
from tierkv.tools.render import format_age, format_bytes, open_console, print_json, visible

__all__ = ["compact", "evicted_of", "start", "status", "stop", "store_of"]

_START_S = 120.0  # a large slab takes its time to be touched
_STOP_S = 60.0
_POLL_S = 0.05
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
    command = [sys.executable, "-m", "tierkv.tools.daemon", _to_json(config, warm_command)]
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    pid = _wait_until_it_serves(process, config.socket, log, begin)
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
    """End the daemon; return when it has written everything and gone."""
    with DaemonClient(socket) as client:
        pid = client.welcome.pid
        client.call(Stop(), Done)
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists() or not socket.exists():
            print(f"tierkv daemon {pid} has ended")
            return
        time.sleep(_POLL_S)
    raise DaemonError(f"the daemon, process {pid}, is still writing after {_STOP_S:.0f} s")


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


def _wait_until_it_serves(process: subprocess.Popen[bytes], socket: Path, log: Path, begin: int) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
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
    table.add_row("blocks promised, being stored", f"{report.tickets:,}, {report.pending_writes:,}")
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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        config, warm_command = _from_json(sys.argv[1])
        serve(config, started=lambda: _announce(config, warm_command))
    except TierKVError as exc:
        print(f"tierkv: {exc}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
