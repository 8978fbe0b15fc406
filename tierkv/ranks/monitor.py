"""RankMonitor: a rank that fails in a step, or goes, must not leave the others in a collective for ever.

A collective has no way out but its group's own limit, which is ten minutes: gloo's cannot be interrupted at all, and
NCCL's leave the device unusable. So a rank that fails says so in the ranks' store. A thread on every other rank reads
that, notifies the readers of its requests, and ends its own process if the step has not ended a few seconds later.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from tierkv.errors import RankError

__all__ = ["MonitoredRanks", "RankMonitor", "open_monitor"]

_log = logging.getLogger(__name__)
_POLL_S = 1.0
_GRACE_S = 10.0
_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


@runtime_checkable
class MonitoredRanks(Protocol):
    """Ranks that can say that one of them has failed."""

    rank: int

    def begin_session(self) -> None:
        """Forget failures of before. All ranks call this together, when they open a model."""

    def fail(self, reason: str) -> None:
        """Let the other ranks know that this one has failed. Raises nothing."""

    def failure(self, *, silent_s: float) -> str | None:
        """Say that this rank lives, and return which rank has failed and why; None if all are well.

        silent_s: a rank that has not called this for so long, or the store's rank if it cannot be reached, has gone.
        """


class RankMonitor:
    """Observes the steps of one rank. Context manager; its thread ends with it.

    on_failure: notifies the readers of requests, from the monitor's thread, while a step may be under way. grace_s: how
    long a step may go on after another rank has failed; then the process ends by `end`. silent_s: how long a rank may
    give no sign of life while this one is in a step.
    """

    def __init__(
        self,
        ranks: MonitoredRanks,
        *,
        silent_s: float,
        grace_s: float = _GRACE_S,
        poll_s: float = _POLL_S,
        end: Callable[[], None] | None = None,
    ) -> None:
        self.on_failure: Callable[[RankError], None] = lambda _: None
        self._ranks = ranks
        self._silent_s = silent_s
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._end = end or _end_process
        self._failure: str | None = None
        self._depth = 0  # steps within steps: of the thread that computes
        self._num_steps = 0
        self._is_closed = threading.Event()
        ranks.begin_session()
        self._thread = threading.Thread(target=self._run, name="tierkv-rank-monitor", daemon=True)
        self._thread.start()

    def __enter__(self) -> RankMonitor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._is_closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._poll_s + 5)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let the others know if the block raises, and raise RankError in its place if another rank failed before."""
        self._depth += 1
        self._num_steps += 1
        try:
            yield
        except BaseException as exc:
            found = self._failure or self._look()
            if found is None:
                self._ranks.fail(f"{type(exc).__name__}: {exc}")
                raise
            if isinstance(exc, RankError):
                raise
            raise RankError(f"another rank has failed: {found}") from exc
        finally:
            self._depth -= 1

    def _look(self) -> str | None:
        found = self._ranks.failure(silent_s=self._silent_s)
        self._failure = self._failure or found
        return found

    def _run(self) -> None:
        while not self._is_closed.wait(self._poll_s):
            found = self._ranks.failure(silent_s=self._silent_s)
            step = self._num_steps
            if found is None or not self._depth:
                continue  # between steps the next call of the ranks finds it out
            self._failure = found
            _log.error("rank %d: another rank has failed: %s", self._ranks.rank, found)
            self.on_failure(RankError(f"another rank has failed: {found}"))
            deadline = time.monotonic() + self._grace_s
            while self._depth and self._num_steps == step and time.monotonic() < deadline:
                if self._is_closed.wait(min(self._poll_s, 0.1)):
                    return
            if self._depth and self._num_steps == step:
                _log.critical("rank %d waits for a rank that has failed, and ends: %s", self._ranks.rank, found)
                self._end()
            return


def _end_process() -> None:
    os._exit(_EXIT_CODE)  # no thread can be asked: one is in a collective that does not return


@contextmanager
def open_monitor(ranks: object, *, silent_s: float = 60.0) -> Iterator[RankMonitor | None]:
    """Monitor the steps of a rank inside the block, its opening too; None where there is nothing to monitor."""
    if not isinstance(ranks, MonitoredRanks) or getattr(ranks, "size", 1) == 1:
        yield None
        return
    with RankMonitor(ranks, silent_s=silent_s) as monitor:
        yield monitor
