"""The connector's two sides over a daemon, which engines of one machine share."""

from __future__ import annotations

from pathlib import Path

from daemon_fixtures import short_path, start_daemon
from daemon_process import Start
from fake_vllm import Request
from vllm_sides import BLOCK, Engine, tokens

from tierkv.integrations.vllm.shared_finder import SharedFinder

__all__ = ["short_path", "start_daemon"]


def test_what_one_engine_saves_another_one_finds_also_from_a_scheduler_of_its_own(
    short_path: Path, start_daemon: Start
) -> None:
    start_daemon(slots=64)
    ids, table = tokens(1, 3 * BLOCK + 5), list(range(16))
    engine = Engine(None, socket=short_path / "d.sock")
    assert engine.run(Request("a", ids), table) == 0
    finder = SharedFinder(engine.options, [engine.session.store.namespace], engine.statistics)
    found = finder.find("a", ids, 0, 3)
    assert found is not None and found.num_blocks == 3 and found.is_async
    finder.close()
    engine.close()
    other = Engine(None, socket=short_path / "d.sock")
    loaded = other.run(Request("b", ids), table)
    assert loaded == 3 * BLOCK and other.has(ids, table, loaded)
    other.close()


def test_without_the_daemon_everything_is_computed(short_path: Path, start_daemon: Start) -> None:
    daemon = start_daemon(slots=64)
    engine = Engine(None, socket=short_path / "d.sock")
    ids, table = tokens(1, 3 * BLOCK + 5), list(range(16))
    assert engine.run(Request("a", ids), table) == 0
    daemon.kill()
    assert engine.run(Request("b", ids), table) == 0
    assert engine.has(ids, table, len(ids))
    engine.close()
