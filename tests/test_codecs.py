"""Codecs give back what they were given, shrink floats, and refuse damaged frames with an error of ours."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.codec import FRAME_BYTES, LITERALS_ONLY, FrameCoder, merge_planes, take_exponent, take_rest
from tierkv.storage.codecs import CODECS, RAW, Codec, codec_by_id, codec_by_name, default_codec
from tierkv.storage.record import BlockInfo, encode_record
from tierkv.values.layout import DTYPE_BYTES, BlockLayout, Run

RUN = Run(offset_bytes=0, token_bytes=4, heads=1, dim=2, dtype="bfloat16", is_key=True)
names = pytest.mark.parametrize("codec", [c for c in CODECS if not c.is_lossy], ids=lambda codec: codec.name)


def encode(codec: Codec, run: np.ndarray, out: np.ndarray) -> list[int]:
    sizes = codec.encode_run(run, RUN, out)
    assert sizes is not None
    return sizes


def round_trip(codec: Codec, run: np.ndarray) -> np.ndarray:
    encoded = np.empty(run.size, dtype=np.uint8)
    sizes = encode(codec, run, encoded)
    assert len(sizes) == codec.num_frames(RUN, run.size // RUN.token_bytes)
    back = np.zeros(run.size, dtype=np.uint8)
    codec.decode_run(encoded[: sum(sizes)], sizes, RUN, back)
    return back


def float_bytes(count: int, item_bytes: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32).view(np.uint32)
    return (values >> 16).astype("<u2").view(np.uint8) if item_bytes == 2 else values.view(np.uint8)


@names
@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=4096))
def test_any_bytes_come_back(codec: Codec, data: bytes) -> None:
    size = len(data) // 4 * 4 or 4
    run = np.frombuffer(data.ljust(size, b"\0")[:size], dtype=np.uint8)
    assert np.array_equal(round_trip(codec, run), run)


@names
@pytest.mark.parametrize("size", [4, FRAME_BYTES - 4, FRAME_BYTES, FRAME_BYTES + 4, 5 * FRAME_BYTES + 8])
def test_runs_around_the_frame_size_come_back(codec: Codec, size: int) -> None:
    run = float_bytes(size // 4, 4)
    assert np.array_equal(round_trip(codec, run), run)


@names
def test_noise_never_grows(codec: Codec) -> None:
    run = np.random.default_rng(1).integers(0, 256, 2 * FRAME_BYTES, dtype=np.uint8)
    sizes = encode(codec, run, np.empty(run.size, dtype=np.uint8))
    assert sum(sizes) <= run.size
    assert np.array_equal(round_trip(codec, run), run)


def test_every_16_bit_value_survives_splitting_and_merging() -> None:
    values = np.arange(1 << 16, dtype=np.uint16)
    exponent, rest = np.empty((2, values.size), dtype=np.uint8)
    merged, scratch = np.empty((2, values.size), dtype=np.uint16)
    take_exponent(values, exponent, scratch)
    take_rest(values, rest, scratch)
    merge_planes(exponent, rest, merged, scratch)
    assert np.array_equal(merged, values)


def test_the_exponent_plane_holds_the_exponents_of_bfloat16() -> None:
    values = np.array([0x3F80, 0xBF80, 0x4000], dtype=np.uint16)  # 1, -1, 2
    exponent = np.empty(3, dtype=np.uint8)
    take_exponent(values, exponent, np.empty(3, dtype=np.uint16))
    assert exponent.tolist() == [127, 127, 128]


def test_coding_exponents_beats_plain_zstd_on_normal_values() -> None:
    run = float_bytes(1 << 18, 2)
    out = np.empty(run.size, dtype=np.uint8)
    assert sum(encode(codec_by_name("exponent16"), run, out)) < 0.9 * sum(encode(codec_by_name("zstd"), run, out))


@names
def test_a_frame_cut_short_or_altered_is_refused_or_decoded_but_never_crashes(codec: Codec) -> None:
    random = np.random.default_rng(2)
    run = float_bytes(4096, 4)
    encoded = np.empty(run.size, dtype=np.uint8)
    sizes = encode(codec, run, encoded)
    out = np.empty(run.size, dtype=np.uint8)
    for _ in range(200):
        damaged = encoded[: sum(sizes)].copy()
        damaged[random.integers(0, damaged.size, 3)] ^= np.uint8(1 << random.integers(0, 8))
        with contextlib.suppress(CorruptBlockError):
            codec.decode_run(damaged, sizes, RUN, out)


@pytest.mark.parametrize("name", ["zstd", "huffman"])
def test_a_frame_that_claims_gigabytes_is_refused_before_anything_is_allocated(name: str) -> None:
    # magic, descriptor with an 8-byte content size, window, then 1 TiB as the size of the content
    frame = np.frombuffer(b"\x28\xb5\x2f\xfd\xc0\x00" + (1 << 40).to_bytes(8, "little"), dtype=np.uint8)
    with pytest.raises(CorruptBlockError):
        codec_by_name(name).decode_run(frame, [frame.size], RUN, np.empty(4096, dtype=np.uint8))


def test_threads_share_a_codec() -> None:
    codec = codec_by_name("exponent16")
    runs = [float_bytes(1 << 18, 2, seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not np.array_equal(round_trip(codec, runs[seed]), runs[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_dtype_has_a_default_and_every_codec_is_found_by_name_and_id() -> None:
    assert all(default_codec(dtype) in CODECS and not default_codec(dtype).is_lossy for dtype in DTYPE_BYTES)
    assert all(codec.name.startswith("lossy-") == codec.is_lossy for codec in CODECS)
    assert all(codec_by_id(codec.codec_id) is codec for codec in CODECS)
    assert [codec.codec_id for codec in CODECS] == [0, 1, 2, 3, 4, 6], "no id is used twice; 5 was lossy-fp8-e4m3"
    assert codec_by_id(99) is None
    assert codec_by_name("raw") is RAW
    with pytest.raises(ConfigError, match="exponent16"):
        codec_by_name("gzip")


def test_planes_of_the_wrong_size_are_refused_before_and_after_they_are_decoded() -> None:
    coder = FrameCoder(LITERALS_ONLY)
    plane = np.zeros(5000, dtype=np.uint8)
    out = np.empty(5000, dtype=np.uint8)
    frame = out[: coder.encode(plane, out)].data
    assert [each.size for each in coder.decode_many([frame, plane[:7].data], [5000, 7])] == [5000, 7]
    with pytest.raises(CorruptBlockError, match="not of the size"):
        coder.decode_many([frame], [1 << 40])
    with pytest.raises(CorruptBlockError, match="not of the size"):
        coder.decode_many([frame, frame], [5000, 4999])
    with pytest.raises(CorruptBlockError, match="does not decode"):
        coder.decode_many([memoryview(b"no frame")], [5000])
    decompressor = SimpleNamespace(multi_decompress_to_buffer=lambda *_, **__: [b"short"])
    coder._decompressor = decompressor  # type: ignore[assignment]
    with pytest.raises(CorruptBlockError, match="to the size"):
        coder.decode_many([frame], [5000])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_rest_of_another_length_than_the_run_is_refused(change: int) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=64, kv_heads=8, head_dim=64, dtype="bfloat16")
    codec, block = codec_by_name("exponent16"), np.zeros(layout.block_bytes, dtype=np.uint8)
    payload = np.zeros(2 * layout.block_bytes, dtype=np.uint8)
    sizes: list[int] = []
    for run in layout.runs:
        values = block[run.offset_bytes : run.offset_bytes + run.token_bytes * 64]
        found = codec.encode_run(values, run, payload[sum(sizes) :][: values.size])
        assert found
        sizes += found
    codec.decode_runs(payload, sizes, block, layout.runs, 64)
    sizes[1] += change
    with pytest.raises(CorruptBlockError, match="a rest of"):
        codec.decode_runs(payload, sizes, block, layout.runs, 64)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults as Linux counts them")
def test_decoding_in_a_fresh_process_takes_no_new_memory_for_each_block(tmp_path: Path) -> None:
    layout = BlockLayout.uniform(num_layers=16, block_size=64, kv_heads=8, head_dim=256, dtype="bfloat16")
    info = BlockInfo.first(np.arange(64, dtype="<u4").tobytes(), namespace=bytes(16))
    numbers = np.random.default_rng(0).standard_normal(layout.block_bytes // 2, dtype=np.float32)
    block = (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    encode_record(info, block, layout=layout).data.tofile(tmp_path / "record")
    command = [sys.executable, "-c", _COUNT_FAULTS, str(tmp_path / "record")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100, "each block's planes alone are 1,024 pages"


_COUNT_FAULTS = """
import resource, sys
import numpy as np
from tierkv.storage.record import decode_record, read_header
from tierkv.values.layout import BlockLayout
layout = BlockLayout.uniform(num_layers=16, block_size=64, kv_heads=8, head_dim=256, dtype="bfloat16")
record = np.fromfile(sys.argv[1], dtype=np.uint8)  # nothing large is freed before it is decoded
block = np.empty(layout.block_bytes, dtype=np.uint8)
info = read_header(record).info
for number in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert decode_record(record, block, expected=info, layout=layout) is None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
