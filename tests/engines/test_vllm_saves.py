"""What the connector saves, and what it must not: its two sides without vLLM, over a real store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import Request
from vllm_sides import Engine, counters, fail_after, tokens

from tierkv.block_store.store import BlockStore


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "store")
    yield found
    found.close()


def test_a_prompt_is_saved_and_found_again_up_to_its_last_token(engine: Engine) -> None:
    ids = tokens(1, 48)
    assert engine.run(Request("a", ids), list(range(12))) == 0
    table = list(range(20, 32))
    assert engine.run(Request("b", ids), table) == 44  # one token is left, and engine's blocks are loaded whole
    assert engine.has(ids, table, 48)
    assert counters(engine)["saved_blocks"] == 3


def test_blocks_that_the_engine_has_are_left_alone(engine: Engine) -> None:
    ids = tokens(1, 50)
    engine.run(Request("a", ids), list(range(13)))
    table = list(range(20, 33))
    for tensor in engine.kv.values():
        tensor[table[:6]] = -1.0
    request = Request("b", ids)
    assert engine.run(request, table, local=24) == 24
    assert engine.has(ids, table, 48, first=24)
    assert all(bool((tensor[table[:6]] == -1.0).all()) for tensor in engine.kv.values())


def test_generated_tokens_and_chunks_are_kept(engine: Engine) -> None:
    ids = tokens(1, 20)
    request = Request("a", ids)
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
    request = Request("a", ids)
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
    request = Request("a", ids[:15])
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


def test_no_request_that_computed_over_a_failed_block_is_saved_and_its_blocks_leave_the_prefix_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 64)
    engine.run(Request("a", ids[:48]), list(range(12)))
    fail_after(engine.session.store, 1, monkeypatch)
    request, table = Request("b", ids), list(range(20, 36))
    external, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    assert external == 48
    engine.scheduler.update_state_after_alloc(request, table, external)
    # Another request shares the blocks that are just being loaded: vLLM counts them as cached already.
    other, its_table = Request("c", ids[:48] + tokens(3, 16)), [*table[:12], *range(40, 44)]
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

    assert engine.evicted == set(table[4:]) | set(its_table[4:])

    engine.worker.begin_step(engine.order_more(request, [], 16, 48))
    engine.compute(ids, table, 16)
    engine.finish_step()
    request.num_computed_tokens = 64
    engine.scheduler.request_finished(request)
    assert store.contains(store.keys(ids)) == 3  # vLLM may have read the garbage meanwhile
    monkeypatch.undo()
    again, place = Request("d", [*ids, 1]), list(range(44, 61))
    assert engine.run(again, place) == 48
    assert engine.has(again.all_token_ids, place, 64)


def test_orders_that_were_built_before_the_failure_was_known_are_not_carried_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 63)
    engine.run(Request("a", ids[:48]), list(range(12)))
    fail_after(engine.session.store, 0, monkeypatch)
    request, table = Request("b", ids), list(range(20, 36))
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
        request = Request(name, tokens(first + 1, 16))
        engine.run(request, list(range(first, first + 4)))
        request.num_computed_tokens = 16
        engine.scheduler.request_finished(request)
    engine.run(Request("c", tokens(9, 8)), [11, 30])
    assert [each.waited for each in saves] == [False, True]


def test_a_block_that_found_no_room_is_saved_with_its_child(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 32)
    request, table = Request("a", ids), list(range(8))
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


def test_layers_are_waited_for_one_by_one_once_all_of_them_were_seen_to_call(engine: Engine) -> None:
    waits: list[int | None] = []
    ids = tokens(1, 48)
    engine.run(Request("a", ids), list(range(12)))

    def run(name: str, hooks: str | None) -> list[int | None]:
        waits.clear()
        request, table = Request(name, ids), list(range(20, 32))
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
