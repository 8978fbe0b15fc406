"""A block store whose engine has a stand-in for a GPU that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace, StoreError, Strided
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.warm_memory import WarmMemory
from tierkv.movers.engine_memory import EngineMemory
from tierkv.movers.ready import DONE, Ready
from tierkv.storage.codecs import EXPONENT16
from tierkv.storage.coded import CodedBlock

__all__ = ["LAYOUT", "FakeFrames", "Later", "Opened"]

TOKENS, PAGES = 16, 40
LAYOUT = BlockLayout.uniform(num_layers=2, block_size=2 * TOKENS, kv_heads=2, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(weights="w", layout=LAYOUT)


class Later:
    """A copy that ends when the test says so."""

    def __init__(self) -> None:
        self.is_over = False

    def is_done(self) -> bool:
        return self.is_over

    def wait(self, layer: int | None = None) -> None:
        assert self.is_over, "bytes that are not there are about to be read"

    def synchronize(self) -> None:
        self.is_over = True


class FakeFrames:
    """Decodes as EngineFrames does. kept_later: the slots are only written to by `write`."""

    def __init__(self, engine: EngineMemory, memory: WarmMemory, *, blocks_at_once: int = 4) -> None:
        self.blocks_at_once = blocks_at_once
        self.num_decoded = 0
        self.fails = False
        self.kept_later = False
        self.kept: list[tuple[Later, Callable[[], None]]] = []
        self._engine, self._memory = engine, memory

    def load(
        self,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        pages: Sequence[Sequence[int]],
        *,
        after: Ready,
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        if self.fails:
            raise StoreError("2 frames did not decode")
        after.synchronize()
        memory = self._memory
        for slot, block, ids in zip(slots, coded, pages, strict=True):
            payload = memory.slots[slot].copy()
            decoded = memory.slots[slot].copy()
            EXPONENT16.decode_runs(
                payload[: block.payload_bytes], block.frame_sizes, decoded, LAYOUT.runs, LAYOUT.block_size
            )
            memory.slots[slot][:] = decoded
            self._engine.load([slot], [ids], memory.slots, after=[])
            if not keeps_decoded:
                memory.slots[slot][:] = payload
            elif self.kept_later:
                memory.slots[slot][:] = payload
                self.kept.append(
                    (Later(), lambda slot=slot, decoded=decoded: memory.slots[slot].__setitem__(..., decoded))
                )  # type: ignore[misc]
            self.num_decoded += 1
        return DONE, self.kept[-1][0] if self.kept else DONE

    def write(self) -> None:
        for later, write in self.kept:
            write()
            later.is_over = True


class Opened:
    """A store on the same files, with an engine of its own whose "GPU" decodes."""

    def __init__(self, path: Path, *, warm_blocks: int = 64, decodes: bool = True) -> None:
        config = BlockStoreConfig(cold_path=path, warm_bytes=warm_blocks * LAYOUT.block_bytes, min_free_bytes=0)
        self.store = BlockStore(config, namespace=NAMESPACE)
        self.memory: WarmMemory = self.store._tiers.memory  # type: ignore[attr-defined]
        self.tensors = [[torch.zeros(PAGES, TOKENS, 2, 2, 64).bfloat16()] for _ in range(2)]
        self.engine = self.store.register(self.tensors, pages_per_block=2)
        self.frames = FakeFrames(self.engine, self.memory)
        if decodes:
            self.engine._frames = (self.memory.slots.ctypes.data, self.frames)  # type: ignore[assignment]
            self.memory.decoding = self.engine

    def load(self, keys: Sequence[BlockKey]) -> int:
        """Load blocks into pages 0, 1, 2, ...; return how many came."""
        reservation = self.store.reserve(keys)
        reservation.wait()
        load = self.store.load(reservation, Strided(self.engine, [[2 * at, 2 * at + 1] for at in range(len(keys))]))
        load.synchronize()
        return load.num_loaded

    def pages(self) -> list[torch.Tensor]:
        return [layer[0].clone() for layer in self.tensors]

    def num_held(self) -> int:
        with self.store._changed:
            self.memory.reap()
            return self.memory.index.slots.referenced_count - len(self.memory.spare)
