"""Many blocks of 16 tokens out of a block store's disk, through the page cache, into its warm memory.

Engines with small pages read hundreds of records for one prompt, so what Python does for each of them counts. The
smallest blocks have next to no bytes: their CPU time is that of one record. `copy` is a plain copy of the same bytes by
as many threads, each a part; `plain read` reads them from one file, by a call for each block.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.cold_rows import wall_s
from tierkv import BlockKey, BlockLayout, BlockStore, BlockStoreConfig, Buffers, Namespace
from tierkv.storage.codec import Bytes

__all__ = ["main"]

_LAYERS, _TOKENS = 32, 16
_SAVED_AT_ONCE = 32


def main() -> None:
    """Measure blocks of several sizes, and print a line for each."""
    parser = argparse.ArgumentParser(prog="benchmarks.block_reads", description=__doc__)
    parser.add_argument("--blocks", type=int, default=256, help="blocks of a prompt")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 256, 2048], help="KiB of a block")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {arguments.threads} threads, {arguments.blocks} blocks of codec {arguments.codec}")
    heads = ("KiB", "read ms", "block us", "CPU us", "copy ms", "plain read ms", "copy / read")
    print(" ".join(f"{head:>{len(head) + 2}}" for head in heads))
    for size in arguments.sizes:
        figures = _measure(size << 10, arguments.blocks, arguments.threads, arguments.codec, arguments.rounds)
        texts = (f"{size}", *(f"{figure:.1f}" for figure in figures[:-1]), f"{figures[-1]:.2f}")
        print(" ".join(f"{text:>{len(head) + 2}}" for text, head in zip(texts, heads, strict=True)))


def _measure(block_bytes: int, count: int, threads: int, codec: str, rounds: int) -> list[float]:
    dim = block_bytes // (_LAYERS * 2 * _TOKENS * 2)
    layout = BlockLayout.uniform(num_layers=_LAYERS, block_size=_TOKENS, kv_heads=1, head_dim=dim, dtype="bfloat16")
    namespace = Namespace(weights="benchmark", layout=layout)
    blocks = _blocks(layout, count)
    with tempfile.TemporaryDirectory(prefix="tierkv-") as folder:
        config = BlockStoreConfig(
            cold_path=Path(folder) / "store",
            warm_bytes=(2 * count + 64) * layout.block_bytes,
            num_io_threads=threads,
            codec=codec,
        )
        with BlockStore(config, namespace=namespace) as store:
            keys = store.keys(range(_TOKENS * count))[:]
            for start in range(0, count, _SAVED_AT_ONCE):
                some = slice(start, start + _SAVED_AT_ONCE)
                store.save(keys[some], Buffers(list(blocks[some])))
                store.flush()
        rows = [_read(config, namespace, keys) for _ in range(rounds)]
        read_s, cpu_s = map(statistics.median, zip(*rows, strict=True))
        out = np.zeros_like(blocks)
        copy_s = _spread(threads, lambda part: np.copyto(out[part], blocks[part]), count, rounds)
        plain = Path(folder) / "plain"
        blocks.tofile(plain)
        fd = os.open(plain, os.O_RDONLY)

        def read_plainly(part: slice) -> None:
            for at in range(part.start, part.stop):
                os.preadv(fd, [out[at].data], at * layout.block_bytes)

        plain_s = _spread(threads, read_plainly, count, rounds)
        os.close(fd)
    us = 1e6 / count
    return [1e3 * read_s, us * read_s, us * cpu_s, 1e3 * copy_s, 1e3 * plain_s, copy_s / read_s]


def _read(config: BlockStoreConfig, namespace: Namespace, keys: list[BlockKey]) -> tuple[float, float]:
    """Return the seconds, and the seconds of CPU time, until all blocks lie in the memory of a store just opened."""
    with BlockStore(config, namespace=namespace) as store:
        started, started_cpu = time.perf_counter(), time.process_time()
        with store.reserve(keys) as reservation:
            reservation.wait()
            elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
            assert reservation.num_ready == len(keys)
    return elapsed_s, cpu_s


def _spread(num_threads: int, work: Callable[[slice], object], count: int, rounds: int) -> float:
    """Return the median seconds of some work on all blocks, each thread a part of them."""
    borders = [count * number // num_threads for number in range(num_threads + 1)]
    parts = [slice(first, last) for first, last in pairwise(borders)]
    with ThreadPoolExecutor(num_threads) as threads:
        return statistics.median(wall_s(lambda: list(threads.map(work, parts))) for _ in range(rounds))


def _blocks(layout: BlockLayout, count: int) -> Bytes:
    """Return blocks of normal numbers, [count, block bytes]."""
    numbers = np.random.default_rng(0).standard_normal(count * layout.block_bytes // 2, dtype=np.float32)
    return (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(count, layout.block_bytes)


if __name__ == "__main__":
    main()
