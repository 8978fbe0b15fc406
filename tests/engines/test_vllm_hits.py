"""What the connector announces and loads: its two sides without vLLM, over a real store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import Request
from vllm_sides import BLOCK, Engine, counters, tokens

from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.integrations.vllm.shared_finder import SharedFinder
from tierkv.integrations.vllm.step_times import StepTimes
from tierkv.values.namespace import Namespace


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "store")
    yield found
    found.close()


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
    engine.run(Request("a", ids), list(range(12)))
    request = Request("b", ids, **change)
    assert engine.run(request, list(range(20, 32))) == 0
    assert engine.run(request, list(range(20, 32))) == 0
    engine.scheduler.request_finished(request)
    assert counters(engine)[f"not_cached:{reason}"] == 1
    assert counters(engine)["queries"] == 1


def test_blocks_that_do_not_fit_into_the_warm_memory_load_while_the_request_waits(tmp_path: Path) -> None:
    ids = tokens(1, 200)
    engine = Engine(tmp_path / "store")
    engine.run(Request("a", ids), list(range(50)))
    engine.close()
    engine = Engine(tmp_path / "store", warm_blocks=6)
    request, table = Request("b", ids), list(range(50))
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
    engine.run(Request("a", ids), list(range(12)))
    engine.close()
    engine = Engine(tmp_path / "store")
    request = Request("b", ids)
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


def test_while_many_requests_read_one_without_a_hit_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tmp_path / "store")
    for seed in range(5):
        engine.run(Request(f"a{seed}", tokens(seed + 1, 32)), list(range(8)))
    engine.close()
    engine = Engine(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr("tierkv.block_store.reservation.Reservation.is_reading", property(lambda self: True))
        for seed in range(5):
            request = Request(f"b{seed}", tokens(seed + 1, 32))
            assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
        assert len(engine.finder._held) == 4
        unknown = Request("c", tokens(99, 32))
        assert engine.scheduler.get_num_new_matched_tokens(unknown, 0) == (0, False)
    engine.close()


def test_a_scheduler_in_another_process_finds_what_all_ranks_have_on_disk(tmp_path: Path) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(Request("a", ids), list(range(12)))
    engine.session.store.flush()
    namespace = engine.session.store.namespace
    other_rank = Namespace(weights="w", layout=namespace.layout, tp_rank=1, tp_size=2)
    for ranks, hit in (([namespace], (44, True)), ([namespace, other_rank], (0, False))):
        finder = SharedFinder(engine.options, ranks, engine.statistics, cold=engine.session.store.cold)
        scheduler = engine.make_scheduler(finder)
        assert scheduler.get_num_new_matched_tokens(Request("b", ids), 0) == hit
        finder.close()
    engine.close()


def test_an_async_load_of_blocks_that_have_gone_is_reported_with_its_blocks(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "store")
    finder = SharedFinder(
        *(engine.options, [engine.session.store.namespace], engine.statistics), cold=engine.session.store.cold
    )
    engine.scheduler = engine.make_scheduler(finder)
    finder.find = lambda *_, **__: SimpleNamespace(num_blocks=3, is_async=True)  # type: ignore[method-assign]
    finder.keep = lambda *_: None  # type: ignore[method-assign]
    request, table = Request("b", tokens(1, 50)), list(range(13))
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


def test_after_a_stop_nothing_is_announced_loaded_or_saved(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(Request("a", ids), list(range(12)))
    engine.worker.stop("the worker's reload_weights was called")
    engine.finish_step()
    assert engine.scheduler.stop_reason == "the worker's reload_weights was called"
    assert engine.run(Request("b", ids), list(range(20, 32))) == 0
    assert engine.run(Request("c", tokens(5, 48)), list(range(20, 32))) == 0
    assert counters(engine)["saved_blocks"] == 3


def test_after_a_reset_nothing_from_before_is_found_and_new_requests_are_cached(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(Request("a", ids), list(range(12)))
    running = Request("b", tokens(5, 32))
    engine.run(running, list(range(12, 20)))
    engine.worker.stop("the worker's update_weights was called")
    engine.finish_step()
    engine.scheduler.renew()
    assert not engine.scheduler.stop_reason
    running.all_token_ids += range(16)
    assert not engine.order_more(running, list(range(50, 54)), 32, 16).saves
    assert engine.run(Request("c", ids), list(range(20, 32))) == 0
    assert engine.run(Request("d", ids), list(range(32, 44))) == 44
    assert engine.has(ids, list(range(32, 44)), 48)


def test_a_worker_in_another_process_begins_the_new_namespace_with_the_next_plan(tmp_path: Path) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(Request("a", ids), list(range(12)))
    engine.session.store.flush()
    plan = engine.order()
    plan.salt = "another"
    engine.worker.begin_step(plan)
    assert engine.session.store.contains(engine.session.store.keys(ids)) == 0
    engine.close()


def test_an_announced_load_after_a_stop_fails_and_is_computed(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(Request("a", ids), list(range(12)))
    request, table = Request("b", ids), list(range(20, 32))
    external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    engine.scheduler.update_state_after_alloc(request, table, external or 0)
    engine.worker.stop("weights changed")
    engine.worker.begin_step(engine.order((request, table, 44, 4)))
    engine.worker.start_loads(layer_hooks=None)
    assert engine.finish_step() == set(table[:11])


def test_a_prefix_that_is_faster_computed_is_not_announced(engine: Engine) -> None:
    ids = tokens(1, 48)
    engine.run(Request("a", ids), list(range(12)))
    engine.session.options = dataclasses.replace(engine.options, compute_or_load=True)
    engine.session.costs.record_compute(48, seconds=0.001)
    engine.session.costs.record_load(3, origin=Origin.WARM, seconds=1.0)
    assert engine.run(Request("b", ids), list(range(20, 32))) == 0
    assert counters(engine)["computed_instead_tokens"] == 48
    for _ in range(2):  # of two the faster one counts
        engine.session.costs.record_compute(48, seconds=1000.0)
    assert engine.run(Request("c", ids), list(range(20, 32))) == 44


def test_a_scheduler_in_another_process_measures_loads_and_computes_what_is_faster_computed(tmp_path: Path) -> None:
    ids = tokens(1, 48)
    engine = Engine(tmp_path / "store")
    engine.run(Request("a", ids), list(range(12)))
    engine.session.store.flush()
    store, now = engine.session.store, [0.0]
    options = dataclasses.replace(engine.options, compute_or_load=True)
    finder = SharedFinder(options, [store.namespace], engine.statistics, cold=store.cold, clock=lambda: now[0])
    scheduler = engine.make_scheduler(finder)
    request = Request("b", ids)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (44, True)
    scheduler.update_state_after_alloc(request, list(range(20, 32)), 44)
    now[0] = 9.0
    scheduler.update_from_output((), None, ["b"])
    finder.costs.record_compute(48, seconds=0.001)
    assert scheduler.get_num_new_matched_tokens(Request("c", ids), 0) == (0, False)
    finder.close()
    engine.close()


def test_the_time_of_a_step_begins_when_the_step_before_it_ends() -> None:
    now, costs = [0.0], LoadOrCompute(block_size=BLOCK)
    times = StepTimes(costs, clock=lambda: now[0])
    found: list[tuple[int, float]] = []
    costs.record_compute = lambda count, seconds: found.append((count, seconds))  # type: ignore[method-assign]
    times.start(1, 512, is_pure=True)
    now[0] = 1.0
    times.start(2, 256, is_pure=True)
    times.start(3, 256, is_pure=False)
    times.start(4, 1, is_pure=True)
    for step, at in ((1, 4.0), (2, 6.0), (3, 9.0), (4, 10.0)):
        now[0] = at
        times.end(step)
    assert found == [(512, 4.0), (256, 2.0)]
