"""Random requests of three threads in a small warm memory. Copies end late; what stands in for a GPU fails at times."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_engine import LAYOUT, Later, Opened

from tierkv import Buffers, StoreError, Strided
from tierkv.block_store.keys import BlockKey
from tierkv.movers.ready import DONE, AllReady, Ready
from tierkv.storage.codecs import EXPONENT16

THREADS, CHAINS, LENGTH, PATIENCE_S = 3, 5, 6, 60.0
STEPS = {"reserve": 60, "load": 80, "release": 30, "save": 30, "pin": 10, "repair": 40, "clear": 5}


class Late(Later):
    """A copy that is made a little later, or at once for a thread that waits for it."""

    def __init__(self, copy: Callable[[], object]) -> None:
        super().__init__()
        self._copy, self._lock = copy, threading.Lock()
        threading.Timer(0.02 * random.random(), self.synchronize).start()

    def synchronize(self) -> None:
        with self._lock:
            if not self.is_over:
                self._copy()
            self.is_over = True


class LateFrames:
    """Decodes one block after another. Any may fail; those before it lie in their slots then."""

    blocks_at_once = 1

    def __init__(self, opened: Opened, seed: int) -> None:
        self.lock, self._opened, self._rng, copy = threading.Lock(), opened, random.Random(seed), opened.engine.load
        opened.engine.load = lambda *args, **how: Late(lambda: copy(*args, **how))  # type: ignore[method-assign]
        self.repair()

    def repair(self) -> None:
        self._opened.engine._frames = (self._opened.memory.slots.ctypes.data, self)  # type: ignore[assignment]

    def load(self, slots: Any, coded: Any, pages: Any, *, after: Ready, keeps_decoded: bool) -> tuple[Ready, Ready]:
        memory, kept = self._opened.memory.slots, AllReady([])
        after.synchronize()
        with self.lock:
            for slot, block, ids in zip(slots, coded, pages, strict=True):
                if self._rng.random() < 0.1:
                    kept.synchronize()
                    raise StoreError("a frame did not decode")
                out, payload = memory[slot].copy(), memory[slot, : block.payload_bytes].copy()
                EXPONENT16.decode_runs(payload, block.frame_sizes, out, LAYOUT.runs, LAYOUT.block_size)
                for (layer,), part in zip(self._opened.tensors, torch.from_numpy(out).chunk(2), strict=True):
                    layer[list(ids)] = part.view(torch.bfloat16).view(2, *layer.shape[1:])
                if keeps_decoded:
                    kept = AllReady([kept, Late(partial(memory.__setitem__, slot, out))])
        return DONE, kept


def block_of(key: BlockKey) -> bytes:
    """Return the bytes of a block, which follow from its key."""
    generator = torch.Generator().manual_seed(int.from_bytes(key.block_hash[:6], "little"))
    return torch.randn(LAYOUT.block_bytes // 2, generator=generator).bfloat16().view(torch.uint8).numpy().tobytes()


def run(opened: Opened, frames: LateFrames, chains: Sequence[Sequence[BlockKey]], number: int) -> None:
    """Make random requests, as one of the threads; each has its own pages."""
    store, rng, held = opened.store, random.Random(number), list[Any]()
    pages = [[2 * at, 2 * at + 1] for at in range(LENGTH * (number % THREADS), LENGTH * (number % THREADS + 1))]
    for step in [*rng.choices(list(STEPS), list(STEPS.values()), k=40), "release", "release"]:
        keys = rng.choice(chains)[: rng.randint(1, LENGTH)]
        if step == "reserve":
            held.append(store.reserve(keys, rng.randrange(len(keys))))
            assert rng.random() < 0.4 or held[-1].wait(PATIENCE_S)
            held[-1].cut(rng.randint(0, 4 * LENGTH))
        elif step == "load":
            reservation, is_strided = held.pop() if held else store.reserve(keys), rng.random() < 0.7
            out = [torch.zeros(LAYOUT.block_bytes, dtype=torch.uint8) for _ in range(reservation.num_blocks)]
            load = store.load(reservation, Strided(opened.engine, pages[: len(out)]) if is_strided else Buffers(out))
            load.synchronize()
            for key, ids, got in zip(load.keys[: load.num_loaded], pages, out, strict=False):
                if is_strided:
                    got.copy_(torch.cat([layer[ids].flatten() for (layer,) in opened.tensors]).view(torch.uint8))
                assert got.numpy().tobytes() == block_of(key)
        elif step == "save":
            store.save(keys, Buffers([block_of(key) for key in keys]))
        elif step == "pin":
            store.pin(keys, ttl_s=0.005)
        elif step == "repair":
            frames.repair()
        elif step == "clear":
            with frames.lock:
                store.clear()
        if held and (step == "release" or len(held) > 2):
            held.pop(0).release()


@pytest.mark.parametrize("seed", range(8))
def test_random_requests_get_their_blocks_and_leave_no_slot_held(tmp_path: Path, seed: int) -> None:
    opened = Opened(tmp_path, warm_blocks=(12, 16, 24)[seed % 3])
    chains = [opened.store.keys([each, *range(LENGTH * LAYOUT.block_size)])[:LENGTH] for each in range(CHAINS)]
    for chain in chains:
        opened.store.save(chain, Buffers([block_of(key) for key in chain]))
        opened.store.flush()
    frames, memory = LateFrames(opened, seed), opened.memory
    numbers = range(THREADS * seed, THREADS * (seed + 1))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(partial(run, opened, frames, chains), numbers, timeout=PATIENCE_S))
    deadline = time.monotonic() + PATIENCE_S
    while opened.num_held() and time.monotonic() < deadline:  # by readers and copies that no request waits for
        time.sleep(0.001)
    with opened.store._changed:
        assert memory.index.slots.referenced_count == len(memory.spare)
        assert not any(memory.index.slots.reference_count(slot) for slot in memory.coded.keys() - set(memory.spare))
        memory.index.slots.check()
    opened.store.close()
