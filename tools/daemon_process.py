"""The process of a detached daemon: `python -m tierkv.tools.daemon_process CONFIG`. Loads no torch."""

from __future__ import annotations

import json
import logging
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

__all__ = ["from_json", "serve_and_warm", "to_json"]

_LOG_FORMAT = "%(asctime)s %(message)s"


def serve_and_warm(config: DaemonConfig, warm_command: list[str], *, log_to: logging.Handler) -> None:
    """Serve until the daemon is stopped.

    warm_command: announces the prompts of --warm-file once clients can connect; may be empty.
    """
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[log_to])
    serve(config, started=lambda: _announce(config, warm_command))


def to_json(config: DaemonConfig, warm_command: list[str]) -> str:
    """Return the command line argument of this module."""
    return json.dumps({"config": asdict(config), "warm_command": warm_command}, default=str)


def from_json(text: str) -> tuple[DaemonConfig, list[str]]:
    """Return what `to_json` was given."""
    value = json.loads(text)
    config: dict[str, Any] = value["config"]
    paths = {name: Path(config[name]) if config[name] else None for name in ("socket", "store")}
    limits = Limits(**config["limits"])
    return DaemonConfig(**{**config, **paths, "limits": limits}), value["warm_command"]


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
