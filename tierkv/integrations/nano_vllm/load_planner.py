"""Loads of blocks that the store has and nano-vLLM has not, planned before the engine is promised anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tierkv.block_store.load_or_compute import LoadOrCompute, reading_s
from tierkv.block_store.misses import log_recomputed
from tierkv.block_store.placement import Strided
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.store import BlockStore
from tierkv.block_store.transfers import Load
from tierkv.integrations.nano_vllm.keys import SequenceKeys
from tierkv.movers.engine_memory import LEFT_OUT, EngineMemory

__all__ = ["LoadPlanner"]

_POLL_S = 0.002


@dataclass(slots=True)
class _Plan:
    """What the store has for a waiting sequence, from its block `first` on. num_warm: ready when it was reserved."""

    first: int
    reservation: Reservation
    num_warm: int
    started_s: float
    is_recorded: bool = False


class LoadPlanner:
    """Decides for each waiting sequence how many blocks are loaded, and loads them. Used by the engine's thread only.

    Blocks in warm memory are always loaded. Cold ones are loaded if that took less time than computing in earlier
    requests; and while they are read, the rest of the wait is compared with computing the rest.
    """

    def __init__(
        self,
        store: BlockStore,
        memory: EngineMemory,
        keys: SequenceKeys,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._memory = memory
        self._keys = keys
        self._clock = clock
        self._block_size = store.block_size
        self._choice = LoadOrCompute(block_size=store.block_size)
        store.keep_costs(self._choice)
        store.wait_for_costs()
        self._plans: dict[int, _Plan] = {}
        self._has_waited = False

    def record_compute(self, num_tokens: int, seconds: float) -> None:
        """Record a prefill step in which nothing was loaded; one that waited for blocks in vain does not count."""
        has_waited, self._has_waited = self._has_waited, False
        if has_waited:
            return
        self._choice.record_compute(num_tokens, seconds)

    def is_reading(self, seq: Any) -> bool:
        """Return whether blocks of a sequence are being read from the disk, and are still worth waiting for."""
        plan = self._plans.get(seq.seq_id)
        return plan is not None and self._is_worth_waiting(plan)

    def promise(self, seq: Any, num_own: int, *, may_wait: bool) -> int | None:
        """Return how many leading blocks of a sequence need not be computed, `num_own` or more.

        num_own: leading blocks that the engine has. The last block of a sequence is always computed. may_wait: wait
        here for blocks that are being read; if not, return None for "ask again later".
        """
        plan = self._plans.get(seq.seq_id)
        if plan is not None and plan.first > num_own:  # the engine has evicted blocks since
            self.forget(seq)
            plan = None
        if plan is None:
            plan = self._plan(seq, num_own)
        while may_wait and self._is_worth_waiting(plan):
            self._has_waited = True
            plan.reservation.wait(_POLL_S)
        if self._is_worth_waiting(plan):
            return None
        self._record_load(plan)
        reservation = plan.reservation
        # What the warm memory has no room for is read during the load, which blocks the engine: only if it is idle.
        if reservation.num_ready < reservation.num_blocks and (reservation.is_reading or not may_wait):
            reservation.cut(reservation.num_ready)
        promised = max(num_own, plan.first + reservation.num_blocks)
        if promised == num_own:
            self.forget(seq)
        return promised

    def load(self, seq: Any, num_own: int, promised: int) -> tuple[Load, list[int]]:
        """Start to copy what was promised into the sequence's blocks, after the work on the current stream.

        Return the load and the engine's blocks in its order, LEFT_OUT for those that the engine has.
        """
        plan = self._plans.pop(seq.seq_id)
        block_ids = [LEFT_OUT] * (num_own - plan.first) + seq.block_table[num_own:promised]
        plan.reservation.cut(len(block_ids))
        return self._store.load(plan.reservation, Strided(self._memory, [[each] for each in block_ids])), block_ids

    def forget(self, seq: Any) -> None:
        """Release what is held for a sequence."""
        plan = self._plans.pop(seq.seq_id, None)
        if plan is not None:
            plan.reservation.release()

    def close(self) -> None:
        """Release everything."""
        for plan in self._plans.values():
            plan.reservation.release()
        self._plans.clear()

    def _plan(self, seq: Any, num_own: int) -> _Plan:
        num_whole = seq.num_blocks - 1
        started_s = self._clock()
        reservation = self._store.reserve(self._keys.of(seq, num_whole), start=num_own)
        num_warm = reservation.num_ready
        num_cold = reservation.num_blocks - num_warm
        num_rest = seq.num_tokens - (num_own + reservation.num_blocks) * self._block_size
        if num_cold and not self._choice.worth_loading(num_cold, origin=reservation.origin, num_rest_tokens=num_rest):
            log_recomputed(num_cold)
            reservation.cut(num_warm)
        plan = self._plans[seq.seq_id] = _Plan(num_own, reservation, num_warm, started_s)
        return plan

    def _is_worth_waiting(self, plan: _Plan) -> bool:
        reservation = plan.reservation
        if not reservation.is_reading:
            return False
        num_ready = reservation.num_ready
        num_left = reservation.num_blocks - num_ready
        num_read = num_ready - plan.num_warm
        return self._choice.worth_waiting(
            num_left,
            num_read=num_read,
            num_at_once=reservation.num_at_once,
            waited_s=self._clock() - plan.started_s,
        )

    def _record_load(self, plan: _Plan) -> None:
        """Record how long the cold blocks took; of a load that was cut short, how long it would have taken."""
        num_cold = plan.reservation.num_blocks - plan.num_warm
        if plan.is_recorded or num_cold <= 0:
            return
        plan.is_recorded = True
        num_read = plan.reservation.num_ready - plan.num_warm
        seconds = reading_s(
            num_cold,
            num_read=num_read,
            num_at_once=plan.reservation.num_at_once,
            waited_s=self._clock() - plan.started_s,
        )
        self._choice.record_load(num_cold, origin=plan.reservation.origin, seconds=seconds)
