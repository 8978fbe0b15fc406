"""Daemons and clients as processes of their own, small and fast to start."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT, command
from pattern_engine import tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.daemon_client import DaemonClient
from tierkv.errors import DaemonGoneError
from tierkv.namespace import Namespace
from tierkv.protocol import Status, StatusReport

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


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Return a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tkd") as path:
        yield Path(path)


@pytest.fixture
def start_daemon(short_path: Path) -> Iterator[Start]:
    """Return a function that starts a daemon of so many slots on one socket and one store."""
    started: list[Daemon] = []

    def start(*, slots: int = 64, store: bool = True, socket: str = "d.sock", **options: Any) -> Daemon:
        daemon = Daemon(short_path / socket, short_path / "store" if store else None, slots, options)
        started.append(daemon)
        return daemon.start()

    yield start
    for daemon in started:
        daemon.kill()
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def open_cache(short_path: Path) -> Iterator[OpenCache]:
    """Return a function that opens a cache on the daemon's socket; it may be called for several at a time."""
    opened: list[TierCache] = []

    def open_one(
        *, hot: int = 16, weights: str = "w", salt: str = "", block_size: int = 4, **options: Any
    ) -> TierCache:
        hash_function = {"hash_function": options.pop("hash_function")} if "hash_function" in options else {}
        options = {"socket": short_path / "d.sock", "compute_wait_s": 0.0, **options}
        config = CacheConfig(block_size=block_size, hot_bytes=hot * BLOCK_BYTES * block_size // 4, **options)
        namespace = Namespace(weights=weights, layout=tiny_layout(block_size=block_size), salt=salt)
        cache = TierCache(config, namespace=namespace, **hash_function)
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        cache.close()


def is_reachable(socket: Path) -> bool:
    try:
        DaemonClient(socket).close()
    except DaemonGoneError:
        return False
    return True
