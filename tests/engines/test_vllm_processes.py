"""What a scheduler learns from workers that are other processes: their costs, and what they have in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import Request
from stored_blocks import eventually
from vllm_sides import Engine, tokens

from tierkv.block_store.cost_file import CostFile, cost_path
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.placement import Strided
from tierkv.block_store.store import BlockStore
from tierkv.block_store.transfers import Load, wait_for_any
from tierkv.integrations.vllm import worker_side
from tierkv.integrations.vllm.plan import LoadOrder, LoadReport, WorkerReport
from tierkv.integrations.vllm.shared_finder import SharedFinder
from tierkv.integrations.vllm.worker_blocks import WorkerBlocks
from tierkv.integrations.vllm.worker_costs import WorkerCosts
from tierkv.integrations.vllm.worker_side import _Loading
from tierkv.storage.cold import ColdStore
from tierkv.values.namespace import Namespace

IDS = tokens(1, 48)
COMPUTING_S = 0.1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Ranks:
    """A scheduler over two ranks whose blocks are on disk, where the test writes the workers' cost files."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, Clock()
        self.engine = Engine(path)
        whole = self.engine.session.namespace
        self.namespaces = [Namespace(weights="w", layout=whole.layout, tp_rank=rank, tp_size=2) for rank in range(2)]
        self.cold = self.engine.session.store.cold
        self.options = dataclasses.replace(self.engine.options, compute_or_load=True)
        for namespace in self.namespaces:
            config = self.options.store_config()
            with BlockStore(config, namespace=namespace, cold=self.cold) as store:
                memory = store.register([[each] for each in self.engine.kv.values()], pages_per_block=4)
                places = Strided(memory, self.engine.pages.pages_of([[0, 1, 2, 3]] * 3))
                assert store.save(store.keys(IDS), places).num_saved == 3
                store.flush()
        self.finder = self.make_finder()

    def make_finder(self) -> SharedFinder:
        finder = SharedFinder(self.options, self.namespaces, self.engine.statistics, cold=self.cold, clock=self.clock)
        finder.costs.record_compute(48, COMPUTING_S)
        finder.costs.record_compute(1, 0.001)
        return finder

    def file_of(self, rank: int) -> Path:
        return cost_path(self.path, self.namespaces[rank].digest.hex())

    def write(self, rank: int, seconds: float, origin: Origin = Origin.PAGE_CACHE, blocks: int = 3) -> None:
        costs = LoadOrCompute(block_size=16)
        costs.record_load(blocks, origin=origin, seconds=seconds)
        draft = self.file_of(rank).with_suffix(".new")
        draft.write_text(json.dumps(costs.measured()))
        draft.replace(self.file_of(rank))

    def loads(self, request_id: str) -> bool:
        """Return whether a new request loads its blocks, rather than computing them."""
        found = self.finder.find(request_id, IDS, 0, 3)
        self.finder.forget(request_id)
        return found is not None and found.num_blocks == 3

    def close(self) -> None:
        self.finder.close()
        self.engine.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    found = Ranks(tmp_path / "store")
    yield found
    found.close()


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_scheduler_decides_by_the_slowest_rank(ranks: Ranks, slow_rank: int) -> None:
    ranks.write(slow_rank, 5 * COMPUTING_S)
    ranks.write(1 - slow_rank, COMPUTING_S / 50)
    assert not ranks.loads("a")


def test_fast_ranks_load(ranks: Ranks) -> None:
    for rank in range(2):
        ranks.write(rank, COMPUTING_S / 50)
    assert ranks.loads("a")


def test_the_slowest_rank_is_found_for_each_size(ranks: Ranks) -> None:
    ranks.write(0, 0.5, blocks=2)
    ranks.write(1, 1.0, blocks=8)
    ranks.loads("a")
    assert ranks.finder.costs.measured()["PAGE_CACHE"] == [(2, 1.0), (8, 2.0)]


