"""Blocks whose bytes are those of their key alone, for tests of block stores."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cold_blocks import damage_record
from daemon_process import Daemon, Start

from tierkv import BlockKey, BlockLayout, BlockStore, BlockStoreConfig, Buffers, ColdStore, Namespace
from tierkv.block_store.own_tiers import OwnTiers

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
SIZE = LAYOUT.block_bytes
NAMESPACE = Namespace(weights="weights", layout=LAYOUT)
NUM_WARM = 64
TOKENS = list(range(100, 100 + 40 * 4))


def config_of(path: Path | None, *, blocks: int = NUM_WARM, **changes: object) -> BlockStoreConfig:
    return BlockStoreConfig(cold_path=path, warm_bytes=blocks * SIZE, **changes)  # type: ignore[arg-type]


def payload(key: BlockKey) -> bytes:
    """Return bytes that are those of this key alone."""
    seed = int.from_bytes(key.content_digest, "little")
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


def save(store: BlockStore, keys: list[BlockKey], start: int = 0) -> int:
    saved = store.save(keys, Buffers([payload(key) for key in keys[start:]]), start=start)
    assert saved.is_done()
    return saved.num_saved


def load(store: BlockStore, keys: list[BlockKey], start: int = 0) -> tuple[int, list[BlockKey]]:
    """Load what there is and compare it. Return how many blocks came, and what failed."""
    reservation = store.reserve(keys, start)
    out = [bytearray(SIZE) for _ in reservation.keys]
    found = store.load(reservation, Buffers(out))
    found.synchronize()
    for key, got in zip(found.keys[: found.num_loaded], out, strict=False):
        assert bytes(got) == payload(key), "another block's bytes"
    for got in out[found.num_loaded :]:
        assert not any(got), "a block that did not come was written to"
    return found.num_loaded, found.failed_keys


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Stores:
    """Opens block stores that share their tiers. blocks: of the warm memory."""

    def __init__(self, path: Path, start: Start | None) -> None:
        self.blocks = NUM_WARM
        self._path = path
        self._start = start
        self._daemon: Daemon | None = None
        self._opened: list[BlockStore] = []

    @property
    def is_daemons(self) -> bool:
        return self._start is not None

    def open(self, namespace: Namespace = NAMESPACE, *, looks_up: bool = False, **options: Any) -> BlockStore:
        if self._start is None:
            config = config_of(self._path / "store", blocks=0 if looks_up else self.blocks)
            cold = next((each.cold for each in self._opened if not each.calls.is_closed), None)
            store = BlockStore(config, namespace=namespace, cold=cold, **options)
        else:
            self._daemon = self._daemon or self._start(slots=self.blocks)
            config = BlockStoreConfig(socket=self._path / "d.sock", warm_bytes=0 if looks_up else 1)
            store = BlockStore(config, namespace=namespace, **options)
        self._opened.append(store)
        return store

    def close(self) -> None:
        """Write everything to the disk, and end."""
        for store in reversed(self._opened):
            if not store.calls.is_closed:
                store.flush()
                store.close()
        self._opened.clear()
        if self._daemon:
            self._daemon.kill()
            self._daemon = None

    def check_nothing_is_held(self) -> None:
        """Fail if a slot of a tier is still held once all calls have ended."""
        for store in self._opened:
            tiers = store._tiers
            if isinstance(tiers, OwnTiers):
                assert tiers.memory
                store.flush()
                with store._changed:
                    assert tiers.memory.index.slots.referenced_count == len(tiers.memory.spare), "a slot is still held"
                    tiers.memory.index.slots.check()
        if self._daemon:
            deadline = time.monotonic() + 10
            while (status := self._daemon.status()).leased_slots or status.reserved_slots:
                held = status.leased_slots, status.reserved_slots
                assert time.monotonic() < deadline, f"leases and reservations: {held}"
                time.sleep(0.02)

    def damage(self, key: BlockKey) -> None:
        """Flip bits of a block's payload in the data file, while all is closed."""
        with ColdStore(self._path / "store") as cold:
            damage_record(cold, key.block_hash, offset=300)
