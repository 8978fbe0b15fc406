"""The connector's two sides without vLLM: orders of the scheduler side, copies of the worker side, a real store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierkv.block_store.placement import Strided
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.finders import LocalFinder, SharedFinder
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.pages import EnginePages
from tierkv.integrations.vllm.plan import StepPlan
from tierkv.integrations.vllm.scheduler_side import SchedulerSide
from tierkv.integrations.vllm.session import Session
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.worker_side import WorkerSide
from tierkv.values.namespace import Namespace

ENGINE_BLOCK = 4
BLOCK = 16
NUM_ENGINE_BLOCKS = 64


@dataclass
class FakeRequest:
    """A request as vLLM's, as far as the connector looks at it."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    pooling_params: Any = None
    resumable: bool = False
    prompt_token_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Engine:
    """One worker's memory, a session, and both sides. `step` runs one request's step as vLLM would."""

    def __init__(self, path: Path | None, *, warm_blocks: int = 32) -> None:
        self.kv = {f"layer{i}": torch.zeros(NUM_ENGINE_BLOCKS, 1, ENGINE_BLOCK, 16) for i in range(2)}
        self.pages = EnginePages.of(
            self.kv, num_engine_blocks=NUM_ENGINE_BLOCKS, engine_block_size=ENGINE_BLOCK, block_tokens=BLOCK
        )
        namespace = Namespace(weights="w", layout=self.pages.layout)
        self.options = Options(
            path=path,
            warm_bytes=warm_blocks * self.pages.layout.block_bytes,
            cold_bytes=1 << 26,
            compute_or_load=False,
            block_tokens=BLOCK,
        )
        self.session = Session(self.options, namespace)
        self.statistics = Statistics()
        self.worker = WorkerSide(self.session, self.pages, self.statistics)
        self.finder = LocalFinder(self.session, self.statistics)
        self.scheduler = self.make_scheduler(self.finder)

    def make_scheduler(self, finder: Any) -> SchedulerSide:
        return SchedulerSide(finder, self.statistics, engine_block_size=ENGINE_BLOCK, save_now=self.session.run_now)

    def compute(self, tokens: list[int], table: list[int], first: int = 0, garbage: float = 0.0) -> None:
        """Write the K and V of tokens from `first` on: numbers that depend on the token and all before it."""
        for at in range(first, len(tokens)):
            value = float(sum(tokens[: at + 1])) + garbage
            for tensor in self.kv.values():
                tensor[table[at // ENGINE_BLOCK], :, at % ENGINE_BLOCK] = value

    def has(self, tokens: list[int], table: list[int], num_tokens: int, first: int = 0) -> bool:
        """Return whether the K and V of tokens lie in the engine's blocks."""
        return all(
            float(tensor[table[at // ENGINE_BLOCK], 0, at % ENGINE_BLOCK, 3]) == float(sum(tokens[: at + 1]))
            for at in range(first, num_tokens)
            for tensor in self.kv.values()
        )

    def order(self, *steps: tuple[FakeRequest, list[int], int, int]) -> StepPlan:
        """Schedule requests that are new: (request, table, computed tokens, scheduled tokens)."""
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, block_ids=(table,), num_computed_tokens=computed)
                for r, table, computed, _ in steps
            ],
            scheduled_cached_reqs=cached(),
            num_scheduled_tokens={r.request_id: scheduled for r, _, _, scheduled in steps},
            total_num_scheduled_tokens=sum(scheduled for *_, scheduled in steps),
        )
        return self.scheduler.build_plan(output)

    def order_more(self, request: FakeRequest, new_blocks: list[int], computed: int, scheduled: int) -> StepPlan:
        """Schedule a request that ran before."""
        output = SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached((request.request_id, new_blocks, computed)),
            num_scheduled_tokens={request.request_id: scheduled},
            total_num_scheduled_tokens=scheduled,
        )
        return self.scheduler.build_plan(output)

    def finish_step(self) -> set[int]:
        self.worker.end_step()
        self.worker.finished_loads()
        failed = self.worker.take_failed_blocks()
        self.scheduler.update_from_output(failed, self.worker.report())
        return failed

    def run(self, request: FakeRequest, table: list[int], local: int = 0) -> int:
        """Prefill a request in one step; return how many tokens were loaded."""
        external, is_async = self.scheduler.get_num_new_matched_tokens(request, local)
        assert external is not None
        assert not is_async
        self.scheduler.update_state_after_alloc(request, table, external)
        computed = local + external
        plan = self.order((request, table, computed, request.num_tokens - computed))
        self.worker.begin_step(plan)
        self.worker.start_loads(layer_hooks=None)
        self.compute(request.all_token_ids, table, computed)
        self.finish_step()
        request.num_computed_tokens = request.num_tokens
        return external

    def close(self) -> None:
        self.finder.close()
        self.session.close()


def cached(*steps: tuple[str, list[int], int]) -> Any:
    return SimpleNamespace(
        req_ids=[request_id for request_id, _, _ in steps],
        new_block_ids=[(ids,) if ids else None for _, ids, _ in steps],
        num_computed_tokens=[computed for *_, computed in steps],
        resumed_req_ids=set(),
    )


def tokens(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 997 for i in range(count)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "store")
    yield found
    found.close()


def counters(engine: Engine) -> dict[str, int]:
    engine.statistics.drain()
    return dict(engine.statistics.total)


def test_a_prompt_is_saved_and_found_again_up_to_its_last_token(engine: Engine) -> None:
    ids = tokens(1, 48)
    assert engine.run(FakeRequest("a", ids), list(range(12))) == 0
    table = list(range(20, 32))
    assert engine.run(FakeRequest("b", ids), table) == 44  # one token is left, and engine's blocks are loaded whole
    assert engine.has(ids, table, 48)
    assert counters(engine)["saved_blocks"] == 3


def test_blocks_that_the_engine_has_are_left_alone(engine: Engine) -> None:
    ids = tokens(1, 50)
    engine.run(FakeRequest("a", ids), list(range(13)))
    table = list(range(20, 33))
    for tensor in engine.kv.values():
        tensor[table[:6]] = -1.0
    request = FakeRequest("b", ids)
    assert engine.run(request, table, local=24) == 24
    assert engine.has(ids, table, 48, first=24)
    assert all(bool((tensor[table[:6]] == -1.0).all()) for tensor in engine.kv.values())


def test_generated_tokens_and_chunks_are_kept(engine: Engine) -> None:
    ids = tokens(1, 20)
    request = FakeRequest("a", ids)
    table = list(range(5))
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.scheduler.update_state_after_alloc(request, table[:3], 0)
    engine.worker.begin_step(engine.order((request, table[:3], 0, 12)))
    engine.compute(ids[:12], table)
    engine.finish_step()
    engine.worker.begin_step(engine.order_more(request, table[3:], 12, 8))
    engine.compute(ids, table)
    engine.finish_step()
    for at in range(20, 34):
        request.all_token_ids.append(at)
        new = [at // 4 + 1] if at % 4 == 0 else []
        table += new
        engine.worker.begin_step(engine.order_more(request, new, at, 1))
        engine.compute(request.all_token_ids, table, at)
        engine.finish_step()
    assert engine.session.store.contains(engine.session.store.keys(request.all_token_ids)) == 2


def test_with_asynchronous_scheduling_a_block_waits_until_its_tokens_are_known(engine: Engine) -> None:
    ids = tokens(1, 15)
    request = FakeRequest("a", ids)
    table = list(range(8))
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, 0)
    assert not engine.order((request, table, 0, 15)).saves
    plan = engine.order_more(request, [], 15, 1)  # its token is not known: the step before has not returned
    assert not plan.saves
    request.all_token_ids.append(5)
    plan = engine.order_more(request, [], 16, 1)
    assert [(order.first, order.end) for order in plan.saves] == [(0, 1)]


def test_a_request_that_ends_saves_its_last_block_at_once(engine: Engine) -> None:
    ids = tokens(1, 16)
    request = FakeRequest("a", ids[:15])
    table = list(range(4))
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, 0)
    engine.worker.begin_step(engine.order((request, table, 0, 15)))
    engine.compute(ids, table)
    engine.finish_step()
    request.all_token_ids.append(ids[15])
    request.num_computed_tokens = 16
    engine.scheduler.request_finished(request)
    assert engine.session.store.contains(engine.session.store.keys(ids)) == 1


