"""What tests of commands share: a cache directory with the embedded model, and one command in this process."""

from __future__ import annotations

import io
import pwd
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon_fixtures import short_path, start_daemon

from tierkv.engine.models import load_model
from tierkv.tools import cli

__all__ = ["short_path", "start_daemon"]


@dataclass(frozen=True)
class Printed:
    """Exit code of a command, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Printed]


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's cache directory that already has the embedded model."""
    path = tmp_path_factory.mktemp("cache")
    load_model(None, cache_dir=path / "tierkv")
    return path


@pytest.fixture
def command(embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs one command in a fresh folder, on streams of an encoding."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(embedded_cache))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TIERKV_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIERKV_SOCKET", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, encoding: str = "utf-8") -> Printed:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
        monkeypatch.setattr(sys, "argv", ["tierkv", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            cli.main()
        code = exit_info.value.code
        assert isinstance(code, int)
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(encoding, "surrogateescape"))  # type: ignore[attr-defined]
        return Printed(code, *texts)

    return run


def no_such_user(number: int) -> pwd.struct_passwd:
    raise KeyError(number)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's home away, as in a container that runs as some number. After `command`, which names places."""
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "TIERKV_STORE", "TIERKV_SOCKET"):
        monkeypatch.delenv(name, raising=False)
