"""vLLM engines of two machines over one remote tier: the second loads what the first has saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from remote_servers import start_redis
from test_vllm_engine import FIRST, LONG, Lives, lives

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run make test-engines"),
]

__all__ = ["lives"]


@pytest.fixture(params=["dir", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "dir":
        (tmp_path / "shared").mkdir()
        yield f"dir://{tmp_path / 'shared'}?base_s=5"
    else:
        with start_redis(tmp_path / "redis") as server:
            yield f"{server.url}?base_s=5"


@pytest.mark.parametrize("engine", [{}, {"distributed_executor_backend": "mp"}], ids=["one process", "two processes"])
def test_an_engine_loads_what_another_machine_has_saved_also_when_that_is_gone(
    lives: Lives, url: str, tmp_path: Path, engine: dict[str, Any]
) -> None:
    actions, options = [["ask", [FIRST], 8], ["ask", [LONG], 8]], {"remote": url}
    first = lives.live(actions, store=str(tmp_path / "first"), options=options, engine=engine)
    assert [answer["ids"] for (answer,) in first["answers"]] == [lives.first, lives.long]
    assert first["answers"][0][0]["cached"] == 0
    shutil.rmtree(tmp_path / "first")
    second = lives.live(actions, store=str(tmp_path / "second"), options=options, engine=engine, is_forked=False)
    assert [answer["ids"] for (answer,) in second["answers"]] == [lives.first, lives.long]
    assert second["answers"][0][0]["cached"] == 704
    assert not second["counted"].get("failed_blocks")


def test_a_remote_tier_that_is_not_there_costs_no_token(lives: Lives, tmp_path: Path) -> None:
    pytest.importorskip("redis")
    actions, options = [["ask", [FIRST], 8], ["reset"], ["ask", [LONG], 8]], {"remote": "redis://127.0.0.1:1"}
    result = lives.live(actions, store=str(tmp_path / "store"), options=options)
    assert [answer["ids"] for (answer,) in result["answers"]] == [lives.first, lives.long]
    assert result["answers"][1][0]["cached"] == 640, "its own store still answers"
