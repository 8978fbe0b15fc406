"""The cold tier against the limits of its machine, all measured in one run: codec, disk, churn, opening.

Speeds of codecs are CPU time of one thread; everything else is wall time unless it says so: CPU time tells what reading
costs beside decoding on a machine that has other work. Plain zstd reads through LMDB's map, which costs no copy, and
compares no checksum. The disk is measured by reading the
store's own file around the page cache, right before the store is read.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np
import zstandard
from rich.console import Console

from benchmarks.cold_churn import churn_rows, measure_opening
from benchmarks.cold_codecs import codec_rows, decode_rate, lossy_rows
from benchmarks.cold_rows import Row, table_of, wall_s
from benchmarks.cold_segments import PlainZstdStore, SegmentStore
from benchmarks.cold_workloads import Bytes, Workload, load_workload
from benchmarks.disk_speed import read_direct_gb_s
from tierkv import __version__
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout

__all__ = ["main"]

_THREADS = 2
_ROUNDS = 5
_AHEAD_BLOCKS = 4


class Readable(Protocol):
    """What is read end to end: the cold store, or segments."""

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None: ...
    def read_into(self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout) -> MissReason | None: ...


def main() -> None:
    """Run everything and print one table; `--out FILE` keeps it."""
    parser = argparse.ArgumentParser(prog="benchmarks.cold", description=__doc__)
    parser.add_argument("--blocks", type=int, default=192, help="blocks of the end-to-end part")
    parser.add_argument("--opened", type=int, default=1_000_000, help="blocks of the store that is opened")
    parser.add_argument("--dir", type=Path, help="where to work: a directory of the disk to measure")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    workload = load_workload(48)
    rows = list(codec_rows(workload))
    rows += lossy_rows(workload)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        path = Path(directory)
        rows += read_rows(workload, path, arguments.blocks)
        rows += [Row(*row) for row in churn_rows(workload, path)]
        rows += [Row(*row) for row in measure_opening(path, arguments.opened)]
    console = Console(record=True, width=110)
    console.print(_machine(workload))
    console.print(table_of(rows))
    if arguments.out:
        arguments.out.write_text(console.export_text())


def read_rows(workload: Workload, path: Path, count: int) -> Iterator[Row]:
    """Whole blocks out of a store, from the page cache and from the disk; the same with plain zstd, and segments."""
    exponent = codec_by_name("exponent16")
    records = list(islice(workload.iter_records(exponent), count))
    raw = sum(record.raw_bytes for record in records)
    decode = decode_rate(workload, records[: len(workload.blocks)])
    infos = [record.info for record in records]
    reader = _Reader(workload.layout, infos)
    scattered = _Reader(workload.layout, random.Random(0).sample(infos, len(infos)))
    quota = 2 * raw
    open_store: dict[str, Callable[[], AbstractContextManager[Readable]]] = {
        "cold": lambda: ColdStore(path / "cold", quota_bytes=quota, min_free_bytes=0),
        "zstd": lambda: ColdStore(path / "zstd", quota_bytes=quota, min_free_bytes=0),
        "plain": lambda: PlainZstdStore(path / "plain"),
        "segments": lambda: SegmentStore(path / "segments"),
    }
    with ColdStore(path / "cold", quota_bytes=quota, min_free_bytes=0) as store:
        yield Row("put, LMDB", _timed(lambda: store.put(records), raw), unit="GB/s")
        stored = store.stats().stored_bytes
    with SegmentStore(path / "segments") as segments:
        yield Row("put, segments", _timed(lambda: segments.put(records), raw), unit="GB/s")
    with ColdStore(path / "zstd", quota_bytes=quota, min_free_bytes=0) as zstd:
        zstd.put(list(islice(workload.iter_records(codec_by_name("zstd")), count)))
    with PlainZstdStore(path / "plain") as plain:
        for number, info in enumerate(infos):
            plain.put(info.block_hash, workload.blocks[number % len(workload.blocks)])
    found: dict[str, list[float]] = {}

    def read_all(which: _Reader, source: Readable, name: str, *, read_ahead: bool = True) -> None:
        wall, cpu = which.read(source, read_ahead=read_ahead)
        found.setdefault(name, []).append(wall)
        found.setdefault(f"{name}, CPU", []).append(cpu)

    for _ in range(_ROUNDS):
        device = read_direct_gb_s(path / "cold" / "data.mdb", num_threads=_THREADS)
        found.setdefault("device", []).append(device)
        for name, opened in open_store.items():
            _drop_cache(path / name)  # closed: what is mapped would stay
            with opened() as source:
                read_all(reader, source, f"disk {name}")
                read_all(reader, source, f"cached {name}")
        limit = min(device * raw / stored, _THREADS * decode)
        found.setdefault("disk / limit", []).append(found["disk cold"][-1] / limit)
        _drop_cache(path / "cold")
        with open_store["cold"]() as source:
            read_all(reader, source, "disk without", read_ahead=False)
        for read_ahead, name in ((True, "scattered"), (False, "scattered without")):
            _drop_cache(path / "cold")
            with open_store["cold"]() as source:
                read_all(scattered, source, name, read_ahead=read_ahead)
    block = workload.layout.block_bytes
    middle = {name: statistics.median(values) for name, values in found.items()}
    per_block = 1e9 / block
    yield Row("device, around the page cache", middle["device"], unit="GB/s")
    yield Row(f"page cache: blocks delivered, {_THREADS} threads", middle["cached cold"] * per_block, unit="blocks/s")
    yield Row("page cache / (cores x decode)", middle["cached cold"] / (_THREADS * decode), 0.8)
    yield Row("page cache: CPU time of decoding / of all", middle["cached cold, CPU"] / decode)
    yield Row(
        "page cache / plain zstd 3 in LMDB, one frame a block", middle["cached cold"] / middle["cached plain"], 2.0
    )
    yield Row("page cache / this store with its zstd codec", middle["cached cold"] / middle["cached zstd"])
    yield Row("page cache / segments", middle["cached cold"] / middle["cached segments"])
    yield Row(f"disk: blocks delivered, {_THREADS} threads", middle["disk cold"] * per_block, unit="blocks/s")
    yield Row("disk / min(device x ratio, cores x decode)", middle["disk / limit"], 0.8)
    yield Row("disk: CPU time of decoding / of all", middle["disk cold, CPU"] / decode)
    yield Row("disk / plain zstd 3 in LMDB, one frame a block", middle["disk cold"] / middle["disk plain"], 2.0)
    yield Row("disk / this store with its zstd codec", middle["disk cold"] / middle["disk zstd"])
    yield Row("disk / segments", middle["disk cold"] / middle["disk segments"])
    yield Row("disk, blocks as they were put: with / without read-ahead", middle["disk cold"] / middle["disk without"])
    yield Row("disk, scattered: with / without read-ahead", middle["scattered"] / middle["scattered without"])


class _Reader:
    """Reads all blocks, in order, by several threads, into memory that is touched already."""

    def __init__(self, layout: BlockLayout, infos: list[BlockInfo]) -> None:
        self._layout = layout
        self._infos = infos
        self._slots = np.zeros((4 * _THREADS, layout.block_bytes), dtype=np.uint8)

    def read(self, store: Readable, *, read_ahead: bool = True) -> tuple[float, float]:
        """Return GB of blocks in a second of wall time, and in a second of CPU time of this process."""
        with ThreadPoolExecutor(_THREADS) as threads:
            start, start_cpu = time.perf_counter(), time.process_time()
            shares = [threads.submit(self._read_share, store, first, read_ahead) for first in range(_THREADS)]
            for share in shares:
                share.result()
            elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        size = len(self._infos) * self._layout.block_bytes / 1e9
        return size / elapsed_s, size / cpu_s

    def _read_share(self, store: Readable, first: int, read_ahead: bool) -> None:
        for number in range(first, len(self._infos), _THREADS):
            if read_ahead and number + _AHEAD_BLOCKS < len(self._infos):
                store.read_ahead([self._infos[number + _AHEAD_BLOCKS].block_hash])
            slot = self._slots[number % len(self._slots)]
            reason = store.read_into(self._infos[number], slot, layout=self._layout)
            assert reason is None, reason


def _timed(work: Callable[[], object], size: int) -> float:
    return size / wall_s(work) / 1e9


def _drop_cache(directory: Path) -> None:
    """Let the page cache forget the files of a directory, none of which may be mapped."""
    for path in directory.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _machine(workload: Workload) -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return (
        f"tierkv {__version__}; {os.cpu_count()} cores of {cpu}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, lmdb {lmdb.__version__}, zstandard {zstandard.__version__}\n"
        f"data: {workload.name}, bfloat16, {len(workload.blocks)} different blocks of "
        f"{workload.layout.block_bytes / (1 << 20):.2f} MiB"
    )


if __name__ == "__main__":
    main()