def test_a_rank_that_is_still_measuring_may_be_the_slowest(ranks: Ranks) -> None:
    ranks.write(0, COMPUTING_S / 50)
    assert ranks.loads("a"), "nothing waits for it"
    assert ranks.finder.costs.load_s(3, origin=Origin.PAGE_CACHE) is None
    ranks.write(1, 5 * COMPUTING_S)
    ranks.clock.now += 1.0
    assert not ranks.loads("b")


def test_files_are_looked_at_again_only_after_a_while_and_read_only_if_they_have_changed(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.loads("a")
    for rank in range(2):
        ranks.write(rank, 5 * COMPUTING_S, Origin.DISK)
    assert ranks.finder._worker_costs is not None
    assert not ranks.finder._worker_costs.slowest(Origin.DISK), "it has just looked"
    ranks.clock.now += 1.0
    assert ranks.finder._worker_costs.slowest(Origin.DISK)
    monkeypatch.setattr(
        "tierkv.integrations.vllm.worker_costs.restore_costs", lambda *_: pytest.fail("no file has changed")
    )
    ranks.clock.now += 1.0
    assert ranks.finder._worker_costs.slowest(Origin.DISK)


def test_a_scheduler_that_knows_reads_no_file(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.finder.costs.record_load(3, origin=Origin.PAGE_CACHE, seconds=5 * COMPUTING_S)
    for rank in range(2):
        ranks.write(rank, COMPUTING_S / 50)
    monkeypatch.setattr(WorkerCosts, "slowest", lambda *_: pytest.fail("it knows the origin"))
    ranks.clock.now += 1.0
    assert not ranks.loads("a")


def _directory(path: Path) -> None:
    path.mkdir()


def _unreadable(path: Path) -> None:
    path.symlink_to("/dev/zero")


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "damaged": lambda path: path.write_text('{"PAGE_CACHE": [[3, 0.'),
    "foreign": lambda path: path.write_bytes(os.urandom(512)),
    "nonsense": lambda path: path.write_text('{"PAGE_CACHE": [[3, -1.0]]}'),
    "huge number": lambda path: path.write_text('{"PAGE_CACHE": [[' + "9" * 4000 + ", 1.0]]}"),
    "endless time": lambda path: path.write_text('{"PAGE_CACHE": [[3, 1e999]]}'),
    "huge": lambda path: path.write_text('{"PAGE_CACHE": [' + "[3, 1.0]," * 100_000 + "[3, 1.0]]}"),
    "fifo": os.mkfifo,
    "directory": _directory,
    "link to a device": _unreadable,
    "missing": lambda path: None,
}


@pytest.mark.parametrize("make", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_none_of_costs_costs_measuring_again(ranks: Ranks, make: Callable[[Path], Any]) -> None:
    ranks.write(0, 5 * COMPUTING_S)
    make(ranks.file_of(1))
    assert ranks.loads("a")
    assert not ranks.finder.costs.measured().get("PAGE_CACHE")


def test_no_two_processes_of_an_engine_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    start = CostFile.__init__

    def note(self: CostFile, folder: Path, name: str, costs: LoadOrCompute, **options: Any) -> None:
        start(self, folder, name, costs, **options)
        written.append(self._path.name)

    monkeypatch.setattr(CostFile, "__init__", note)
    engine = Engine(tmp_path / "store")
    store = engine.session.store
    finder = SharedFinder(engine.options, [store.namespace], engine.statistics, cold=store.cold)
    digest = store.namespace.digest.hex()
    assert written == [f"costs-{digest}.json", f"costs-{digest}-scheduler.json"]
    finder.costs.record_compute(48, 3.0)
    finder.close()
    again = SharedFinder(engine.options, [store.namespace], engine.statistics, cold=store.cold)
    assert again.costs.compute_s(48) == 3.0, "what the scheduler measured survives a restart"
    again.close()
    engine.close()


def test_a_worker_measures_after_its_memory_is_registered_and_writes_what_it_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 128)
    engine = Engine(tmp_path / "store")
    engine.run(Request("a", ids), list(range(32)))
    engine.close()
    calls: list[str] = []
    for name in ("register", "keep_costs", "wait_for_costs"):
        method = getattr(BlockStore, name)

        def note(self: BlockStore, *args: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            calls.append(name)
            return method(self, *args, **options)

        monkeypatch.setattr(BlockStore, name, note)
    monkeypatch.setattr(ColdStore, "is_in_memory", lambda *_: True)
    engine = Engine(tmp_path / "store")
    assert calls == ["register", "keep_costs", "wait_for_costs"]
    path = cost_path(tmp_path / "store", engine.session.store.namespace.digest.hex())
    eventually(lambda: path.exists() and json.loads(path.read_text()).get("PAGE_CACHE"))
    assert [size for size, _ in json.loads(path.read_text())["PAGE_CACHE"]][:3] == [1, 2, 4], "all of it at once"
    engine.worker.renew("another salt")
    assert calls == ["register", "keep_costs", "wait_for_costs", "register"]
    engine.close()


# --- what the workers have in memory


class TwoSides:
    """A scheduler that knows the worker's memory from its reports only."""

    def __init__(self, path: Path) -> None:
        self.engine, self.clock = Engine(path), Clock()
        self.store = self.engine.session.store
        options = dataclasses.replace(self.engine.options, compute_or_load=True)
        self.finder = SharedFinder(
            options, [self.store.namespace], self.engine.statistics, cold=self.store.cold, clock=self.clock
        )
        self.engine.scheduler = self.engine.make_scheduler(self.finder)
        self.engine.scheduler._save_now = None

    def prefill(self, request: Request, table: list[int]) -> None:
        engine = self.engine
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        engine.scheduler.update_state_after_alloc(request, table, 0)
        engine.worker.begin_step(engine.order((request, table, 0, request.num_tokens)))
        engine.compute(request.all_token_ids, table)
        engine.worker.end_step()
        request.num_computed_tokens = request.num_tokens
        engine.scheduler.request_finished(request)  # vLLM ends it before it takes up the report
        engine.scheduler.update_from_output((), engine.worker.report())

    def load(self, request: Request, table: list[int], num_tokens: int, seconds: float) -> set[int]:
        """Load a request's blocks, in so many seconds. Return the engine's blocks that did not come."""
        engine = self.engine
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (num_tokens, True)
        engine.scheduler.update_state_after_alloc(request, table, num_tokens)
        engine.worker.begin_step(engine.order())
        engine.worker.start_loads(layer_hooks=None)
        engine.worker.synchronize()
        self.clock.now += seconds
        loaded = engine.worker.finished_loads()
        failed = engine.worker.take_failed_blocks()
        engine.scheduler.update_from_output(failed, engine.worker.report(), loaded)
        return failed

    def measured(self) -> set[str]:
        return {kind for kind, points in self.finder.costs.measured().items() if points}

    def close(self) -> None:
        self.finder.close()
        self.engine.close()


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[TwoSides]:
    found = TwoSides(tmp_path / "store")
    yield found
    found.close()


def test_blocks_that_the_workers_hold_are_found_before_they_are_on_disk(
    sides: TwoSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ColdStore, "lookup_many", lambda _, hashes: [None for _ in hashes])
        patch.setattr(ColdStore, "put", lambda *_, **__: [])
        sides.prefill(Request("a", IDS), list(range(12)))
        table = list(range(20, 32))
        assert not sides.load(Request("b", IDS), table, 44, 0.01)
        assert sides.engine.has(IDS, table, 44)
        sides.clock.now += 60.0
        found = sides.engine.scheduler.get_num_new_matched_tokens(Request("c", IDS), 0)
        assert found == (0, False), "what was saved so long ago has to be on disk"


def test_the_last_blocks_of_a_request_that_has_ended_are_found_before_they_are_on_disk(
    sides: TwoSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColdStore, "lookup_many", lambda _, hashes: [None for _ in hashes])
    engine, request = sides.engine, Request("a", list(IDS))
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.scheduler.update_state_after_alloc(request, list(range(12)), 0)
    engine.worker.begin_step(engine.order((request, list(range(12)), 0, 40)))
    engine.finish_step()
    request.num_computed_tokens = 48
    engine.scheduler.request_finished(request)
    plan = engine.order()
    assert plan.last_saves
    engine.worker.begin_step(plan)
    engine.finish_step()
    assert engine.scheduler.get_num_new_matched_tokens(Request("b", IDS), 0) == (44, True)


def test_blocks_that_the_workers_had_no_room_for_are_not_promised(
    sides: TwoSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tierkv.block_store.warm_memory.WarmMemory.take", lambda *_: [])
        sides.prefill(Request("a", IDS), list(range(12)))
    assert sides.engine.scheduler.get_num_new_matched_tokens(Request("b", IDS), 0) == (0, False)


def test_warm_loads_do_not_pass_for_the_page_cache(sides: TwoSides) -> None:
    sides.prefill(Request("a", IDS), list(range(12)))
    sides.store.flush()
    sides.load(Request("b", IDS), list(range(20, 32)), 44, 0.01)
    assert sides.measured() == {"WARM"}


def test_warm_blocks_are_loaded_where_those_of_the_page_cache_are_computed(tmp_path: Path) -> None:
    other = tokens(2, 48)
    sides = TwoSides(tmp_path / "store")
    sides.prefill(Request("a", IDS), list(range(12)))
    sides.prefill(Request("b", other), list(range(12)))
    sides.close()
    sides = TwoSides(tmp_path / "store")
    sides.load(Request("c", IDS), list(range(20, 32)), 44, 5.0)
    sides.finder.costs.record_compute(48, COMPUTING_S)
    sides.finder.costs.record_compute(1, 0.001)
    assert sides.measured() == {"compute", "PAGE_CACHE"}
    assert sides.engine.scheduler.get_num_new_matched_tokens(Request("d", other), 0) == (0, False)
    sides.load(Request("e", IDS), list(range(20, 32)), 44, 0.01)
    assert sides.measured() == {"compute", "PAGE_CACHE", "WARM"}
    sides.close()


def test_a_wrong_estimate_of_the_memory_is_forgotten(sides: TwoSides) -> None:
    sides.prefill(Request("a", IDS), list(range(12)))
    sides.store.flush()
    sides.engine.scheduler.get_num_new_matched_tokens(Request("b", IDS), 0)
    sides.finder.keep("b")
    sides.finder.update(WorkerReport(1, loads={"b": LoadReport(Origin.DISK, is_whole=True)}))
    sides.finder.loaded("b")
    assert sides.measured() == {"DISK"}
    sides.finder.find("c", IDS, 0, 2)
    sides.finder.keep("c")
    sides.finder.update(WorkerReport(2, loads={"c": LoadReport(Origin.WARM, is_whole=False)}))
    sides.finder.loaded("c")
    assert sides.measured() == {"DISK"}, "a load that failed tells nothing"
    sides.finder.find("d", IDS, 0, 3)
    assert sides.finder._found["d"].origin is not Origin.WARM


def test_reports_of_ranks_are_of_the_slowest_and_of_what_all_have_done() -> None:
    one = WorkerReport(
        3,
        loads={"a": LoadReport(Origin.WARM, is_whole=True), "b": LoadReport(Origin.WARM, is_whole=False)},
        saves={(1, 4): 4, (2, 3): 3},
    )
    other = WorkerReport(3, loads={"a": LoadReport(Origin.DISK, is_whole=True)}, saves={(1, 4): 2})
    both = one.aggregate(other)
    assert both == other.aggregate(one)
    assert both.loads["a"] == LoadReport(Origin.DISK, is_whole=True)
    assert both.loads["b"] == LoadReport(Origin.WARM, is_whole=False)
    assert both.saves == {(1, 4): 2}


def test_as_many_blocks_are_remembered_as_the_memory_has_room_for_the_latest_ones() -> None:
    clock = Clock()
    blocks = WorkerBlocks(3, clock=clock)
    a, b, c, d = (bytes([at]) * 16 for at in range(4))
    blocks.saved([a, b, c])
    blocks.loaded([a])
    blocks.loaded([d])
    assert [blocks.is_warm(each) for each in (a, b, c, d)] == [True, False, True, True]
    assert blocks.is_saved(a), "a load does not end a save"
    assert not blocks.is_saved(d)
    clock.now += 60
    assert not blocks.is_saved(a)
    none = WorkerBlocks(0)
    none.saved([a])
    assert not none.is_warm(a)


# --- steps without work


def a_load(future: Future[None] | None) -> Load:
    load = Load([], ended=lambda: None)
    if future:
        load.start_working(future)
    return load


def ended() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class Copy:
    """A copy that is done when it was asked so often."""

    def __init__(self, asked: int) -> None:
        self.asked = asked

    def is_done(self) -> bool:
        self.asked -= 1
        return self.asked <= 0

    def wait(self, layer: int | None = None) -> None:
        pass

    def synchronize(self) -> None:
        self.asked = 0


@pytest.mark.parametrize("is_idle", [True, False])
def test_only_a_step_that_computes_nothing_waits_for_a_load(
    sides: TwoSides, monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    worker, waited = sides.engine.worker, []
    load = a_load(Future())
    worker._loading.append(_Loading(LoadOrder(1, "a", 0, [], True), load))
    monkeypatch.setattr(worker_side, "wait_for_any", lambda loads, timeout_s: waited.append((loads, timeout_s)))
    plan = sides.engine.order(*[] if is_idle else [(Request("b", tokens(3, 8)), [0, 1], 0, 8)])
    assert plan.is_idle == is_idle
    worker.begin_step(plan)
    assert worker.finished_loads() == set()
    assert waited == ([([load], pytest.approx(0.01))] if is_idle else [])
    worker._loading.clear()


def test_a_step_without_work_does_not_wait_where_a_load_has_ended_or_never_began(
    sides: TwoSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(futures: list[Future[None]], *_: object) -> None:
        assert all(future.done() for future in futures), "it waits"

    monkeypatch.setattr("tierkv.block_store.transfers.wait", wait)
    monkeypatch.setattr("tierkv.block_store.transfers.time.sleep", lambda _: pytest.fail("it waits"))
    worker = sides.engine.worker
    worker.begin_step(sides.engine.order())
    for name, load in (("ended", a_load(ended())), ("never began", None)):
        going_on = _Loading(LoadOrder(1, "a", 0, [], True), a_load(Future()))
        worker._loading += [going_on, _Loading(LoadOrder(2, name, 0, [], True), load)]
        assert worker.finished_loads() == {name}
        worker._loading.clear()
    assert worker.finished_loads() == set()


def test_the_first_of_several_loads_ends_the_wait() -> None:
    slow: Future[None] = Future()
    fast: Future[None] = Future()
    threading.Timer(0.02, fast.set_result, [None]).start()
    assert wait_for_any([a_load(slow), a_load(fast)], 30.0)
    assert fast.done()
    assert not wait_for_any([a_load(slow)], 0.001)


def test_copies_are_asked_for_after_the_work_in_the_background() -> None:
    load = a_load(ended())
    load.add(Copy(3), 0)
    assert wait_for_any([a_load(Future()), load], 30.0)
    endless = a_load(None)
    endless.add(Copy(1 << 30), 0)
    assert not wait_for_any([endless], 0.002)
