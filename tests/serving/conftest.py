"""What tests of the server share: the tiny chat model, and servers over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serve_process import ServerProcess, Start, running_server, write_model

for _package in ("openai", "starlette", "uvicorn", "transformers"):
    pytest.importorskip(_package, reason="of the extras dev and hf")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the tiny chat model."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server that the tests of one module share."""
    with running_server(model_path, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def start(model_path: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a server over this test's store; all of them end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **environment: stack.enter_context(
            running_server(model_path, tmp_path, *arguments, **environment)
        )
