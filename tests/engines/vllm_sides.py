"""The connector's two sides over a real store, and requests as vLLM's: what the tests of both sides use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import Request

from tierkv.block_store.placement import Strided
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.finders import LocalFinder
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


class Engine:
    """One worker's memory, a session, and both sides. `step` runs one request's step as vLLM would."""

    def __init__(self, path: Path | None, *, socket: Path | None = None, warm_blocks: int = 32) -> None:
        self.kv = {f"layer{i}": torch.zeros(NUM_ENGINE_BLOCKS, 1, ENGINE_BLOCK, 16) for i in range(2)}
        self.pages = EnginePages.of(
            self.kv, num_engine_blocks=NUM_ENGINE_BLOCKS, engine_block_size=ENGINE_BLOCK, block_tokens=BLOCK
        )
        namespace = Namespace(weights="w", layout=self.pages.layout)
        self.options = Options(
            path=path,
            socket=socket,
            warm_bytes=warm_blocks * self.pages.layout.block_bytes,
            cold_bytes=1 << 26,
            compute_or_load=False,
            block_tokens=BLOCK,
        )
        self.evicted: set[int] = set()
        self.session = Session(self.options, namespace)
        self.statistics = Statistics()
        self.worker = WorkerSide(self.session, self.pages, self.statistics)
        self.finder = LocalFinder(self.session, self.statistics)
        self.scheduler = self.make_scheduler(self.finder)

    def make_scheduler(self, finder: Any) -> SchedulerSide:
        return SchedulerSide(
            finder,
            self.statistics,
            engine_block_size=ENGINE_BLOCK,
            save_now=self.session.run_now,
            evict=self.evicted.update,
        )

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

    def order(self, *steps: tuple[Request, list[int], int, int]) -> StepPlan:
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

    def order_more(self, request: Request, new_blocks: list[int], computed: int, scheduled: int) -> StepPlan:
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

    def run(self, request: Request, table: list[int], local: int = 0) -> int:
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


def counters(engine: Engine) -> dict[str, int]:
    engine.statistics.drain()
    return dict(engine.statistics.total)


def fail_after(store: BlockStore, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load = BlockStore.load

    def load_less(self: BlockStore, reservation: Any, targets: Any) -> Any:
        keys = list(reservation.keys)
        found = load(self, reservation, Strided(targets.memory, targets.pages[:num_blocks]))
        found.synchronize()
        found.keys = keys
        return found

    monkeypatch.setattr(BlockStore, "load", load_less)