def fail_after(store: BlockStore, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load = BlockStore.load

    def load_less(self: BlockStore, reservation: Any, targets: Any) -> Any:
        keys = list(reservation.keys)
        found = load(self, reservation, Strided(targets.memory, targets.pages[:num_blocks]))
        found.synchronize()
        found.keys = keys
        return found

    monkeypatch.setattr(BlockStore, "load", load_less)


def test_no_request_that_computed_over_a_failed_block_is_saved_until_it_is_computed_anew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 64)
    engine.run(FakeRequest("a", ids[:48]), list(range(12)))
    fail_after(engine.session.store, 1, monkeypatch)
    request, table = FakeRequest("b", ids), list(range(20, 36))
    external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    assert external == 48
    engine.scheduler.update_state_after_alloc(request, table, external)
    # Another request shares the blocks that are just being loaded: vLLM counts them as cached already.
    other, its_table = FakeRequest("c", ids[:48] + tokens(3, 16)), [*table[:12], *range(40, 44)]
    assert engine.scheduler.get_num_new_matched_tokens(other, 48) == (0, False)
    engine.scheduler.update_state_after_alloc(other, its_table, 0)
    plan = engine.order((request, table, 48, 16), (other, its_table, 48, 16))
    assert {order.end for order in plan.saves} == {4}
    engine.worker.begin_step(plan)
    engine.worker.start_loads(layer_hooks=None)
    engine.compute(ids, table, 16, garbage=0.5)
    engine.compute(other.all_token_ids, its_table, 48, garbage=0.5)
    assert engine.finish_step() == set(table[4:12])
    store = engine.session.store
    assert store.contains(store.keys(ids)) == 3
    assert store.contains(store.keys(other.all_token_ids)) == 3
    assert counters(engine)["unsaved_blocks"] == 8

    engine.worker.begin_step(engine.order_more(request, [], 16, 48))
    engine.compute(ids, table, 16)
    engine.finish_step()
    assert store.contains(store.keys(ids)) == 4
    request.num_computed_tokens = 64
    engine.scheduler.request_finished(request)
    monkeypatch.undo()
    again, place = FakeRequest("d", [*ids, 1]), list(range(44, 61))
    assert engine.run(again, place) == 64
    assert engine.has(again.all_token_ids, place, 64)


