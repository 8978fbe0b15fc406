"""Load and save in progress: what the engine waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from tierkv.block_store.keys import BlockKey
from tierkv.movers.ready import AllReady, Done, Ready

__all__ = ["Load", "Save", "wait_for_any"]

_POLL_S = 0.0005


def wait_for_any(loads: Sequence[Load], timeout_s: float) -> bool:
    """Wait until one of these loads has ended, at most `timeout_s` seconds. Return whether one has.

    The thread sleeps until background work ends, and polls for copies. It holds no lock.
    """
    deadline = time.monotonic() + timeout_s
    while not any(load.is_done() for load in loads):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        working = [load.working for load in loads if load.working and not load.working.done()]
        if len(working) == len(loads):
            wait(working, left_s, FIRST_COMPLETED)
        else:
            time.sleep(min(_POLL_S, left_s))
    return True


class Load:
    """Blocks on their way into the engine's memory. Satisfies `Ready`.

    keys: what was to be loaded. A block that could not be had, and all after it, are `failed_keys`; their places may
    have been written to only with verified bytes. working: what loads in the background, if anything does.
    """

    def __init__(self, keys: Sequence[BlockKey], *, ended: Callable[[], None]) -> None:
        """ended: called once, when no copy reads the store's memory any more."""
        self.keys: Sequence[BlockKey] = keys
        self._parts: list[Ready] = []
        self._num_loaded = 0
        self.working: Future[None] | None = None
        self._ended: Callable[[], None] | None = ended

    @property
    def num_loaded(self) -> int:
        """Leading blocks that have arrived, or are certain to; final once `is_done`."""
        return self._num_loaded

    @property
    def failed_keys(self) -> list[BlockKey]:
        """The blocks that did not come. Waits while cold blocks are still being read."""
        self._wait_for_work()
        return list(self.keys[self._num_loaded :])

    def is_done(self) -> bool:
        """Return whether all bytes have arrived, or never will, without waiting."""
        if self.working is not None and not self.working.done():
            return False
        if not all(part.is_done() for part in self._parts):
            return False
        self._end()
        return True

    def wait(self, layer: int | None = None) -> None:
        """Make the current stream wait for one layer of all blocks, or for all layers.

        Blocks the thread only while cold blocks are still being read.
        """
        self._wait_for_work()
        for part in self._parts:
            part.wait(layer)

    def synchronize(self) -> None:
        """Block the calling thread until all bytes have arrived."""
        self._wait_for_work()
        self.synchronize_parts()
        self._end()

    # for the store

    def synchronize_parts(self) -> None:
        """Block the calling thread until the copies that have begun so far have ended."""
        for part in self._parts:
            part.synchronize()

    def start_working(self, working: Future[None]) -> None:
        """Remember the work that loads in the background."""
        self.working = working

    def add(self, part: Ready, num_blocks: int) -> None:
        """Record copies that have begun, of the next blocks."""
        self._parts.append(part)
        self._num_loaded += num_blocks

    def _wait_for_work(self) -> None:
        if self.working is not None:
            wait([self.working])

    def _end(self) -> None:
        ended, self._ended = self._ended, None
        if ended:
            ended()


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks on their way out of the engine's memory. Satisfies `Ready`.

    num_saved: blocks that were taken over; they are written to the disk in the background afterwards. num_skipped: the
    last blocks that there was no room for. The others were known.
    """

    num_saved: int = 0
    num_skipped: int = 0
    copied: Ready = field(default_factory=Done)

    def is_done(self) -> bool:
        """Return whether the sources may be overwritten."""
        return self.copied.is_done()

    def wait(self, layer: int | None = None) -> None:
        """Make the current stream wait until the sources may be overwritten."""
        self.copied.wait(layer)

    def synchronize(self) -> None:
        """Block the calling thread until the sources may be overwritten."""
        AllReady([self.copied]).synchronize()
