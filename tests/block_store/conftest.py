"""Block stores of both kinds: with tiers of their own, and with a daemon's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_fixtures import short_path, start_daemon
from daemon_process import Start
from stored_blocks import Stores

__all__ = ["short_path", "start_daemon"]


@pytest.fixture(params=["own", "daemon"])
def stores(request: pytest.FixtureRequest, short_path: Path, start_daemon: Start) -> Iterator[Stores]:
    stores = Stores(short_path, start_daemon if request.param == "daemon" else None)
    yield stores
    stores.close()
