"""Engines: the memories that engines have registered, and the pools of warm slots that they copy to and from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tierkv.errors import StoreError
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout

if TYPE_CHECKING:
    import torch

    from tierkv.movers.engine_memory import EngineMemory, LockedSlots

__all__ = ["EnginePool", "Engines"]


class Engines:
    """Every registered memory is bound to every open pool. Thread-safe.

    A block store of its own has one pool. One of a daemon gets another pool with each connection, and for a while both
    may be in use. Neither needs torch before an engine registers tensors.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._memories: list[EngineMemory] = []
        self._pools: list[EnginePool] = []

    def register(self, layers: Sequence[Sequence[torch.Tensor]], *, pages_per_block: int) -> EngineMemory:
        """Return an engine's tensors as memory to copy to and from; see `BlockStore.register`."""
        from tierkv.movers.engine_memory import EngineMemory  # needs torch

        memory = EngineMemory(layers, self._layout, pages_per_block=pages_per_block)
        with self._lock:
            try:
                for pool in self._pools:
                    pool.bind(memory)
            except BaseException:
                memory.close()
                raise
            self._memories.append(memory)
        return memory

    def open(self, warm: WarmPool) -> EnginePool:
        """Bind all memories to one more pool. Raises StoreError where CUDA refuses; nothing is bound then."""
        pool = EnginePool(self, warm)
        with self._lock:
            try:
                for memory in self._memories:
                    pool.bind(memory)
            except BaseException:
                self._unbind(pool)
                raise
            self._pools.append(pool)
        return pool

    def close_pool(self, pool: EnginePool) -> None:
        """Unbind a pool from which, and to which, no copy is in flight. May be called twice."""
        with self._lock:
            if pool in self._pools:
                self._pools.remove(pool)
                self._unbind(pool)

    def close(self) -> None:
        """Unbind everything, after all copies have ended. May be called twice."""
        with self._lock:
            pools, self._pools = self._pools, []
            for pool in pools:
                self._unbind(pool)
            for memory in self._memories:
                memory.close()

    def _unbind(self, pool: EnginePool) -> None:
        for memory in self._memories:
            memory.unbind(pool.address)
        pool.unlock()


class EnginePool:
    """One pool of warm slots, as the engines copy to and from it. Close it before the pool."""

    def __init__(self, engines: Engines, warm: WarmPool) -> None:
        self.address: int = warm.address
        self._engines = engines
        self._warm = warm
        self._locked: LockedSlots | None = None

    def bind(self, memory: EngineMemory) -> None:
        """Let a memory be copied to and from this pool. Raises StoreError."""
        from tierkv.movers.engine_memory import LockedSlots  # needs torch, which `memory` has loaded

        self._locked = self._locked or LockedSlots(self._warm)
        memory.bind(self.address, self._locked.on(memory.device))

    def unlock(self) -> None:
        """Undo the page lock, if there is one."""
        if self._locked:
            with contextlib.suppress(StoreError):  # of a device that has failed
                self._locked.close()

    def close(self) -> None:
        """Copy to and from this pool no more; the caller's copies have ended. May be called twice."""
        self._engines.close_pool(self)
