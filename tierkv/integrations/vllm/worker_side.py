"""The side of the connector in a worker of vLLM: it copies blocks between the engine's memory and the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tierkv.block_store.keys import BlockKeys
from tierkv.block_store.load_or_compute import Origin
from tierkv.block_store.placement import Strided
from tierkv.block_store.transfers import Load, Save, wait_for_any
from tierkv.errors import TierKVError
from tierkv.integrations.vllm.pages import LEFT_OUT, EnginePages
from tierkv.integrations.vllm.plan import LoadOrder, LoadReport, SaveOrder, StepPlan, WorkerReport
from tierkv.integrations.vllm.session import Reserved, Session
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.movers.engine_memory import EngineMemory

__all__ = ["WorkerSide"]

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.01


@dataclass(slots=True)
class _Loading:
    """A load in progress. load: None if it never began. read_s: what reading took before."""

    order: LoadOrder
    load: Load | None = None
    started: float = 0.0
    read_s: float = 0.0
    origin: Origin = Origin.WARM
    is_recorded: bool = False


@dataclass(frozen=True, slots=True)
class _Saving:
    """A save whose copies may still read the engine's blocks."""

    save: Save
    blocks: frozenset[int]


class WorkerSide:
    """Carries out the plans of the scheduler side. All methods are called by the worker's own thread.

    A request that computed over a block that was not loaded is not saved: its K and V are garbage under true tokens.
    """

    def __init__(
        self,
        session: Session,
        pages: EnginePages,
        statistics: Statistics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._pages = pages
        self._statistics = statistics
        self._clock = clock
        self._memory = self._register()
        session.store.keep_costs(session.costs)  # measures the disk, once the memory is registered
        session.store.wait_for_costs()
        self._keys: dict[int, BlockKeys] = {}
        self._loading: list[_Loading] = []  # async ones
        self._loads_now: list[_Loading] = []  # the forward pass of this step reads them
        self._saving: list[_Saving] = []
        self._garbage: dict[int, set[int]] = {}  # number of a failure -> engine's blocks that were not loaded
        self._failures = 0
        self._failed_blocks: set[int] = set()
        self._plan = StepPlan()
        self._stop_reason = ""
        self._hooks = _LayerHooks(len(pages.tensors), pages.layer_of)
        self._salt = ""
        self._saved: dict[int, int] = {}  # blocks of a request that are saved, or were known
        self._new_loads: dict[str, LoadReport] = {}  # to be reported
        self._new_saves: dict[tuple[int, int], int] = {}
        session.run_now = self.run_now
        session.renew_now = self.renew

    # --- one step, in the order of vLLM's calls

    def begin_step(self, plan: StepPlan) -> None:
        """Save the last blocks of requests that have ended, then let this step overwrite only what has been copied."""
        if plan.salt != self._salt:
            self.renew(plan.salt)
        self._plan = plan
        if plan.is_stopped:
            self._stop_reason = self._stop_reason or "the scheduler side has stopped"
        for key, update in plan.updates.items():
            keys = self._keys.get(key)
            if keys is None:
                keys = self._keys[key] = self._session.store.keys()
            assert keys.num_tokens == update.start, "the scheduler side sends every token once"
            keys.extend(update.tokens)
        for failure in [number for number in self._garbage if number <= plan.failures_seen]:
            del self._garbage[failure]
        for order in plan.last_saves:
            self._save(order)
        for key in plan.ended:
            self._keys.pop(key, None)
            self._saved.pop(key, None)
        self._hooks.begin()
        if self._saving:
            fresh = set(plan.fresh)
            for saving in self._saving:
                if not fresh.isdisjoint(saving.blocks):
                    saving.save.wait()
            self._saving = [saving for saving in self._saving if not saving.save.is_done()]

    def start_loads(self, *, layer_hooks: str | None) -> None:
        """Start the plan's loads. layer_hooks: names the way in which this step calls `wait_for_layer`.

        With None, and in a way in which not every layer was seen to call it, the current stream waits for all layers.
        """
        orders, self._plan.loads = self._plan.loads, []
        for order in orders:
            loading = self._start(order)
            if order.is_async:
                self._loading.append(loading)
            else:
                self._end_sync(loading)
        self._hooks.kind = layer_hooks
        if self._loads_now and not self._hooks.is_trusted:
            for loading in self._loads_now:
                assert loading.load is not None
                loading.load.wait()

    def wait_for_layer(self, name: str) -> None:
        """Make the current stream wait for one layer of the blocks that this step reads."""
        layer = self._hooks.see(name)
        if self._loads_now and self._hooks.is_trusted:
            for loading in self._loads_now:
                assert loading.load is not None
                loading.load.wait(layer)

    def end_step(self) -> None:
        """Save what this step has completed. The copies wait for the forward pass on a stream of their own."""
        self._hooks.end()
        orders, self._plan.saves = self._plan.saves, []
        for order in orders:
            self._save(order)

    def finished_loads(self) -> set[str]:
        """Return requests whose async loads have ended, since the last call, with or without all their blocks.

        In a step that computes nothing this waits a moment for one of them: vLLM begins the next step at once, and this
        thread would keep Python from the threads that read.
        """
        self._loads_now = [each for each in self._loads_now if not self._is_over(each)]
        if self._plan.is_idle and self._loading and all(each.load for each in self._loading):
            wait_for_any([each.load for each in self._loading if each.load], _IDLE_WAIT_S)
        ended = [each for each in self._loading if each.load is None or self._is_over(each)]
        if not ended:
            return set()
        self._loading = [each for each in self._loading if each not in ended]
        for loading in ended:
            has_failed = bool(self._count(loading))
            self._new_loads[loading.order.request_id] = LoadReport(loading.origin, is_whole=not has_failed)
        return {loading.order.request_id for loading in ended}

    def take_failed_blocks(self) -> set[int]:
        """Return the engine's blocks that were not loaded, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> WorkerReport:
        """Return what the scheduler side must know after this step."""
        loads, self._new_loads = self._new_loads, {}
        saves, self._new_saves = self._new_saves, {}
        return WorkerReport(self._plan.step, self._failures, self._stop_reason, loads, saves)

    def run_now(self, plan: StepPlan) -> None:
        """Carry out the last saves of requests that have ended, between two steps."""
        step = self._plan
        self.begin_step(plan)
        self._plan = step

    # --- outside of steps

    def stop(self, reason: str) -> None:
        """Load and save nothing until `renew`: the weights are not known to be those of the files."""
        self._stop_reason = self._stop_reason or reason

    def renew(self, salt: str) -> None:
        """Begin the namespace with this salt. Loads in progress fail: what they bring is of the namespace before."""
        self.synchronize()
        for loading in self._loading:
            loading.load = None
        self._keys.clear()
        self._saved.clear()
        self._saving.clear()
        self._session.reopen(salt)
        self._memory = self._register()
        self._salt, self._stop_reason = salt, ""

    def synchronize(self) -> None:
        """Wait until no copy reads or writes the engine's memory."""
        for loading in (*self._loading, *self._loads_now):
            if loading.load is not None:
                loading.load.synchronize()
        for saving in self._saving:
            saving.save.synchronize()

    def _register(self) -> EngineMemory:
        tensors = [[tensor] for tensor in self._pages.tensors]
        return self._session.store.register(tensors, pages_per_block=self._pages.pages_per_block)

    # --- loads

    def _start(self, order: LoadOrder) -> _Loading:
        reserved = self._session.take(order.request_id)
        if reserved is None and not self._stop_reason:
            reserved = self._reserve(order)
        if reserved is None or self._stop_reason:
            if reserved is not None:
                reserved.reservation.release()
            return _Loading(order)
        started = self._clock()
        targets = Strided(self._memory, self._pages.pages_of(order.pages))
        try:
            load = self._session.store.load(reserved.reservation, targets)
        except TierKVError as exc:
            _log.warning("a load failed, the engine computes instead: %s", exc)
            return _Loading(order)
        return _Loading(order, load, started, reserved.read_s, reserved.origin)

    def _reserve(self, order: LoadOrder) -> Reserved | None:
        """Reserve blocks that a scheduler side in another process has found on disk."""
        keys = self._keys.get(order.key)
        end = order.first + len(order.pages)
        if keys is None or len(keys) < end or not order.is_async:
            return None
        reservation = self._session.store.reserve(keys[:end], order.first)
        return Reserved(reservation, 0.0, reservation.origin)

    def _end_sync(self, loading: _Loading) -> None:
        """Take up a load that this step's forward pass reads. All its blocks are certain, or it fails here and now."""
        failed = self._count(loading)
        if failed:
            self._failures += 1
            self._garbage[self._failures] = failed
        if loading.load is not None and loading.load.num_loaded:
            self._is_over(loading)  # copies on a CPU have ended
            self._loads_now.append(loading)

    def _count(self, loading: _Loading) -> set[int]:
        """Count the blocks of a load whose outcome is known; return the engine's blocks that did not come."""
        num_loaded = 0
        if loading.load is not None:
            num_loaded = len(loading.load.keys) - len(loading.load.failed_keys)
        missing = loading.order.pages[num_loaded:]
        failed = {block for blocks in missing for block in blocks if block != LEFT_OUT}
        self._statistics.add("loaded_blocks", num_loaded)
        self._statistics.add("failed_blocks", len(missing))
        self._failed_blocks |= failed
        return failed

    def _is_over(self, loading: _Loading) -> bool:
        assert loading.load is not None
        if not loading.load.is_done():
            return False
        if loading.order.is_async and loading.load.num_loaded and not loading.is_recorded:  # else its step measures it
            seconds = loading.read_s + self._clock() - loading.started
            self._session.costs.record_load(loading.load.num_loaded, origin=loading.origin, seconds=seconds)
            loading.is_recorded = True
        return True

    # --- saves

    def _save(self, order: SaveOrder) -> None:
        """Save blocks, unless the request has computed over garbage that the scheduler side has not seen yet.

        Blocks for which there was no room before are tried again: without them their children are of no use.
        """
        keys = self._keys.get(order.key)
        if self._stop_reason or keys is None:
            return
        if self._is_garbage(order.table):
            self._statistics.add("unsaved_blocks", order.end - order.first)
            return
        first = min(order.first, self._saved.get(order.key, order.first))
        per_block = len(order.table) // order.end
        blocks = [order.table[at * per_block : (at + 1) * per_block] for at in range(first, order.end)]
        sources = Strided(self._memory, self._pages.pages_of(blocks))
        try:
            save = self._session.store.save(keys[: order.end], sources, start=first)
        except TierKVError as exc:
            _log.warning("a save failed: %s", exc)
            return
        self._saved[order.key] = order.end - save.num_skipped
        if save.num_saved and not save.num_skipped:
            self._new_saves[order.key, order.end] = min(save.num_saved, order.end - order.first)
        self._statistics.add("saved_blocks", save.num_saved)
        if not save.is_done():
            self._saving.append(_Saving(save, frozenset(block for ids in blocks for block in ids)))

    def _is_garbage(self, table: Iterable[int]) -> bool:
        return any(not failed.isdisjoint(table) for failed in self._garbage.values())


class _LayerHooks:
    """Whether every layer calls `wait_for_layer` in steps of a kind. CUDA graphs that are replayed whole call none.

    kind: of this step; None if no layer will call.
    """

    def __init__(self, num_layers: int, layer_of: dict[str, int]) -> None:
        self.kind: str | None = None
        self._num_layers = num_layers
        self._layer_of = layer_of
        self._trusted: set[str] = set()
        self._seen: set[int] = set()

    @property
    def is_trusted(self) -> bool:
        """Whether all layers have called in an earlier step of this kind."""
        return self.kind in self._trusted

    def begin(self) -> None:
        """Begin a step, whose kind is not known yet."""
        self.kind = None
        self._seen.clear()

    def see(self, name: str) -> int:
        """Note the call of a layer; return its number."""
        layer = self._layer_of[name]
        self._seen.add(layer)
        return layer

    def end(self) -> None:
        """End a step."""
        if self.kind is not None and len(self._seen) == self._num_layers:
            self._trusted.add(self.kind)
