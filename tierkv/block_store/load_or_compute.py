"""Load or compute: decides from what both took in earlier requests, before anything is promised to the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

from tierkv.errors import ConfigError
from tierkv.transfer.recompute_or_load import CostBySize
from tierkv.values.checks import check_count, check_seconds
from tierkv.values.locks import OwnedLock

__all__ = ["LoadOrCompute", "Origin", "reading_s"]


_ROUNDS = 3
_ENOUGH_SHARE = 0.25


class Origin(IntEnum):
    """Where the blocks of a load lie: in the warm memory, the system's page cache, on a disk, in a remote tier.

    The slowest counts.
    """

    WARM = 0
    PAGE_CACHE = 1
    DISK = 2
    REMOTE = 3


def reading_s(num_blocks: int, *, num_read: int, num_at_once: int, waited_s: float) -> float:
    """Return how long reading so many blocks takes in all, judged by the `num_read` that came in `waited_s` seconds.

    num_at_once: blocks that are read side by side, whose first come together. Until they are there, reading is expected
    to take three times as long as so far at least: so no request waits longer than half of what computing takes. Once a
    part of them is there they may come one after another, and the better expectation counts.
    """
    if num_read >= num_blocks:
        return waited_s
    num_first = min(num_at_once, num_blocks)
    together_s = max(waited_s * num_blocks / num_first, _ROUNDS * waited_s)
    if num_read < num_first * _ENOUGH_SHARE:
        return together_s
    by_pace_s = waited_s * num_blocks / max(1, num_read)
    return by_pace_s if num_read >= num_first else min(together_s, by_pace_s)


class LoadOrCompute:
    """What loading and computing blocks took in one engine, and the choice that follows. Thread-safe.

    Until both are measured, blocks are loaded. The estimate of the way that is not chosen falls a little each time,
    until that way is tried again: a disk may be faster today. block_size: tokens of a block.

    >>> choice = LoadOrCompute(block_size=256)
    >>> choice.record_compute(8192, seconds=0.1)
    >>> choice.record_load(32, origin=Origin.DISK, seconds=0.4)
    >>> choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32)
    0
    """

    def __init__(self, *, block_size: int) -> None:
        self._block_size = check_count("block_size", block_size, least=1)
        self._lock = OwnedLock()
        self._computing = CostBySize(is_pass=True)
        self._least_tokens = 1 << 62  # of what was measured
        self._loading: defaultdict[Origin, CostBySize] = defaultdict(CostBySize)
        self._observers: list[Callable[[], None]] = []

    def record_compute(self, num_tokens: int, seconds: float) -> None:
        """Record how long the engine took for so many new tokens, none of them loaded."""
        num_tokens, seconds = check_count("num_tokens", num_tokens), check_seconds("seconds", seconds)
        self._record([(None, num_tokens, seconds)])

    def record_load(self, num_blocks: int, *, origin: Origin, seconds: float) -> None:
        """Record how long so many blocks took from the request until they lay in the engine's memory."""
        self.record_loads([(num_blocks, seconds)], origin=origin)

    def record_loads(self, loads: Iterable[tuple[int, float]], *, origin: Origin) -> None:
        """Record (blocks, seconds) of several loads at once: no other thread sees some of them only."""
        self._record(
            [(origin, check_count("num_blocks", count), check_seconds("seconds", took)) for count, took in loads]
        )

    def observe(self, observer: Callable[[], None]) -> None:
        """Have `observer` called after the first works of a kind were recorded, computing or loads from one origin.

        It is called by the recording thread, and must return at once.
        """
        self._observers.append(observer)

    def measured(self) -> dict[str, list[tuple[int, float]]]:
        """Return what was measured, for `restore` in another process: (size, seconds) of each kind of work."""
        with self._lock:
            kinds = {"compute": self._computing, **{origin.name: costs for origin, costs in self._loading.items()}}
            return {kind: costs.points() for kind, costs in kinds.items()}

    def restore(self, measured: Any) -> None:
        """Record what another process measured. Raises ConfigError, nothing recorded, for what `measured` is not."""
        names = {"compute", *Origin.__members__}
        if not isinstance(measured, dict) or not measured.keys() <= names:
            raise ConfigError("costs are lists of works by their kind")
        works: list[tuple[Origin | None, int, float]] = []
        for kind, points in measured.items():
            origin = None if kind == "compute" else Origin[kind]
            for point in points if isinstance(points, list) else [None]:
                if not isinstance(point, list | tuple) or len(point) != 2:
                    raise ConfigError("a cost is a size and its seconds")
                works.append((origin, check_count("size", point[0], least=1), check_seconds("seconds", point[1])))
        self._record(works)

    def compute_s(self, num_tokens: int) -> float | None:
        """Return the seconds that so many new tokens take; None before anything was measured."""
        with self._lock:
            return self._estimate(num_tokens)

    def load_s(self, num_blocks: int, *, origin: Origin) -> float | None:
        """Return the seconds that so many blocks take to load; None before anything was measured."""
        with self._lock:
            return self._loading[origin].estimate(num_blocks)

    def worth_loading(self, num_blocks: int, *, origin: Origin, num_rest_tokens: int) -> int:
        """Return how many of so many leading blocks are worth loading: all of them, or none.

        num_rest_tokens: tokens behind them that are computed in any case.
        """
        if num_blocks <= 0:
            return 0
        with self._lock:
            loads = self._loading[origin]
            rest_s = self._estimate(num_rest_tokens)
            computing_s = self._estimate(num_blocks * self._block_size + num_rest_tokens)
            loading_s = loads.estimate(num_blocks)
            if rest_s is None or computing_s is None or loading_s is None:
                return num_blocks
            if loading_s + rest_s <= computing_s:
                return num_blocks
            loads.forget(num_blocks)
            return 0

    def worth_waiting(self, num_left: int, *, num_read: int, num_at_once: int, waited_s: float) -> bool:
        """Return whether blocks that are being read are worth waiting for, rather than computing them.

        num_left: blocks that are not there yet. num_read: those that were read in `waited_s` seconds. num_at_once: see
        `reading_s`, which says how long all are expected to take.
        """
        if num_left <= 0:
            return False
        computing_s = self.compute_s(num_left * self._block_size)
        if computing_s is None:
            return True
        taking_s = reading_s(num_left + num_read, num_read=num_read, num_at_once=num_at_once, waited_s=waited_s)
        return taking_s - waited_s < computing_s

    def _record(self, works: Iterable[tuple[Origin | None, int, float]]) -> None:
        """Record works: loads from an origin, or computations for None."""
        is_new = False
        with self._lock:
            for origin, size, seconds in works:
                costs = self._computing if origin is None else self._loading[origin]
                is_new = is_new or not costs.is_measured
                costs.add(size, seconds)
                if origin is None:
                    self._least_tokens = min(size or self._least_tokens, self._least_tokens)
        for observer in self._observers if is_new else ():
            observer()

    def _estimate(self, num_tokens: int) -> float | None:
        """Return the seconds of a pass. One that is smaller than all measured ones costs less than they, in proportion:
        else an engine that has computed long prompts only would never load.
        """
        seconds = self._computing.estimate(num_tokens)
        if seconds is None or num_tokens >= self._least_tokens:
            return seconds
        return seconds * num_tokens / self._least_tokens
