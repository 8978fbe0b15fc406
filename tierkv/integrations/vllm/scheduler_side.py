"""The side of the connector that lives in vLLM's scheduler: it looks for blocks, announces them and orders copies.

It reads attributes of vLLM's requests and of the scheduler's output, and imports nothing of vLLM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from secrets import token_hex
from typing import Any

import numpy as np

from tierkv.integrations.vllm.finders import Finder
from tierkv.integrations.vllm.pages import LEFT_OUT
from tierkv.integrations.vllm.plan import LoadOrder, SaveOrder, StepPlan, TokenUpdate, WorkerReport
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.step_times import StepTimes, SyncLoad

__all__ = ["SchedulerSide"]

_log = logging.getLogger(__name__)

_MISS_HOLDS_S = 0.5


@dataclass(slots=True)
class _Request:
    """What the scheduler side knows of one cached request. key: its number, never used twice.

    table: the engine's blocks. num_sent: tokens that the workers have. next_save: the first block not ordered to be
    saved. is_tainted: it ran over blocks that were not loaded, and is not saved any more. first_token, is_async: of an
    announced hit. miss: where nothing was found, and until when that holds.
    """

    key: int
    request: Any
    table: list[int] = field(default_factory=list)
    num_sent: int = 0
    next_save: int = 0
    first_token: int = 0
    is_async: bool = False
    miss: tuple[int, float] = (-1, 0.0)
    has_failed: bool = False
    is_tainted: bool = False
    load: LoadOrder | None = None


class SchedulerSide:
    """Requests of one engine. engine_block_size: tokens of one of the engine's blocks.

    loads, saves: what the role of this engine allows. save_now: saves a request that ends, if the worker lives in this
    process. evict: makes the engine's prefix cache forget blocks. times: measures steps, for compute or load.
    """

    def __init__(
        self,
        finder: Finder,
        statistics: Statistics,
        *,
        engine_block_size: int,
        loads: bool = True,
        saves: bool = True,
        save_now: Callable[[StepPlan], None] | None = None,
        evict: Callable[[set[int]], None] = lambda blocks: None,
        times: StepTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop_reason: str = ""
        self._finder = finder
        self._statistics = statistics
        self._engine_block = engine_block_size
        self._block = finder.block_size
        self._pages = self._block // engine_block_size
        self._loads = loads
        self._saves = saves
        self._save_now = save_now
        self._evict = evict
        self._times = times
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._uncached: set[str] = set()
        self._plan = StepPlan()
        self._numbers = count()
        self._step = 0
        self._is_idle = False
        self._loads_now: list[SyncLoad] = []
        self._salt = ""
        self._failures_seen = 0

    # --- vLLM asks

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens behind the engine's own can be loaded, and whether while the request waits.

        (None, False): cold blocks are still being read; ask again.
        """
        known = self._find(request)
        if known is None or not self._loads or known.has_failed or request.skip_reading_prefix_cache:
            return 0, False
        num_tokens = request.num_tokens
        limit = (num_tokens - 1) // self._engine_block * self._engine_block  # one token is left to compute
        first = num_computed_tokens // self._block
        end = min(-(-limit // self._block), num_tokens // self._block)
        if limit <= num_computed_tokens or end <= first:
            return self._nothing(known)
        at, until = known.miss
        if at == first and self._clock() < until:
            return 0, False
        found = self._finder.find(request.request_id, request.all_token_ids, first, end, is_idle=self._is_idle)
        if found is None:
            return None, False
        last = min((first + found.num_blocks) * self._block, limit)
        if last <= num_computed_tokens:
            known.miss = (first, self._clock() + _MISS_HOLDS_S)
            return self._nothing(known)
        known.first_token, known.is_async = num_computed_tokens, found.is_async
        known.miss = (-1, 0.0)
        return last - num_computed_tokens, found.is_async

    def _nothing(self, known: _Request) -> tuple[int, bool]:
        self._finder.drop(known.request.request_id)
        return 0, False

    def update_state_after_alloc(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Note the engine's blocks of a request, and that its announced tokens are to be loaded."""
        known = self._find(request)
        if known is None:
            return
        known.table = list(block_ids)
        if not num_external_tokens:
            self._finder.drop(request.request_id)
            return
        first_token, end_token = known.first_token, known.first_token + num_external_tokens
        first, end = first_token // self._block, -(-end_token // self._block)
        size = self._engine_block
        pages = [
            [
                known.table[at] if first_token <= at * size < end_token else LEFT_OUT
                for at in range(block * self._pages, (block + 1) * self._pages)
            ]
            for block in range(first, end)
        ]
        known.load = LoadOrder(known.key, request.request_id, first, pages, known.is_async)
        kept = self._finder.keep(request.request_id)
        if kept and not known.is_async:
            self._loads_now.append(kept)
        self._statistics.add("hit_tokens", num_external_tokens)
        self._plan.loads.append(known.load)
        self._send_tokens(known, min(end * self._block, request.num_tokens))
        self._plan.fresh += [page for pages in known.load.pages for page in pages if page != LEFT_OUT]

    def build_plan(self, scheduler_output: Any) -> StepPlan:
        """Return what the workers are to do in this step."""
        plan = self._plan
        for new in scheduler_output.scheduled_new_reqs:
            self._schedule(new.req_id, new.block_ids[0], new.num_computed_tokens, scheduler_output, is_whole=True)
        cached, scheduled = scheduler_output.scheduled_cached_reqs, scheduler_output.num_scheduled_tokens
        for request_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            known = self._requests.get(request_id)
            if not block_ids and known and num_computed + scheduled[request_id] < (known.next_save + 1) * self._block:
                continue  # most requests in most steps: no new block, none complete
            is_whole = request_id in cached.resumed_req_ids
            new_ids = block_ids[0] if block_ids else []
            self._schedule(request_id, new_ids, num_computed, scheduler_output, is_whole=is_whole)
        self._step += 1
        plan.step = self._step
        self._is_idle = not scheduler_output.total_num_scheduled_tokens
        if self._times:
            num_tokens = scheduler_output.total_num_scheduled_tokens
            self._times.start(plan.step, num_tokens, loads=self._loads_now, is_pure=not plan.loads)
        self._loads_now = []
        plan.failures_seen = self._failures_seen
        plan.is_stopped, plan.salt, plan.is_idle = bool(self.stop_reason), self._salt, self._is_idle
        self._plan = StepPlan()
        return plan

    def update_from_output(
        self, failed_block_ids: Iterable[int], report: WorkerReport | None, loaded: Iterable[str] = ()
    ) -> None:
        """Act on what the workers report: save nothing that was computed over blocks that were not loaded.

        loaded: requests whose async loads have ended.
        """
        failed = set(failed_block_ids)
        if report is not None:
            self._finder.update(report)
        for request_id in loaded:
            self._finder.loaded(request_id)
        if report is not None:
            if self._times:
                self._times.end(report.step)
            self._failures_seen = max(self._failures_seen, report.failures)
            if report.stop_reason:
                self.stop(report.stop_reason)
        garbage: set[int] = set()
        for known in self._requests.values() if failed else ():
            bad = next((at for at, block in enumerate(known.table) if block in failed), None)
            if bad is None:
                continue
            known.has_failed = True
            if known.load is not None:  # it has waited for the load: nothing was computed over the blocks
                known.next_save = min(known.next_save, bad // self._pages)
                continue
            # The request has run over them, and vLLM keeps its blocks in the prefix cache while it computes them anew.
            # If it is preempted meanwhile, or another request reads them, garbage is taken for true.
            known.is_tainted = True
            garbage.update(known.table[bad:])
        if garbage:
            _log.warning(
                "a load that was certain has failed: %d of the engine's blocks are computed anew", len(garbage)
            )
            self._evict(garbage)

    def request_finished(self, request: Any) -> None:
        """Order the last whole blocks of a request that has ended, and forget it."""
        request_id = request.request_id
        self._uncached.discard(request_id)
        known = self._requests.pop(request_id, None)
        if known is None:
            return
        # A request that waits for its load, or was preempted, holds no blocks whose content is certain.
        is_computed = request.num_computed_tokens if known.load is None else 0
        self._order_save(known, min(is_computed, request.num_tokens), self._plan.last_saves)
        self._finder.forget(request_id)
        self._plan.ended.append(known.key)
        if self._save_now and self._plan.last_saves:
            now = StepPlan(
                updates=self._plan.updates, last_saves=self._plan.last_saves, failures_seen=self._failures_seen
            )
            self._plan.updates, self._plan.last_saves = {}, []
            self._save_now(now)

    def stop(self, reason: str) -> None:
        """Cache nothing until `renew`: the weights are not known to be those of the files."""
        if not self.stop_reason:
            _log.warning("tierkv caches nothing until reset_prefix_cache(reset_connector=True): %s", reason)
        self.stop_reason = self.stop_reason or reason

    def renew(self) -> None:
        """Begin a namespace of this process alone: nothing from before is found in it, nor its blocks by others.

        vLLM asks for it where weights may change, and does not say whether they have. Requests that are there already
        are not cached any more: their K and V may be of both weights.
        """
        for request_id, known in self._requests.items():
            self._finder.forget(request_id)
            self._plan.ended.append(known.key)
            self._uncached.add(request_id)
        self._requests.clear()
        self._plan = StepPlan(ended=self._plan.ended)
        self._salt = token_hex(16)
        self._finder.renew(self._salt)
        self.stop_reason = ""
        _log.warning("tierkv: the cache was reset; blocks from before are found again after a restart of the engine")

    # --- one request

    def _find(self, request: Any) -> _Request | None:
        """Return what is known of a request; None if it is not cached, which is counted once, with the reason."""
        request_id = request.request_id
        if self.stop_reason:
            return None
        known = self._requests.get(request_id)
        if known is not None or request_id in self._uncached:
            return known
        reason = _why_not(request)
        if reason:
            self._uncached.add(request_id)
            self._statistics.add("not_cached", reason=reason)
            return None
        self._statistics.add("queries")
        known = self._requests[request_id] = _Request(next(self._numbers), request)
        return known

    def _schedule(
        self, request_id: str, block_ids: Sequence[int], num_computed: int, scheduler_output: Any, *, is_whole: bool
    ) -> None:
        """Note the blocks of a request that runs in this step, and order what it completes."""
        plan, known = self._plan, self._requests.get(request_id)
        if not is_whole:
            plan.fresh += block_ids
        elif known is None or known.load is None:
            plan.fresh += block_ids[num_computed // self._engine_block :]
        else:
            plan.fresh += block_ids[known.first_token // self._engine_block :]
        if known is None:
            return
        known.load = None
        if is_whole:
            known.table = list(block_ids)
        else:
            known.table += block_ids
        num_computed += scheduler_output.num_scheduled_tokens[request_id]
        # With asynchronous scheduling the last sampled tokens are not known yet: their block is saved a step later.
        self._order_save(known, min(num_computed, known.request.num_tokens), plan.saves)

    def _order_save(self, known: _Request, num_tokens: int, orders: list[SaveOrder]) -> None:
        """Order the whole blocks of the first tokens of a request that are not ordered yet."""
        end = min(num_tokens // self._block, len(known.table) // self._pages)
        if not self._saves or self.stop_reason or known.is_tainted or end <= known.next_save:
            return
        table = known.table[: end * self._pages]
        order = SaveOrder(known.key, known.next_save, end, table)
        orders.append(order)
        self._finder.saving(known.request.request_id, known.request.all_token_ids, order)
        known.next_save = end
        self._send_tokens(known, end * self._block)

    def _send_tokens(self, known: _Request, end: int) -> None:
        """Send the workers the tokens of a request up to `end`."""
        if end <= known.num_sent:
            return
        tokens = np.asarray(known.request.all_token_ids[known.num_sent : end], dtype=np.uint32)
        updates = self._plan.updates
        if known.key in updates:
            update = updates[known.key]
            updates[known.key] = TokenUpdate(update.start, np.concatenate([update.tokens, tokens]))
        else:
            updates[known.key] = TokenUpdate(known.num_sent, tokens)
        known.num_sent = end


def _why_not(request: Any) -> str:
    """Return why a request is not cached, "" if it is: its tokens alone must decide its K and V."""
    reasons = {
        "lora": request.lora_request is not None,
        "cache_salt": bool(request.cache_salt),
        "multimodal": bool(request.mm_features),
        "prompt_embeds": request.prompt_embeds is not None or request.prompt_token_ids is None,
        "pooling": request.pooling_params is not None,
        "resumable": bool(getattr(request, "resumable", False)),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
