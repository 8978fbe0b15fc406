"""What steps are measured as: computing, or what a load adds to a pass; and how long an idle engine waits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tierkv import BlockLayout, BlockStoreConfig, Buffers, LoadOrCompute, Namespace
from tierkv.block_store.load_or_compute import Origin
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.finders import LocalFinder
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.session import Session
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.step_times import StepTimes, SyncLoad
from tierkv.storage.cold import ColdStore

LAYOUT = BlockLayout.uniform(num_layers=1, block_size=16, kv_heads=1, head_dim=8, dtype="float32")
NAMESPACE = Namespace(weights="w", layout=LAYOUT)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_load_costs_what_its_step_takes_longer() -> None:
    costs, clock = LoadOrCompute(block_size=16), Clock()
    times = StepTimes(costs, clock=clock)
    for number, (num_tokens, seconds) in enumerate([(1024, 0.1), (32, 0.02)]):
        times.start(number, num_tokens)
        clock.now += seconds
        times.end(number)
    assert costs.compute_s(1024) == pytest.approx(0.1)
    times.start(2, 32, loads=[SyncLoad(64, origin=Origin.WARM, read_s=0.0)], is_pure=False)
    clock.now += 0.03
    times.end(2)
    assert costs.load_s(64, origin=Origin.WARM) == pytest.approx(0.01), "0.02 of it the pass takes without a load"
    assert costs.compute_s(32) == pytest.approx(0.02), "a step with a load is no measure of computing"
    times.start(3, 32, loads=[SyncLoad(64, origin=Origin.DISK, read_s=0.3)], is_pure=False)
    clock.now += 0.03
    times.end(3)
    assert costs.load_s(64, origin=Origin.DISK) == pytest.approx(0.31)


def test_a_step_with_two_loads_or_an_async_one_measures_nothing() -> None:
    costs, clock = LoadOrCompute(block_size=16), Clock()
    times = StepTimes(costs, clock=clock)
    load = SyncLoad(4, origin=Origin.WARM, read_s=0.0)
    for number, loads in enumerate([[load, load], []]):
        times.start(number, 64, loads=loads, is_pure=False)
        clock.now += 1.0
        times.end(number)
    assert costs.compute_s(64) is None and costs.load_s(4, origin=Origin.WARM) is None


def slow_session(path: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> Session:
    """Return a session over a store with four blocks, each of which takes a while to read."""
    config = BlockStoreConfig(cold_path=path, warm_bytes=16 * LAYOUT.block_bytes)
    with BlockStore(config, namespace=NAMESPACE) as store:
        keys = store.keys(range(64))
        store.save(keys, Buffers([bytes(LAYOUT.block_bytes)] * 4))
    read_many_into = ColdStore.read_many_into

    def slowly(self: ColdStore, expected: list[object], *args: object, **kwargs: object) -> object:
        time.sleep(seconds * len(expected))
        return read_many_into(self, expected, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdStore, "read_many_into", slowly)
    return Session(Options(path=path, warm_bytes=16 * LAYOUT.block_bytes, block_tokens=16), NAMESPACE)


def test_an_idle_engine_waits_for_the_reads_and_a_busy_one_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = slow_session(tmp_path, monkeypatch, seconds=0.05)
    finder = LocalFinder(session, Statistics())
    started = time.monotonic()
    assert finder.find("busy", list(range(65)), 0, 4) is None
    busy_s = time.monotonic() - started
    found, asked = None, 0
    while found is None:
        asked += 1
        found = finder.find("busy", list(range(65)), 0, 4, is_idle=True)
        assert asked < 200
    assert found.num_blocks == 4 and not found.is_async
    assert asked < 60, "it asked without waiting"
    assert busy_s < 0.04, "it waited for a read beside other requests"
    finder.close()
    session.close()


def test_reads_that_take_longer_than_computing_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = slow_session(tmp_path, monkeypatch, seconds=0.2)
    session.costs.record_compute(64, 0.01)
    session.costs.record_compute(1, 0.001)
    statistics = Statistics()
    finder = LocalFinder(session, statistics)
    found, deadline = None, time.monotonic() + 5
    while found is None and time.monotonic() < deadline:
        found = finder.find("slow", list(range(65)), 0, 4, is_idle=True)
    assert found is not None and found.num_blocks == 0
    assert statistics.drain()["computed_instead_tokens"] == 64
    assert session.costs.worth_loading(4, origin=Origin.PAGE_CACHE, num_rest_tokens=1) == 0, (
        "what it would have taken counts"
    )
    finder.close()
    session.close()
