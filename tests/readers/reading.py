"""A store with blocks that reader processes decode, and shared memory for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.readers.pool import ReaderPool
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

LAYOUT = BlockLayout.uniform(num_layers=4, block_size=256, kv_heads=8, head_dim=128, dtype="bfloat16")  # 4 MiB
NAMESPACE = Namespace(weights="w", layout=LAYOUT, name="model")
NUM_SLOTS = 4


def block_of(seed: int, layout: BlockLayout = LAYOUT) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(layout.block_bytes // 4).astype(np.float32)
    if layout.dtype == "bfloat16":
        values = np.repeat((values.view(np.uint32) >> 16).astype("<u2"), 2)
    elif layout.dtype == "float16":
        values = np.repeat(values.astype("<f2"), 2)
    return values.view(np.uint8)[: layout.block_bytes]


def chain(
    length: int, *, layout: BlockLayout = LAYOUT, namespace: Namespace = NAMESPACE, codec: str = "exponent16"
) -> list[EncodedRecord]:
    records: list[EncodedRecord] = []
    info: BlockInfo | None = None
    for number in range(length):
        token_bytes = np.full(layout.block_size, number, dtype="<u4").tobytes()
        info = info.next(token_bytes) if info else BlockInfo.first(token_bytes, namespace=namespace.digest)
        records.append(encode_record(info, block_of(number, layout), layout=layout, codec=codec_by_name(codec)))
    return records


def open_large(path: Path, **options: Any) -> ColdStore:
    return ColdStore(path / "cold", **{"quota_bytes": 512 << 20, "min_free_bytes": 0, **options})


def eventually(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def open_pool(
    *, processes: int = 2, layout: BlockLayout = LAYOUT, wait: bool = True, **options: Any
) -> Iterator[tuple[ReaderPool, WarmPool]]:
    """Open shared slots, and a pool whose processes are ready."""
    warm = WarmPool(layout.block_bytes, NUM_SLOTS)
    assert warm.fd is not None
    pool = ReaderPool(
        warm.fd,
        address=warm.address,
        memory_bytes=warm.slab_bytes,
        num_processes=processes,
        num_in_process=2,
        **options,
    )
    try:
        pool.start()
        if wait:
            eventually(lambda: pool.stats().ready == processes)
        yield pool, warm
    finally:
        pool.close()
        warm.close()


def is_alive(pid: int) -> bool:
    """Return whether a process is there, a zombie among them."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def descriptors() -> set[str]:
    return {
        f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
