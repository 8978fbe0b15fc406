"""Two longer measurements of the cold store: churn at its quota, and opening it when it holds a million blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from benchmarks.cold_segments import SegmentStore
from benchmarks.cold_workloads import Workload, synthetic_workload
from tierkv.storage.codecs import default_codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_children import CHILD_ROW_BYTES
from tierkv.storage.cold_rows import EntryTable, padded_bytes
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord

__all__ = ["churn_rows", "measure_opening"]

_QUOTA_BYTES = 1 << 30
_TIMES = 4
_BATCH = 8
Figure = tuple[str, float, "float | None", str, bool]


def churn_rows(workload: Workload, path: Path) -> Iterator[Figure]:
    """Put four times the quota, victims chosen at random: one model, then three of different sizes."""
    others = [synthetic_workload(8, kv_heads=2, num_layers=6, seed=1), synthetic_workload(8, kv_heads=8, seed=2)]
    for name, workloads in (("one model", [workload]), ("three models", [workload, *others])):
        yield from _churn(name, workloads, path / f"churn-{len(workloads)}")
    yield from _churn_segments(workload, path / "churn-segments")


def _churn(name: str, workloads: list[Workload], path: Path) -> Iterator[Figure]:
    rng = np.random.default_rng(0)

    def random_order(entries: EntryTable, now: float) -> npt.NDArray[np.float64]:
        return rng.random(len(entries))

    rates: list[float] = []
    failed = 0
    with ColdStore(path, quota_bytes=_QUOTA_BYTES, min_free_bytes=0, eviction_score=random_order) as store:
        batches = _batches(workloads)
        for _ in range(1 + _TIMES):
            done_bytes, busy_s = 0, 0.0
            while done_bytes < _QUOTA_BYTES:
                batch = next(batches)
                start = time.thread_time()
                outcomes = store.put(batch)
                busy_s += time.thread_time() - start
                failed += sum(outcome is not PutOutcome.STORED for outcome in outcomes)
                done_bytes += sum(padded_bytes(record.stored_bytes) for record in batch)
            rates.append(done_bytes / busy_s / 1e9)
        sizes = store.stats()
    yield f"churn, {name}: first fill, CPU time", rates[0], None, "GB/s stored", False
    yield f"churn, {name}: put rate of the slowest quota after / first fill", min(rates[1:]) / rates[0], 0.8, "", False
    yield f"churn, {name}: file / live bytes", sizes.file_bytes / sizes.live_bytes, 1.1, "", True
    yield f"churn, {name}: puts that failed", float(failed), 0.0, "", True


def _churn_segments(workload: Workload, path: Path) -> Iterator[Figure]:
    rng = np.random.default_rng(0)
    rates: list[float] = []
    kept: list[EncodedRecord] = []
    batches = _batches([workload])
    with SegmentStore(path) as store:
        for _ in range(1 + _TIMES):
            done_bytes, busy_s = 0, 0.0
            while done_bytes < _QUOTA_BYTES:
                batch = next(batches)
                victims: list[EncodedRecord] = []
                while kept and store.live_bytes + sum(record.stored_bytes for record in batch) > _QUOTA_BYTES + sum(
                    record.stored_bytes for record in victims
                ):
                    victims.append(kept.pop(int(rng.integers(len(kept)))))
                start = time.thread_time()
                store.put(batch, [record.info.block_hash for record in victims])
                busy_s += time.thread_time() - start
                kept += batch
                done_bytes += sum(record.stored_bytes for record in batch)
            rates.append(done_bytes / busy_s / 1e9)
        yield "churn, segments: slowest quota after / first fill", min(rates[1:]) / rates[0], None, "", False
        yield "churn, segments: on disk / live bytes", store.file_bytes / store.live_bytes, None, "", True


def _batches(workloads: list[Workload]) -> Iterator[list[EncodedRecord]]:
    """Yield batches of records that each begin a chain, of all models in turn."""
    sources = [each.iter_records(default_codec(each.layout.dtype), chained=False) for each in workloads]
    while True:
        for source in sources:
            yield list(islice(source, _BATCH))


def measure_opening(path: Path, count: int) -> Iterator[Figure]:
    """Open a store of many blocks whose trees are as large as real ones; the values themselves are left out."""
    _make_large_store(path / "large", count)
    for name in ("first", "second"):
        start = time.perf_counter()
        store = ColdStore(path / "large", quota_bytes=8 << 30, min_free_bytes=0)
        elapsed_s = time.perf_counter() - start
        start = time.perf_counter()
        store.lookup(bytes(16))
        lookup_s = time.perf_counter() - start
        store.close()
        yield f"opening {count:,} blocks, {name} time, trees checked", elapsed_s, 1.5, "s", True
    yield "the first lookup in it", 1e6 * lookup_s, None, "us", True


def _make_large_store(path: Path, count: int) -> None:
    with ColdStore(path, quota_bytes=8 << 30, min_free_bytes=0):
        pass
    rng = np.random.default_rng(0)
    hashes = np.sort(np.frombuffer(rng.bytes(16 * count), dtype="S16"))
    keys = [bytes(each).ljust(16, b"\0") for each in hashes]
    nodes = np.sort(np.frombuffer(rng.bytes(16 * count), dtype="S16"))
    middle = bytes(CHILD_ROW_BYTES - 32)
    links = [bytes(node).ljust(16, b"\0") + middle + key for node, key in zip(nodes, keys, strict=True)]
    env = lmdb.open(str(path), map_size=10 << 30, max_dbs=8, sync=False, lib_version=0)
    try:
        for name, items in (
            (b"blocks", ((key, bytes(8)) for key in keys)),
            (b"index", ((key, bytes(96)) for key in keys)),
            (b"children", ((link, b"") for link in links)),
        ):
            database = env.open_db(name, create=False)
            with env.begin(write=True, db=database) as txn:
                txn.cursor().putmulti(items, append=True)
    finally:
        env.close()