def test_orders_that_were_built_before_the_failure_was_known_are_not_carried_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 63)
    engine.run(FakeRequest("a", ids[:48]), list(range(12)))
    fail_after(engine.session.store, 0, monkeypatch)
    request, table = FakeRequest("b", ids), list(range(20, 36))
    external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, external or 0)
    first = engine.order((request, table, 48, 15))
    request.all_token_ids.append(7)
    second = engine.order_more(request, [], 63, 1)  # asynchronous scheduling orders it before the first has returned
    assert second.saves
    engine.worker.begin_step(first)
    engine.worker.start_loads(layer_hooks=None)
    engine.worker.end_step()
    failed = engine.worker.take_failed_blocks()
    report = engine.worker.report()
    engine.worker.begin_step(second)
    engine.worker.end_step()
    engine.scheduler.update_from_output(failed, report)
    store = engine.session.store
    assert store.contains(store.keys(request.all_token_ids)) == 3
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)  # not announced a second time


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_request": object()}, "lora"),
        ({"cache_salt": "tenant"}, "cache_salt"),
        ({"mm_features": [object()]}, "multimodal"),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"prompt_token_ids": None}, "prompt_embeds"),
        ({"pooling_params": object()}, "pooling"),
        ({"resumable": True}, "resumable"),
    ],
)
def test_requests_whose_tokens_do_not_decide_their_kv_are_not_cached_and_counted_once(
    engine: Engine, change: dict[str, Any], reason: str
) -> None:
    ids = tokens(1, 48)
    engine.run(FakeRequest("a", ids), list(range(12)))
    request = FakeRequest("b", ids, **change)
    assert engine.run(request, list(range(20, 32))) == 0
    assert engine.run(request, list(range(20, 32))) == 0
    engine.scheduler.request_finished(request)
    assert counters(engine)[f"not_cached:{reason}"] == 1
    assert counters(engine)["queries"] == 1


