"""What loading takes in workers that are other processes, read from the files that they keep beside their store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tierkv.block_store.cost_file import restore_costs
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin

__all__ = ["WorkerCosts"]

_LOOK_S = 0.25  # how often the files are looked at, at most


class WorkerCosts:
    """The costs of one engine's workers. A worker writes its file as soon as it has measured its disk.

    Before the first request vLLM takes no step, so no report of a worker could come sooner. Files are a hint: without
    them, requests measure. paths: of each rank's file. block_size: tokens of a block.
    """

    def __init__(self, paths: Sequence[Path], *, block_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = [_File(path, block_size) for path in paths]
        self._clock = clock
        self._next_look = clock()

    def slowest(self, origin: Origin) -> list[tuple[int, float]]:
        """Return (blocks, seconds) of loads from an origin by the slowest rank, which a load of all ranks waits for.

        There are none until every rank has measured some: one that is still measuring may be the slowest. The files are
        read again if they have changed.
        """
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            for file in self._files:
                file.refresh()
        measured = [file.costs.measured().get(origin.name, []) for file in self._files]
        if not all(measured):
            return []
        sizes = sorted({size for points in measured for size, _ in points})
        return [(size, max(file.load_s(size, origin) for file in self._files)) for size in sizes]


class _File:
    """One worker's file. costs: what it says."""

    def __init__(self, path: Path, block_size: int) -> None:
        self._path = path
        self._block_size = block_size
        self._seen: tuple[int, int, int] | None = None
        self.costs = LoadOrCompute(block_size=block_size)

    def refresh(self) -> None:
        """Read the file again if it is another one, or was written to, since it was read."""
        try:
            state = os.lstat(self._path)
        except OSError:
            return
        seen = state.st_ino, state.st_mtime_ns, state.st_size
        if seen != self._seen:
            self._seen = seen
            self.costs = LoadOrCompute(block_size=self._block_size)
            restore_costs(self._path, self.costs)

    def load_s(self, num_blocks: int, origin: Origin) -> float:
        """Return the seconds of a load. The file says something about that origin."""
        seconds = self.costs.load_s(num_blocks, origin=origin)
        assert seconds is not None
        return seconds
