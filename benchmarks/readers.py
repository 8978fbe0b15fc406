"""Cold blocks out of the page cache into shared memory: decoded by threads, and by reader processes.

All ways read the same records of one store, whose bits are those of normal numbers, and each has a thread for every
block in work. GB/s are of decoded blocks, the median of some rounds; each round has all ways, one after another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tierkv.readers.pool import ReaderPool
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import BlockInfo, encode_record
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["main"]

_SLOTS_BYTES = 1 << 30
_PUT_AT_ONCE = 16
_START_S = 120


def main() -> None:
    """Measure each number of threads and of processes, and print a line for each."""
    cores = os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 8, 12, 16) if count <= max(2, cores)]
    parser = argparse.ArgumentParser(prog="benchmarks.readers", description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="of a block of an 8B model: 128 KiB each")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--codec", default="exponent16")
    parser.add_argument("--threads", type=int, nargs="*", default=counts)
    parser.add_argument("--processes", type=int, nargs="*", default=counts)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layout = BlockLayout.uniform(num_layers=32, block_size=arguments.tokens, kv_heads=8, head_dim=128, dtype="bfloat16")
    print(f"{cores} cores, {arguments.blocks} blocks of {layout.block_bytes >> 20} MiB, codec {arguments.codec}")
    with tempfile.TemporaryDirectory(prefix="tierkv-") as folder, _open_store(Path(folder), layout) as store:
        infos = _fill(store, layout, arguments.blocks, arguments.codec)
        _measure(store, layout, infos, arguments.threads, arguments.processes, arguments.rounds)


def _measure(
    store: ColdStore,
    layout: BlockLayout,
    infos: Sequence[BlockInfo],
    threads: Sequence[int],
    processes: Sequence[int],
    rounds: int,
) -> None:
    warm = WarmPool(layout.block_bytes, max(32, min(len(infos), _SLOTS_BYTES // layout.block_bytes)))
    pools: dict[int, ReaderPool] = {}
    try:
        for count in processes:
            pools[count] = _start(warm, count)
        ways: list[tuple[str, int, ReaderPool | None]] = [("threads", count, None) for count in threads]
        ways += [("processes", count, pool) for count, pool in pools.items()]
        speeds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, count, pool in ways:
                begun = 0 if pool is None else pool.stats().blocks
                speed = _read_all(store, layout, infos, warm, count, pool)
                assert pool is None or pool.stats().blocks - begun == len(infos), "a thread has decoded a block"
                speeds.setdefault(f"{count:3} {name}", []).append(speed)
        for name, found in speeds.items():
            print(
                f"{name:<14} {statistics.median(found):6.2f} GB/s   ({min(found):.2f} to {max(found):.2f})", flush=True
            )
    finally:
        for pool in pools.values():
            pool.close()
        warm.close()


def _read_all(
    store: ColdStore,
    layout: BlockLayout,
    infos: Sequence[BlockInfo],
    warm: WarmPool,
    count: int,
    pool: ReaderPool | None,
) -> float:
    """Read all blocks by so many threads. Return GB/s."""

    def read_share(first: int) -> None:
        for number in range(first, len(infos), count):
            slot = warm.slots[number % warm.num_slots]
            reason = store.read_into(infos[number], slot, layout=layout, decoders=pool)
            assert reason is None, reason

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda _: None, range(count)))
        begun = time.perf_counter()
        list(threads.map(read_share, range(count)))
        return len(infos) * layout.block_bytes / 1e9 / (time.perf_counter() - begun)


def _start(warm: WarmPool, count: int) -> ReaderPool:
    pool = ReaderPool.of_slab(warm, num_processes=count, num_in_process=count)
    assert pool is not None
    begun = time.perf_counter()
    pool.start()
    called_s = time.perf_counter() - begun
    while pool.stats().ready < count:
        assert time.perf_counter() - begun < _START_S, "the processes do not start"
        time.sleep(0.01)
    print(f"{count:3} processes ready after {time.perf_counter() - begun:.2f} s; the call took {1e3 * called_s:.1f} ms")
    return pool


def _open_store(folder: Path, layout: BlockLayout) -> ColdStore:
    store = ColdStore(folder / "store", quota_bytes=64 << 30, min_free_bytes=0)
    store.open_namespace(Namespace(weights="benchmark", layout=layout))
    return store


def _fill(store: ColdStore, layout: BlockLayout, count: int, codec: str) -> list[BlockInfo]:
    """Store a chain of blocks, and return their names. All have the same bytes."""
    namespace = Namespace(weights="benchmark", layout=layout).digest
    numbers = np.random.default_rng(0).standard_normal(layout.block_bytes // 2, dtype=np.float32)
    block = (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    infos: list[BlockInfo] = []
    for number in range(count):
        token_bytes = np.full(layout.block_size, number, dtype="<u4").tobytes()
        infos.append(infos[-1].next(token_bytes) if infos else BlockInfo.first(token_bytes, namespace=namespace))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, count, _PUT_AT_ONCE):
            some = infos[start : start + _PUT_AT_ONCE]
            store.put(
                list(
                    threads.map(
                        lambda info: encode_record(info, block, layout=layout, codec=codec_by_name(codec)), some
                    )
                )
            )
    return infos


if __name__ == "__main__":
    main()
