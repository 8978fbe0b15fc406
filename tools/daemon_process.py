"""The process of a detached daemon: `python -m tierkv.tools.daemon_process CONFIG`. Loads no torch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.limits import Limits
from tierkv.daemon.log_file import BoundedHandler
from tierkv.daemon.server import serve
from tierkv.errors import TierKVError
from tierkv.remote_tiers.urls import remote_urls
from tierkv.tools.options import named_remotes

__all__ = ["from_json", "serve_and_warm", "to_json"]

_LOG_FORMAT = "%(asctime)s %(message)s"


def serve_and_warm(config: DaemonConfig, warm_command: list[str], *, log_to: logging.Handler) -> None:
    """Serve until the daemon is stopped.

    warm_command: announces the prompts of --warm-file once clients can connect; may be empty.
    """
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[log_to])
    serve(config, started=lambda: _announce(config, warm_command))


def to_json(config: DaemonConfig, warm_command: list[str]) -> str:
    """Return the command line argument of this module; remote tiers, which may have passwords, are not in it."""
    fields = {name: value for name, value in asdict(config).items() if name != "remote"}
    return json.dumps({"config": fields, "warm_command": warm_command}, default=str)


def environment_of(config: DaemonConfig) -> dict[str, str]:
    """Return the environment of the process that serves: other users cannot read it, as they can a command line."""
    return {**os.environ, "TIERKV_REMOTE": " ".join(url.text for url in remote_urls(config.remote))}


def from_json(text: str) -> tuple[DaemonConfig, list[str]]:
    """Return what `to_json` was given, and the remote tiers of the environment."""
    value = json.loads(text)
    config: dict[str, Any] = value["config"]
    paths = {name: Path(config[name]) if config[name] else None for name in ("socket", "store")}
    limits = Limits(**config["limits"])
    remote = named_remotes(None, os.environ)
    return DaemonConfig(**{**config, **paths, "limits": limits, "remote": remote}), value["warm_command"]


def _announce(config: DaemonConfig, warm_command: list[str]) -> None:
    logging.getLogger(__name__).info("clients are welcome at %s", config.socket)
    if warm_command:
        threading.Thread(target=_run_and_log, args=(warm_command,), daemon=True).start()


def _run_and_log(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    logging.getLogger(__name__).info("--warm-file: %s", lines[-1] if lines else f"ended with code {ended.returncode}")


def _main() -> None:
    """Serve as the command line says. An error that the user can fix is the log's last line."""
    try:
        serve_and_warm(*from_json(sys.argv[1]), log_to=BoundedHandler())
    except TierKVError as exc:
        print(f"tierkv: {exc}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
