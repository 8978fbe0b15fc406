"""What tests of commands share: a cache directory with the embedded model, and one command in this process."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from daemon_fixtures import short_path, start_daemon
from one_command import Command, Printed, run_command

from tierkv.engine.models import load_model

__all__ = ["Command", "Printed", "short_path", "start_daemon"]


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's cache directory that already has the embedded model."""
    path = tmp_path_factory.mktemp("cache")
    load_model(None, cache_dir=path / "tierkv")
    return path


@pytest.fixture
def command(embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs one command on a store in a fresh folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(embedded_cache))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TIERKV_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIERKV_SOCKET", raising=False)
    monkeypatch.chdir(tmp_path)

    return run_command


def no_such_user(number: int) -> pwd.struct_passwd:
    raise KeyError(number)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's home away, as in a container that runs as some number. After `command`, which names places."""
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "TIERKV_STORE", "TIERKV_SOCKET"):
        monkeypatch.delenv(name, raising=False)
