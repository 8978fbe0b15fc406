"""A hunt for wrong answers: random requests, failing loads, preemptions, aborts and restarts under the connector."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import VOCABULARY, FakeVllm, Request, true_answer

from tierkv.block_store.placement import Strided
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.finders import LocalFinder
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.pages import EnginePages
from tierkv.integrations.vllm.scheduler_side import SchedulerSide
from tierkv.integrations.vllm.session import Session
from tierkv.integrations.vllm.shared_finder import SharedFinder
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.worker_side import WorkerSide
from tierkv.values.namespace import Namespace

ENGINE_BLOCK, BLOCK, NUM_ENGINE_BLOCKS = 4, 8, 50


class Life:
    """One engine over a store on disk. shares_process: the scheduler sees the worker's memory."""

    def __init__(self, path: Path, dice: random.Random, *, shares_process: bool, warm_blocks: int) -> None:
        kv = {f"l{i}": torch.rand(NUM_ENGINE_BLOCKS, 1, ENGINE_BLOCK, 2, dtype=torch.float64) for i in range(2)}
        pages = EnginePages.of(
            kv, num_engine_blocks=NUM_ENGINE_BLOCKS, engine_block_size=ENGINE_BLOCK, block_tokens=BLOCK
        )
        options = Options(
            path=path,
            warm_bytes=warm_blocks * pages.layout.block_bytes,
            cold_bytes=1 << 22,
            compute_or_load=False,
            block_tokens=BLOCK,
        )
        self.session = Session(options, Namespace(weights="w", layout=pages.layout))
        self.statistics = Statistics()
        store = self.session.store
        self.finder: Any = (
            LocalFinder(self.session, self.statistics)
            if shares_process
            else SharedFinder(options, [store.namespace], self.statistics, cold=store.cold)
        )
        self.engine = FakeVllm(list(kv.values()), ENGINE_BLOCK, 40, dice)
        self.engine.worker = WorkerSide(self.session, pages, self.statistics)
        save_now = self.session.run_now if shares_process else None
        self.engine.scheduler = SchedulerSide(
            self.finder, self.statistics, engine_block_size=ENGINE_BLOCK, save_now=save_now, evict=self.engine.evict
        )

    def close(self) -> None:
        self.finder.close()
        self.session.close()


def failing_load(dice: random.Random, *, certain_too: bool) -> Callable[..., Any]:
    """Return a load of which one in five loses its last blocks. certain_too: also those of ready reservations."""
    load = BlockStore.load

    def load_less(self: BlockStore, reservation: Any, targets: Any) -> Any:
        keys = list(reservation.keys)
        if dice.random() > 0.2 or (reservation.is_ready and not certain_too):
            return load(self, reservation, targets)
        kept = dice.randrange(len(keys) + 1)
        found = load(self, reservation, Strided(targets.memory, targets.pages[:kept]))
        found.synchronize()
        found.keys = keys
        return found

    return load_less


class Hunt:
    """Lives of engines over one store, with random requests over a few stems."""

    def __init__(self, path: Path, seed: int, *, shares_process: bool) -> None:
        self.path, self.shares_process = path, shares_process
        self.dice = random.Random(seed)
        self.stems = [[self.dice.randrange(1, VOCABULARY) for _ in range(90)] for _ in range(4)]
        self.expected: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.counted: Counter[str] = Counter()
        self.num_preemptions = 0

    def live(self, name: str, *, warm_blocks: int, num_requests: int = 60) -> None:
        """Run one engine until all its requests have ended."""
        dice = self.dice
        life = Life(self.path, dice, shares_process=self.shares_process, warm_blocks=warm_blocks)
        engine, alive = life.engine, []
        for at in range(num_requests):
            prompt = dice.choice(self.stems)[: dice.randrange(1, 90)]
            prompt = prompt + [dice.randrange(1, VOCABULARY) for _ in range(dice.randrange(1, 30))]
            request = Request(f"{name}.{at}", prompt, dice.randrange(1, 25))
            alive.append(request)
            engine.waiting.append(request)
            self.expected[request.request_id] = true_answer(prompt, request.num_new)
            for _ in range(dice.randrange(12)):
                engine.step()
            aborted = dice.choice(alive)
            if dice.random() < 0.15 and aborted.request_id not in engine.answers:
                engine.abort(aborted)
                alive.remove(aborted)
                del self.expected[aborted.request_id]
            if dice.random() < 0.1:
                engine.reset_prefix_cache()
        for _ in range(20000):
            if not engine.waiting and not engine.running and not engine.orphans:
                break
            engine.step()
        assert not engine.waiting, "the engine makes no progress"
        self.answers |= engine.answers
        self.num_preemptions += engine.num_preemptions
        life.statistics.drain()
        self.counted += life.statistics.total
        life.close()

    def wrong(self) -> list[str]:
        return [name for name, answer in self.expected.items() if self.answers.get(name) != answer]


PROCESSES = pytest.mark.parametrize("shares_process", [True, False], ids=["one process", "two processes"])


@PROCESSES
@pytest.mark.parametrize("seed", range(4))
def test_random_requests_get_the_answers_of_a_model_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, shares_process: bool
) -> None:
    hunt = Hunt(tmp_path / "store", seed, shares_process=shares_process)
    monkeypatch.setattr(BlockStore, "load", failing_load(hunt.dice, certain_too=not shares_process))
    for number, warm_blocks in enumerate((8, 24, 64)):
        hunt.live(str(number), warm_blocks=warm_blocks)
    for number in range(6):  # what happens depends on how soon blocks are read, too
        if hunt.num_preemptions > 5 and hunt.counted["failed_blocks"]:
            break
        hunt.live(f"more {number}", warm_blocks=24)
    assert not hunt.wrong()
    assert hunt.num_preemptions > 5
    assert hunt.counted["loaded_blocks"] > 50
    assert hunt.counted["failed_blocks"] > 0
    assert hunt.counted["saved_blocks"] > 50


@pytest.mark.parametrize("seed", range(4))
def test_loads_that_break_their_promise_leave_no_garbage_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    hunt = Hunt(tmp_path / "store", seed, shares_process=True)
    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "load", failing_load(hunt.dice, certain_too=True))
        for number in range(2):
            hunt.live(f"broken {number}", warm_blocks=24)
    assert hunt.counted["unsaved_blocks"] > 0
    hunt.expected.clear()  # vLLM itself reads blocks that it has yet to compute anew
    hunt.live("sound", warm_blocks=64, num_requests=120)
    assert hunt.counted["loaded_blocks"] > 50
    assert not hunt.wrong()
