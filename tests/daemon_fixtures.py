"""Fixtures of the folders that start daemons: import them in a conftest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Daemon, Start

__all__ = ["short_path", "start_daemon"]


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
