"""How the scheduler side finds blocks, and how it does so in the store of a worker in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tierkv.block_store.keys import BlockKey, BlockKeys
from tierkv.block_store.load_or_compute import Origin, reading_s
from tierkv.block_store.misses import log_recomputed
from tierkv.block_store.reservation import Reservation
from tierkv.integrations.vllm.plan import SaveOrder, WorkerReport
from tierkv.integrations.vllm.session import Reserved, Session
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.step_times import SyncLoad

__all__ = ["Finder", "Found", "LocalFinder"]

_MOST_READING = 4
_MOST_WAIT_S = 30.0
_IDLE_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class Found:
    """Blocks that can be loaded, from the asked one on. is_async: they load while the request waits."""

    num_blocks: int
    is_async: bool


_NOTHING = Found(0, False)


class Finder(Protocol):
    """Finds the blocks of waiting requests."""

    block_size: int

    def find(
        self, request_id: str, tokens: Sequence[int], first: int, end: int, *, is_idle: bool = False
    ) -> Found | None:
        """Return which of the blocks [first, end) of a request there are; None: ask again in the next step.

        is_idle: the engine has nothing else to do; then this may wait a moment. An engine that asks again at once would
        keep Python from the threads that read.
        """

    def keep(self, request_id: str) -> SyncLoad | None:
        """Hold what was found until the worker loads it. Return what it costs so far, where this process loads it."""

    def drop(self, request_id: str) -> None:
        """Hold nothing for a request that is not loaded."""

    def saving(self, request_id: str, tokens: Sequence[int], order: SaveOrder) -> None:
        """Note that the workers are ordered to save blocks of a request."""

    def update(self, report: WorkerReport) -> None:
        """Note what the workers report after a step."""

    def loaded(self, request_id: str) -> None:
        """Note that the async load of a request has ended."""

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""

    def renew(self, salt: str) -> None:
        """Find blocks of the namespace with this salt from now on."""

    def close(self) -> None:
        """Release everything."""


@dataclass(slots=True)
class _Held:
    """A reservation of blocks from `first` on. num_warm: leading blocks that needed no reading.

    read_s: how long reading took; None while it is going on.
    """

    reservation: Reservation
    first: int
    since: float
    num_warm: int
    read_s: float | None = None


class LocalFinder:
    """Finds blocks in the session's store and reserves them: what is announced is certain, unless it is async.

    Async are only blocks that do not fit into the half of the warm memory that one reservation may hold.
    """

    def __init__(
        self, session: Session, statistics: Statistics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._session = session
        self._statistics = statistics
        self._clock = clock
        self._keys: dict[str, BlockKeys] = {}
        self._held: dict[str, _Held] = {}
        self.block_size: int = session.store.block_size

    def find(
        self, request_id: str, tokens: Sequence[int], first: int, end: int, *, is_idle: bool = False
    ) -> Found | None:
        held = self._held.get(request_id)
        if held and (held.first != first or held.first + held.reservation.num_blocks > end):
            self.drop(request_id)
            held = None
        if not held:
            keys = self._keys_of(request_id, tokens, end)
            if sum(each.reservation.is_reading for each in self._held.values()) >= _MOST_READING:
                return None if self._session.store.contains(keys[first : first + 1]) else _NOTHING
            held = self._reserve(request_id, keys[:end], first, len(tokens))
        if not held:
            return _NOTHING
        reservation = held.reservation
        if is_idle:
            reservation.wait(_IDLE_WAIT_S)
        if reservation.is_reading:
            if self._is_worth_waiting(held):
                return None
            reservation.cut(reservation.num_ready)
        if held.read_s is None:
            held.read_s = 0.0 if reservation.origin is Origin.WARM else self._clock() - held.since
        if not reservation.num_blocks:
            self.drop(request_id)
            return _NOTHING
        return Found(reservation.num_blocks, is_async=not reservation.is_ready)

    def _is_worth_waiting(self, held: _Held) -> bool:
        """Return whether the blocks that are still being read come sooner than the engine could compute them.

        If not, what the wait would have taken is recorded.
        """
        waited_s, costs = self._clock() - held.since, self._session.costs
        num_ready, num_blocks = held.reservation.num_ready, held.reservation.num_blocks
        num_read = num_ready - held.num_warm
        if waited_s >= _MOST_WAIT_S:
            return False
        if not self._session.options.compute_or_load:
            return True
        seen = {"num_read": num_read, "num_at_once": held.reservation.num_at_once}
        if costs.worth_waiting(num_blocks - num_ready, waited_s=waited_s, **seen):
            return True
        num_cold = num_blocks - held.num_warm
        seconds = reading_s(num_cold, waited_s=waited_s, **seen)
        costs.record_load(num_cold, origin=held.reservation.origin, seconds=seconds)
        self._statistics.add("computed_instead_tokens", (num_blocks - num_ready) * self.block_size)
        log_recomputed(num_blocks - num_ready)
        return False

    def _keys_of(self, request_id: str, tokens: Sequence[int], end: int) -> BlockKeys:
        keys = self._keys.get(request_id)
        if keys is None:
            keys = self._keys[request_id] = self._session.store.keys()
        keys.extend(tokens[keys.num_tokens : end * self.block_size])
        return keys

    def _reserve(self, request_id: str, keys: Sequence[BlockKey], first: int, num_tokens: int) -> _Held | None:
        since = self._clock()
        reservation = self._session.store.reserve(keys, first)
        num_warm = reservation.num_ready
        if reservation.num_blocks and self._session.options.compute_or_load:
            num_blocks = reservation.num_blocks
            worth = self._session.costs.worth_loading(
                num_blocks,
                origin=reservation.origin,
                num_rest_tokens=max(1, num_tokens - (first + num_blocks) * self.block_size),
            )
            self._statistics.add("computed_instead_tokens", (num_blocks - worth) * self.block_size)
            log_recomputed(num_blocks - worth)
            reservation.cut(worth)
        if not reservation.num_blocks:
            reservation.release()
            return None
        held = self._held[request_id] = _Held(reservation, first, since, num_warm)
        return held

    def keep(self, request_id: str) -> SyncLoad | None:
        held = self._held.pop(request_id)
        read_s = held.read_s or 0.0
        self._session.reserved[request_id] = Reserved(held.reservation, read_s, held.reservation.origin)
        return SyncLoad(held.reservation.num_blocks, held.reservation.origin, read_s)

    def drop(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held:
            held.reservation.release()

    def saving(self, request_id: str, tokens: Sequence[int], order: SaveOrder) -> None:
        pass  # the store has what is saved at once

    def update(self, report: WorkerReport) -> None:
        pass

    def loaded(self, request_id: str) -> None:
        pass  # the worker side measures it

    def forget(self, request_id: str) -> None:
        self.drop(request_id)
        self._keys.pop(request_id, None)
        reserved = self._session.take(request_id)
        if reserved:
            reserved.reservation.release()

    def renew(self, salt: str) -> None:
        self.close()
        if self._session.renew_now:
            self._session.renew_now(salt)

    def close(self) -> None:
        for request_id in list(self._held):
            self.drop(request_id)
        self._keys.clear()
