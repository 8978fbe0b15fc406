"""A scheduler and a model that behave as vLLM's do towards a KV connector, small enough for thousands of requests.

The model's K and V of a token is the K and V of the token before it plus the token, read from the engine's memory: one
wrong block makes every later value, and every token that is sampled from it, wrong.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tierkv.integrations.vllm.scheduler_side import SchedulerSide
from tierkv.integrations.vllm.worker_side import WorkerSide

VOCABULARY = 997


@dataclass(eq=False)
class Request:
    """One request as vLLM's, as far as the connector looks at it.

    num_new: tokens to generate. table: its engine's blocks. remote: it waits for an async load, which came.
    """

    request_id: str
    all_token_ids: list[int]
    num_new: int = 0
    num_computed_tokens: int = 0
    table: list[int] = field(default_factory=list)
    remote: bool = False
    came: bool = False
    num_prompt: int = 0
    skip_reading_prefix_cache: bool = False
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    pooling_params: Any = None
    resumable: bool = False
    prompt_token_ids: list[int] | None = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.num_prompt + self.num_new


def next_token(value: float) -> int:
    return (int(value) * 31 + 7) % VOCABULARY


def true_answer(prompt: list[int], num_new: int) -> list[int]:
    """Return what a model without any cache generates."""
    total, answer = float(sum(prompt)), []
    for _ in range(num_new):
        answer.append(next_token(total))
        total += answer[-1]
    return answer


class FakeVllm:
    """One engine. kv: its tensors [blocks, 1, tokens, content] of float64, filled with garbage at first.

    budget: tokens of a step. Blocks that are freed keep their content, and their place in the prefix cache, until they
    are taken again.
    """

    def __init__(self, kv: list[torch.Tensor], block: int, budget: int, dice: random.Random) -> None:
        self.kv, self.block, self.budget, self.dice = kv, block, budget, dice
        self.scheduler: SchedulerSide
        self.worker: WorkerSide
        self.free = deque(range(kv[0].shape[0]))
        self.users: dict[int, int] = {}
        self.cached: dict[tuple[int, ...], int] = {}
        self.prefix_of: dict[int, tuple[int, ...]] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.orphans: list[Request] = []  # aborted while they wait for an async load
        self.answers: dict[str, list[int]] = {}
        self.num_preemptions = 0
        self.skipped: list[Request] = []  # looked at in this step

    # --- memory

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        found = [self.free.popleft() for _ in range(count)]
        for block in found:
            self.users[block] = 1
            prefix = self.prefix_of.pop(block, None)
            if prefix is not None:
                del self.cached[prefix]
        return found

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.users.get(block):
                self.free.remove(block)
            self.users[block] = self.users.get(block, 0) + 1

    def release(self, request: Request) -> None:
        for block in reversed(request.table):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.table = []

    def remember(self, request: Request, num_tokens: int) -> None:
        """Put whole blocks into the prefix cache, before they are computed, as vLLM does."""
        for at in range(min(num_tokens, request.num_tokens) // self.block):
            prefix = tuple(request.all_token_ids[: (at + 1) * self.block])
            block = request.table[at]
            if prefix not in self.cached and block not in self.prefix_of:
                self.cached[prefix], self.prefix_of[block] = block, prefix

    def local_hit(self, request: Request) -> list[int]:
        found: list[int] = []
        for end in range(self.block, request.num_tokens, self.block):
            block = self.cached.get(tuple(request.all_token_ids[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def evict(self, blocks: set[int]) -> None:
        for block in blocks:
            prefix = self.prefix_of.pop(block, None)
            if prefix is not None:
                del self.cached[prefix]

    def reset_prefix_cache(self) -> None:
        self.cached.clear()
        self.prefix_of.clear()

    # --- one step

    def step(self) -> None:
        new: list[tuple[Request, int, int]] = []
        more: list[tuple[Request, list[int], int, int]] = []
        budget = self.budget
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            scheduled = min(budget, request.num_tokens - request.num_computed_tokens)
            blocks = self._grow(request, scheduled)
            if blocks is None:
                continue
            more.append((request, blocks, request.num_computed_tokens, scheduled))
            budget -= scheduled
        more = [each for each in more if each[0] in self.running]
        self.waiting = deque(sorted(self.waiting, key=lambda each: not each.table))  # those that hold blocks first
        skipped = self.skipped = []
        while self.waiting and budget and len(self.running) < 8:
            request = self.waiting.popleft()
            scheduled = self._admit(request, budget)
            if scheduled is None:
                skipped.append(request)
                if not request.remote:
                    break
                continue
            if not scheduled:
                skipped.append(request)
                continue
            new.append((request, request.num_computed_tokens, scheduled))
            self.running.append(request)
            budget -= scheduled
        self.waiting.extendleft(reversed(skipped))
        if not new and not more:
            time.sleep(0.001)  # as vLLM's loop
        self._execute(new, more)

    def _grow(self, request: Request, scheduled: int) -> list[int] | None:
        need = -(-(request.num_computed_tokens + scheduled) // self.block) - len(request.table)
        while True:
            blocks = self.take(max(0, need))
            if blocks is not None:
                request.table = request.table + blocks
                self.remember(request, request.num_computed_tokens + scheduled)
                return blocks
            last = self.running.pop()
            self.num_preemptions += 1
            self.release(last)
            last.num_computed_tokens = 0
            self.waiting.appendleft(last)
            if last is request:
                return None

    def _admit(self, request: Request, budget: int) -> int | None:
        """Return the tokens to schedule; 0: the connector is not ready; None: no room, or an async load goes on."""
        if request.remote:
            if not request.came:
                return None
            request.remote = request.came = False
            if not request.num_computed_tokens:
                self.release(request)
        if not request.num_computed_tokens:
            hit = self.local_hit(request)
            local = len(hit) * self.block
            external, is_async = self.scheduler.get_num_new_matched_tokens(request, local)
            if external is None:
                return 0
            computed = local + external
            assert computed < request.num_tokens
            scheduled = 0 if is_async else min(budget, request.num_tokens - computed)
            self.share(hit)
            fits = not is_async or self._has_room_for_async(request, len(hit))
            blocks = self.take(-(-(computed + scheduled) // self.block) - len(hit)) if fits else None
            if blocks is None:
                request.table = hit
                self.release(request)
                return None
            request.table = hit + blocks
            self.scheduler.update_state_after_alloc(request, request.table, external)
            request.num_computed_tokens = computed
            if is_async:
                request.remote = True
                return None
            self.remember(request, computed + scheduled)
            return scheduled
        scheduled = min(budget, request.num_tokens - request.num_computed_tokens)
        blocks = self.take(max(0, -(-(request.num_computed_tokens + scheduled) // self.block) - len(request.table)))
        if blocks is None:
            return None
        request.table = request.table + blocks
        self.scheduler.update_state_after_alloc(request, request.table, 0)
        self.remember(request, request.num_computed_tokens + scheduled)
        return scheduled

    def _has_room_for_async(self, request: Request, num_hit: int) -> bool:
        """Return whether a request may hold blocks without running: one at a time, or two could wait for each other."""
        whole = -(-(request.num_prompt + request.num_new) // self.block)
        return whole - num_hit <= len(self.free) and not any(each.table for each in (*self.waiting, *self.skipped))

    def _execute(self, new: list[tuple[Request, int, int]], more: list[tuple[Request, list[int], int, int]]) -> None:
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, block_ids=(list(r.table),), num_computed_tokens=computed)
                for r, computed, _ in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r, *_ in more],
                new_block_ids=[(blocks,) if blocks else None for _, blocks, _, _ in more],
                num_computed_tokens=[computed for *_, computed, _ in more],
                resumed_req_ids=set(),
            ),
            num_scheduled_tokens={each[0].request_id: each[-1] for each in (*new, *more)},
            total_num_scheduled_tokens=sum(each[-1] for each in (*new, *more)),
        )
        plan = self.scheduler.build_plan(output)
        ran = [(request, computed, scheduled) for request, _, computed, scheduled in more] + new
        self.worker.begin_step(plan)
        self.worker.start_loads(layer_hooks=None)
        for request, computed, scheduled in ran:
            self._compute(request, computed, computed + scheduled)
            request.num_computed_tokens = computed + scheduled
        self.worker.end_step()
        came = self.worker.finished_loads()
        failed = self.worker.take_failed_blocks()
        rescheduled = self._recompute(failed, {id(request): scheduled for request, _, scheduled in ran})
        for request in [*self.waiting, *self.orphans]:
            if request.remote and request.request_id in came:
                request.came = True
                self.remember(request, request.num_computed_tokens)
        for request in [each for each in self.orphans if each.came]:
            self.orphans.remove(request)
            self.release(request)
        for request, _, _ in ran:
            if request in rescheduled or request.num_computed_tokens < request.num_tokens:
                continue
            request.all_token_ids.append(next_token(self._value(request, request.num_tokens - 1)))
            if request.is_done:
                self.running.remove(request)
                self.answers[request.request_id] = request.all_token_ids[request.num_prompt :]
                self.scheduler.request_finished(request)
                self.release(request)
        self.scheduler.update_from_output(failed, self.worker.report(), came)

    def _recompute(self, failed: set[int], scheduled: dict[int, int]) -> list[Request]:
        """Go back to the first failed block of each request, as vLLM's policy "recompute" does."""
        marked: set[int] = set()
        found: list[Request] = []
        for request in [*(each for each in self.waiting if each.remote), *self.running]:
            computed = request.num_computed_tokens - scheduled.get(id(request), 0)
            has_marked = False
            for at in range(-(-computed // self.block)):
                block = request.table[at]
                if block not in failed:
                    continue
                if request not in found:
                    found.append(request)
                if block in marked:
                    continue
                marked.add(block)
                if not has_marked:
                    has_marked = True
                    request.num_computed_tokens = at * self.block
            if request in found and not has_marked:
                request.num_computed_tokens = computed
        return found

    def _value(self, request: Request, at: int) -> float:
        return float(self.kv[0][request.table[at // self.block], 0, at % self.block, 0])

    def _compute(self, request: Request, first: int, end: int) -> None:
        for at in range(first, end):
            value = (self._value(request, at - 1) if at else 0.0) + request.all_token_ids[at]
            for tensor in self.kv:
                tensor[request.table[at // self.block], 0, at % self.block] = value

    def abort(self, request: Request) -> None:
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.scheduler.request_finished(request)
        if request.remote and not request.came:
            self.orphans.append(request)
        else:
            self.release(request)
