"""A daemon as a process of its own, small and fast to start."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child_process import ENVIRONMENT, command
from pattern_engine import tiny_layout

from tierkv.cache import TierCache
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Status, StatusReport
from tierkv.errors import DaemonGoneError

WORKER = Path(__file__).with_name("daemon_worker.py")
TIMEOUT_S = 30
SLOT_BYTES = 4096  # what a block of the tiny layout takes in the slab
BLOCK_BYTES = tiny_layout().block_bytes


class Daemon:
    """One daemon process; it can be killed and started again on the same socket and store."""

    def __init__(self, socket: Path, store: Path | None, slots: int, options: dict[str, Any]) -> None:
        self.socket = socket
        self._log = socket.with_suffix(".log")
        self.options = {
            "socket": str(socket),
            "store": str(store) if store else None,
            "warm_bytes": slots * SLOT_BYTES,
            "cold_bytes": 64 << 20,
            "min_free_bytes": 0,
            **options,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Daemon:
        with self._log.open("ab") as log:
            line = command(WORKER, json.dumps(self.options))
            self.process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n", self.log
        return self

    @property
    def log(self) -> str:
        """What all daemons on this socket have said."""
        return self._log.read_text()

    def kill(self) -> None:
        """Kill -9; may be called twice."""
        if self.process:
            self.process.kill()
            self.process.wait(TIMEOUT_S)
            if self.process.stdout:
                self.process.stdout.close()
            self.process = None

    def status(self) -> StatusReport:
        with DaemonClient(self.socket) as client:
            return client.call(Status(), StatusReport)


Start = Callable[..., Daemon]
OpenCache = Callable[..., TierCache]


def is_reachable(socket: Path) -> bool:
    try:
        DaemonClient(socket).close()
    except DaemonGoneError:
        return False
    return True
