"""The process of a detached daemon: `python -m tierkv.tools.daemon_process CONFIG`. Loads no torch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tierkv
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.limits import Limits
from tierkv.daemon.log_file import BoundedHandler, open_log
from tierkv.daemon.operation import NO_MANAGER
from tierkv.daemon.server import serve
from tierkv.daemon.service_manager import ServiceManager
from tierkv.errors import TierKVError
from tierkv.remote_tiers.urls import remote_urls
from tierkv.tools.logs import LogFormat, configure_logs
from tierkv.tools.options import named_remotes
from tierkv.values.log_event import LogEvent

__all__ = ["from_json", "log_of", "serve_and_warm", "to_json"]

_log = logging.getLogger(__name__)


def serve_and_warm(
    config: DaemonConfig,
    warm_command: list[str],
    *,
    log_to: logging.Handler,
    log_format: LogFormat,
    reload: Callable[[], None] | None = None,
    manager: ServiceManager = NO_MANAGER,
) -> None:
    """Serve until the daemon is stopped.

    warm_command: announces the prompts of --warm-file once clients can connect; may be empty. reload: for SIGHUP.
    """
    configure_logs(log_format, log_to)
    serve(config, started=lambda: _announce(warm_command), reload=reload, manager=manager, version=tierkv.__version__)


def to_json(config: DaemonConfig, warm_command: list[str], log_format: LogFormat) -> str:
    """Return the command line argument of this module; remote tiers, which may have passwords, are not in it."""
    fields = {name: value for name, value in asdict(config).items() if name != "remote"}
    value = {"config": fields, "warm_command": warm_command, "log_format": log_format.value}
    return json.dumps(value, default=str)


def environment_of(config: DaemonConfig) -> dict[str, str]:
    """Return the environment of the process that serves: other users cannot read it, as they can a command line."""
    return {**os.environ, "TIERKV_REMOTE": " ".join(url.text for url in remote_urls(config.remote))}


def from_json(text: str) -> tuple[DaemonConfig, list[str], LogFormat]:
    """Return what `to_json` was given, and the remote tiers of the environment."""
    value = json.loads(text)
    config: dict[str, Any] = value["config"]
    paths = {name: Path(config[name]) if config[name] else None for name in ("socket", "store")}
    limits = Limits(**config["limits"])
    config = {**config, **paths, "limits": limits, "remote": named_remotes(None, os.environ)}
    return DaemonConfig(**config), value["warm_command"], LogFormat(value["log_format"])


def log_of(socket: Path) -> Path:
    """Return the path of a detached daemon's log."""
    return socket.with_name(socket.name + ".log")


def _reopen(log: Path) -> None:
    """Let the standard streams lead to the log file at this path: another program may have renamed the old one."""
    descriptor = open_log(log)
    try:
        for number in (1, 2):
            os.dup2(descriptor, number)
    finally:
        os.close(descriptor)


def _announce(warm_command: list[str]) -> None:
    if warm_command:
        threading.Thread(target=_run_and_log, args=(warm_command,), daemon=True).start()


def _run_and_log(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    said = lines[-1] if lines else ""
    _log.log(
        logging.WARNING if ended.returncode else logging.INFO, LogEvent("--warm-file", code=ended.returncode, said=said)
    )


def _main() -> None:
    """Serve as the command line says. An error that the user can fix is the log's last line."""
    try:
        config, warm_command, log_format = from_json(sys.argv[1])
        log = log_of(config.socket)
        serve_and_warm(
            config, warm_command, log_to=BoundedHandler(), log_format=log_format, reload=lambda: _reopen(log)
        )
    except TierKVError as exc:
        print(f"tierkv: {exc}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
