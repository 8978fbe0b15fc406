"""Blocks that stay coded until a GPU decodes them: what frames claim, and how a batch of them is decoded."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from fake_cuda import FakeCuda, FakeStream
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.errors import StoreError
from tierkv.movers import nvcomp_zstd
from tierkv.movers.nvcomp_zstd import ZstdBatch
from tierkv.storage.coded import claimed_bytes


def claimed_by_zstd(frame: bytes) -> int:
    try:
        return int(zstandard.frame_content_size(frame))
    except zstandard.ZstdError:
        return -1


@settings(max_examples=400, deadline=None)
@given(
    size=st.sampled_from([0, 1, 255, 256, 257, 65_791, 65_792, 131_072]),
    has_size=st.booleans(),
    has_checksum=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 17), st.integers(0, 7)), max_size=3),
    length=st.one_of(st.none(), st.integers(0, 20)),
)
def test_frames_claim_what_zstd_reads(
    size: int, has_size: bool, has_checksum: bool, flips: list[tuple[int, int]], length: int | None
) -> None:
    coder = zstandard.ZstdCompressor(write_content_size=has_size, write_checksum=has_checksum)
    frame = bytearray(coder.compress(bytes(size)))
    for at, bit in flips:
        if at < len(frame):
            frame[at] ^= 1 << bit
    frame = frame[:length]
    want = claimed_by_zstd(bytes(frame)) if frame else -1
    if frame[:4] != zstandard.compress(b"")[:4]:
        want = -1  # zstd also reads frames to be skipped
    payload = np.frombuffer(b"\xff" * 3 + bytes(frame) + b"\xff" * 20, dtype=np.uint8)
    got = claimed_bytes(payload, np.array([3]), np.array([len(frame)]))
    assert got.tolist() == [want]


def test_every_descriptor_is_read_as_zstd_reads_it() -> None:
    frames = [
        zstandard.compress(b"")[:4] + bytes([descriptor, window]) + bytes(range(1, 13))
        for descriptor in range(256)
        for window in (0, 0x50, 0xA8, 0xB0, 0xFF)
    ]
    payload = np.frombuffer(b"".join(frames), dtype=np.uint8)
    got = claimed_bytes(payload, np.arange(len(frames)) * 18, np.full(len(frames), 18))
    want = np.array([claimed_by_zstd(frame) % (1 << 64) for frame in frames], dtype=np.uint64).view(np.int64)
    assert np.array_equal(got, want)


class Library:
    """nvCOMP's two functions, over CPU memory. short: frames that decode to fewer bytes, by number."""

    def __init__(self, *, refuses: int = 0, fails: int | None = None, short: int | None = None) -> None:
        self.temp_bytes = 0

        def temp_size(count: int, longest: int, _: object, needed: Any, total: int, __: object) -> int:
            assert count * longest >= total > 0
            needed._obj.value = self.temp_bytes = 1000
            return 0

        def decompress(*arguments: Any) -> int:
            sources, sizes, lengths, found, count, temp, temp_bytes, targets, _, statuses, _ = arguments
            assert temp
            assert temp_bytes == self.temp_bytes
            table = [(ctypes.c_int64 * count).from_address(each) for each in (sources, sizes, targets, lengths, found)]
            told = (ctypes.c_int32 * count).from_address(statuses)
            for at in range(count):
                plane = zstandard.decompress(ctypes.string_at(table[0][at], table[1][at]))
                assert len(plane) == table[3][at]
                ctypes.memmove(table[2][at], plane, len(plane))
                table[4][at] = len(plane) - (at == short)
                told[at] = 12 if at == fails else 0
            return refuses

        self.nvcompBatchedZstdDecompressGetTempSize = temp_size
        self.nvcompBatchedZstdDecompressAsync = decompress


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return FakeStream()


def decode(library: Library, stream: FakeStream) -> list[bytes]:
    planes = [bytes([1, 2, 3]) * 100, bytes(7), bytes(range(256)) * 3]
    coded = [np.frombuffer(zstandard.compress(plane), dtype=np.uint8) for plane in planes]
    out = [np.zeros(len(plane), dtype=np.uint8) for plane in planes]
    ZstdBatch(torch.device("cpu"), library=library).decode(
        np.array([each.ctypes.data for each in coded]),
        np.array([each.size for each in coded]),
        np.array([each.ctypes.data for each in out]),
        np.array([each.size for each in out]),
        stream=stream,  # type: ignore[arg-type]
    ).check()
    assert [each.tobytes() for each in out] == planes
    return planes


def test_a_batch_is_decoded(stream: FakeStream) -> None:
    assert decode(Library(), stream)


@pytest.mark.parametrize("keeps_memory", [True, False])
def test_memory_is_kept_between_batches_where_that_is_wanted(keeps_memory: bool) -> None:
    batch = ZstdBatch(torch.device("cpu"), library=Library(), keeps_memory=keeps_memory)
    first = batch._temp(1000)
    for size, is_same in ((1000, True), (10, True), (1001, False)):
        temp = batch._temp(size)
        assert temp.numel() == size
        assert (temp.data_ptr() == first.data_ptr()) == (keeps_memory and is_same)


@pytest.mark.parametrize("fault", [{"fails": 1}, {"short": 2}])
def test_a_frame_that_does_not_decode_is_an_error(stream: FakeStream, fault: dict[str, int]) -> None:
    with pytest.raises(StoreError, match="1 frames did not decode"):
        decode(Library(**fault), stream)


def test_a_batch_that_is_refused_is_an_error(stream: FakeStream) -> None:
    with pytest.raises(StoreError, match="status 10"):
        decode(Library(refuses=10), stream)


def test_a_library_without_the_functions_is_an_error() -> None:
    with pytest.raises(StoreError, match="another one"):
        ZstdBatch(torch.device("cpu"), library=SimpleNamespace())


@pytest.mark.parametrize("package", [None, SimpleNamespace(load_library=lambda: None)])
def test_without_the_library_there_is_no_batch(monkeypatch: pytest.MonkeyPatch, package: object) -> None:
    def find(name: str) -> object:
        if package is None:
            raise ModuleNotFoundError(name)
        return package

    monkeypatch.setattr(nvcomp_zstd.importlib, "import_module", find)
    with pytest.raises(StoreError, match="cannot be loaded"):
        ZstdBatch(torch.device("cpu"))