def test_blocks_that_do_not_fit_into_the_warm_memory_load_while_the_request_waits(tmp_path: Path) -> None:
    ids = tokens(1, 200)
    engine = Engine(tmp_path / "store")
    engine.run(FakeRequest("a", ids), list(range(50)))
    engine.close()
    engine = Engine(tmp_path / "store", warm_blocks=6)
    request, table = FakeRequest("b", ids), list(range(50))
    external: int | None = None
    while external is None:
        external, is_async = engine.scheduler.get_num_new_matched_tokens(request, 0)
    assert (external, is_async) == (192, True)
    engine.scheduler.update_state_after_alloc(request, table, external)
    plan = engine.order()
    assert [order.is_async for order in plan.loads] == [True]
    engine.worker.begin_step(plan)
    engine.worker.start_loads(layer_hooks=None)
    engine.worker.synchronize()
    assert engine.worker.finished_loads() == {"b"}
    assert not engine.worker.take_failed_blocks()
    assert engine.has(ids, table, 192)
    engine.close()


def test_while_cold_blocks_are_read_the_scheduler_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(FakeRequest("a", ids), list(range(12)))
    engine.close()
    engine = Engine(tmp_path / "store")
    request = FakeRequest("b", ids)
    with monkeypatch.context() as patch:
        patch.setattr("tierkv.block_store.reservation.Reservation.is_reading", property(lambda self: True))
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    held = engine.finder._held["b"]
    held.reservation.wait()
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (44, False)
    engine.scheduler.request_finished(request)
    assert held.reservation.is_released
    engine.close()


def test_a_scheduler_in_another_process_finds_what_all_ranks_have_on_disk(tmp_path: Path) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(FakeRequest("a", ids), list(range(12)))
    engine.session.store.flush()
    namespace = engine.session.store.namespace
    other_rank = Namespace(weights="w", layout=namespace.layout, tp_rank=1, tp_size=2)
    for ranks, hit in (([namespace], (44, True)), ([namespace, other_rank], (0, False))):
        finder = SharedFinder(engine.options, ranks, cold=engine.session.store.cold)
        scheduler = engine.make_scheduler(finder)
        assert scheduler.get_num_new_matched_tokens(FakeRequest("b", ids), 0) == hit
        finder.close()
    engine.close()


def test_an_async_load_of_blocks_that_have_gone_is_reported_with_its_blocks(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "store")
    finder = SharedFinder(engine.options, [engine.session.store.namespace], cold=engine.session.store.cold)
    engine.scheduler = engine.make_scheduler(finder)
    finder.find = lambda *_: SimpleNamespace(num_blocks=3, is_async=True)  # type: ignore[method-assign]
    request, table = FakeRequest("b", tokens(1, 50)), list(range(13))
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (48, True)
    engine.scheduler.update_state_after_alloc(request, table, 48)
    engine.worker.begin_step(engine.order())
    engine.worker.start_loads(layer_hooks=None)
    assert engine.worker.finished_loads() == {"b"}
    failed = engine.worker.take_failed_blocks()
    assert failed == set(range(12))
    engine.scheduler.update_from_output(failed, engine.worker.report())
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.close()


def test_a_step_waits_only_for_saves_whose_blocks_it_overwrites(engine: Engine) -> None:
    class FakeSave:
        waited = False
        num_saved = 1
        num_skipped = 0

        def is_done(self) -> bool:
            return False

        def wait(self) -> None:
            self.waited = True

    saves: list[FakeSave] = []

    def save(*_: Any, **__: Any) -> FakeSave:
        saves.append(FakeSave())
        return saves[-1]

    engine.session.store.save = save  # type: ignore[method-assign, assignment]
    for name, first in (("a", 0), ("b", 10)):
        request = FakeRequest(name, tokens(first + 1, 16))
        engine.run(request, list(range(first, first + 4)))
        request.num_computed_tokens = 16
        engine.scheduler.request_finished(request)
    engine.run(FakeRequest("c", tokens(9, 8)), [11, 30])
    assert [each.waited for each in saves] == [False, True]


