"""The codecs on blocks of a model: ratio, speed of a core, and what the lossy ones do to attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from benchmarks.attention_error import codec_error
from benchmarks.cold_rows import Row, wall_s
from benchmarks.cold_workloads import Bytes, Floats, Workload
from tierkv.storage.codec import take_exponent
from tierkv.storage.codecs import CODECS, Codec, codec_by_name
from tierkv.storage.cold_rows import padded_bytes
from tierkv.storage.record import EncodedRecord, decode_record, encode_record
from tierkv.values.layout import BlockLayout

__all__ = ["codec_rows", "decode_rate", "lossy_rows"]

_THREADS = 2
_ROUNDS = 5
_ERROR_BLOCKS = 8


def codec_rows(workload: Workload) -> Iterator[Row]:
    """Ratio and speed of the default codec, of plain zstd beside it, and the limits of both."""
    exponent, plain = codec_by_name("exponent16"), codec_by_name("zstd")
    raw = sum(block.size for block in workload.blocks)
    bound = raw / sum(_order_0_bytes(block, workload.layout) for block in workload.blocks)
    records = list(islice(workload.iter_records(exponent), len(workload.blocks)))
    payload = raw / sum(record.stored_bytes - _header_bytes(record) for record in records)
    yield Row("order-0 bound: exponents at their entropy, the rest raw", bound)
    yield Row("payload ratio", payload, 1.48)
    yield Row("payload ratio / bound", payload / bound, 0.98)
    yield Row("ratio as stored, header and padding", raw / sum(padded_bytes(r.stored_bytes) for r in records), 1.42)
    zstd_records = list(islice(workload.iter_records(plain), len(workload.blocks)))
    yield Row("plain zstd 3: ratio", raw / sum(record.stored_bytes for record in zstd_records))
    yield Row("memcpy, one core", _rate(_copy_all(workload), raw), unit="GB/s")
    for name, codec, coded, targets in (
        ("exponent16", exponent, records, (1.2, 1.5)),
        ("plain zstd 3", plain, zstd_records, (None, None)),
    ):
        yield Row(f"{name}: encode, one core", _rate(_encode_all(workload, codec), raw), targets[0], "GB/s")
        yield Row(f"{name}: decode, one core", _rate(_decode_all(workload, coded), raw), targets[1], "GB/s")
    yield Row(f"exponent16: decode, {_THREADS} threads / one", _scaling(workload, records), 1.9)


def lossy_rows(workload: Workload) -> Iterator[Row]:
    """Ratio and speed of the lossy codecs, and what they do to attention."""
    raw = sum(block.size for block in workload.blocks)
    for codec in (codec for codec in CODECS if codec.is_lossy):
        records = list(islice(workload.iter_records(codec), len(workload.blocks)))
        yield Row(
            f"{codec.name}: payload ratio", raw / sum(each.stored_bytes - _header_bytes(each) for each in records)
        )
        yield Row(f"{codec.name}: encode, one core", _rate(_encode_all(workload, codec), raw), unit="GB/s")
        yield Row(f"{codec.name}: decode, one core", _rate(_decode_all(workload, records), raw), unit="GB/s")
        queries: Sequence[Sequence[Floats] | None] = workload.queries or [None] * len(workload.blocks)
        errors = [
            codec_error(codec, block, layout=workload.layout, queries=query)
            for block, query in list(zip(workload.blocks, queries, strict=True))[:_ERROR_BLOCKS]
        ]
        yield Row(f"{codec.name}: attention output, mean relative error", statistics.mean(e.mean for e in errors))
        yield Row(f"{codec.name}: attention output, 99th percentile", statistics.mean(e.p99 for e in errors))
        yield Row(f"{codec.name}: logits, largest deviation", max(e.max_logit_deviation for e in errors))


def decode_rate(workload: Workload, records: list[EncodedRecord]) -> float:
    """Return GB of blocks that one core decodes in a second."""
    size = sum(record.raw_bytes for record in records)
    return _rate(_decode_all(workload, records), size)


def _order_0_bytes(block: Bytes, layout: BlockLayout) -> float:
    """Return the bytes of a block whose exponents are coded at the entropy of their run."""
    total = 0.0
    for run in layout.runs:
        size = run.token_bytes * layout.block_size
        words = block[run.offset_bytes : run.offset_bytes + size].view(np.uint16)
        exponent, scratch = np.empty(words.size, dtype=np.uint8), np.empty(words.size, dtype=np.uint16)
        take_exponent(words, exponent, scratch)
        counts = np.bincount(exponent, minlength=256)
        share = counts[counts > 0] / words.size
        total += words.size * (1 - float((share * np.log2(share)).sum()) / 8)
    return total


def _header_bytes(record: EncodedRecord) -> int:
    return record.stored_bytes - int.from_bytes(record.data[88:96].tobytes(), "little")


def _copy_all(workload: Workload) -> Callable[[], None]:
    out = np.zeros(workload.layout.block_bytes, dtype=np.uint8)

    def work() -> None:
        for block in workload.blocks:
            np.copyto(out, block)

    return work


def _encode_all(workload: Workload, codec: Codec) -> Callable[[], None]:
    infos = [record.info for record in islice(workload.iter_records(codec_by_name("raw")), len(workload.blocks))]

    def work() -> None:
        for info, block in zip(infos, workload.blocks, strict=True):
            encode_record(info, block, layout=workload.layout, codec=codec)

    return work


def _decode_all(workload: Workload, records: list[EncodedRecord]) -> Callable[[], None]:
    out = np.zeros(workload.layout.block_bytes, dtype=np.uint8)
    lossy_codec = next((record.codec for record in records if codec_by_name(record.codec).is_lossy), "")

    def work() -> None:
        for record in records:
            reason = decode_record(
                record.data, out, expected=record.info, layout=workload.layout, lossy_codec=lossy_codec
            )
            assert reason is None

    return work


def _rate(work: Callable[[], None], size: int) -> float:
    """Return GB per second of CPU time of this thread, the median of some rounds."""
    times = []
    for _ in range(_ROUNDS):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return size / statistics.median(times) / 1e9


def _scaling(workload: Workload, records: list[EncodedRecord]) -> float:
    """Return how much more two threads decode than one in the same time: the best of some rounds, each its own pair."""
    works = [_decode_all(workload, records) for _ in range(_THREADS)]
    ratios = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in range(3 * _ROUNDS):
            alone = wall_s(lambda: threads.submit(works[0]).result())
            together = wall_s(lambda: [each.result() for each in [threads.submit(work) for work in works]])
            ratios.append(_THREADS * alone / together)
    return max(ratios)