def test_after_a_stop_nothing_is_announced_loaded_or_saved(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(FakeRequest("a", ids), list(range(12)))
    engine.worker.stop("the worker's reload_weights was called")
    engine.finish_step()
    assert engine.scheduler.stop_reason == "the worker's reload_weights was called"
    assert engine.run(FakeRequest("b", ids), list(range(20, 32))) == 0
    assert engine.run(FakeRequest("c", tokens(5, 48)), list(range(20, 32))) == 0
    assert counters(engine)["saved_blocks"] == 3


def test_after_a_reset_nothing_from_before_is_found_and_new_requests_are_cached(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(FakeRequest("a", ids), list(range(12)))
    running = FakeRequest("b", tokens(5, 32))
    engine.run(running, list(range(12, 20)))
    engine.worker.stop("the worker's update_weights was called")
    engine.finish_step()
    engine.scheduler.renew()
    assert not engine.scheduler.stop_reason
    running.all_token_ids += range(16)
    assert not engine.order_more(running, list(range(50, 54)), 32, 16).saves
    assert engine.run(FakeRequest("c", ids), list(range(20, 32))) == 0
    assert engine.run(FakeRequest("d", ids), list(range(32, 44))) == 44
    assert engine.has(ids, list(range(32, 44)), 48)


def test_a_worker_in_another_process_begins_the_new_namespace_with_the_next_plan(tmp_path: Path) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(FakeRequest("a", ids), list(range(12)))
    engine.session.store.flush()
    plan = engine.order()
    plan.salt = "another"
    engine.worker.begin_step(plan)
    assert engine.session.store.contains(engine.session.store.keys(ids)) == 0
    engine.close()


def test_a_block_that_found_no_room_is_saved_with_its_child(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 32)
    request, table = FakeRequest("a", ids), list(range(8))
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, 0)
    with monkeypatch.context() as patch:
        skipped = SimpleNamespace(num_saved=0, num_skipped=1, is_done=lambda: True)
        patch.setattr(BlockStore, "save", lambda *_, **__: skipped)
        engine.worker.begin_step(engine.order((request, table, 0, 16)))
        engine.compute(ids[:16], table)
        engine.finish_step()
    engine.worker.begin_step(engine.order_more(request, [], 16, 16))
    engine.compute(ids, table, 16)
    engine.finish_step()
    assert engine.session.store.contains(engine.session.store.keys(ids)) == 2


def test_an_announced_load_after_a_stop_fails_and_is_computed(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(FakeRequest("a", ids), list(range(12)))
    request, table = FakeRequest("b", ids), list(range(20, 32))
    external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, external or 0)
    engine.worker.stop("weights changed")
    engine.worker.begin_step(engine.order((request, table, 44, 4)))
    engine.worker.start_loads(layer_hooks=None)
    assert engine.finish_step() == set(table[:11])


def test_layers_are_waited_for_one_by_one_once_all_of_them_were_seen_to_call(engine: Engine) -> None:
    waits: list[int | None] = []
    ids = tokens(1, 48)
    engine.run(FakeRequest("a", ids), list(range(12)))

    def run(name: str, hooks: str | None) -> list[int | None]:
        waits.clear()
        request, table = FakeRequest(name, ids), list(range(20, 32))
        external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
        engine.scheduler.update_state_after_alloc(request, table, external or 0)
        engine.worker.begin_step(engine.order((request, table, 44, 4)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tierkv.block_store.transfers.Load.wait", lambda self, layer=None: waits.append(layer))
            engine.worker.start_loads(layer_hooks=hooks)
            if hooks:
                for layer in engine.kv:
                    engine.worker.wait_for_layer(layer)
        engine.finish_step()
        return list(waits)

    assert run("b", "NONE") == [None]
    assert run("c", "NONE") == [0, 1]
    assert run("d", "PIECEWISE") == [None]
    assert run("e", None) == [None]
