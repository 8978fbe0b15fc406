"""Opening the warm tier's memory: what cannot be had leaves nothing behind, and says why."""

from __future__ import annotations

import logging
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from pattern_engine import tiny_warm
from test_moves import assert_idle, fake_mover, gpu_windows

from tierkv.background.work_queue import PriorityThreadPool
from tierkv.config import CacheConfig
from tierkv.errors import StoreError
from tierkv.movers.frames import FrameMover
from tierkv.movers.mover import Move, Mover
from tierkv.movers.windows import WindowMover, window_format
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.coded import CodedLayout
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.transfer import memory as warm_memory
from tierkv.transfer.memory import TierMemory, open_warm_memory
from tierkv.values.layout import BlockLayout


def fail(*_: object, **__: object) -> None:
    raise StoreError("the GPU does not compress")


def open_slabs() -> int:
    """Return how many slabs this process holds a descriptor of."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("tierkv-warm" in os.readlink(link) for link in links if link.is_symlink())


@pytest.fixture
def hot() -> HotPool:
    return HotPool(tiny_warm(8, "windows")[0], 4, torch.device("cpu"))


def config_of(layout: BlockLayout, warm_codec: str) -> CacheConfig:
    return CacheConfig(block_size=layout.block_size, warm_bytes=tiny_warm(8, "windows")[1], warm_codec=warm_codec)


@pytest.mark.parametrize(("warm_codec", "failing"), [("windows", WindowMover), ("windows", Mover), ("raw", Mover)])
def test_memory_that_cannot_be_used_is_given_back(
    hot: HotPool, monkeypatch: pytest.MonkeyPatch, warm_codec: str, failing: type
) -> None:
    before = open_slabs()
    monkeypatch.setattr(failing, "warm_up" if failing is WindowMover else "register", fail)
    with pytest.raises(StoreError, match="does not compress"):
        open_warm_memory(hot, config_of(hot.layout, warm_codec))
    assert open_slabs() == before


def test_auto_keeps_blocks_as_they_are_where_the_gpu_does_not_compress(
    hot: HotPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warm_memory, "_form", lambda hot, _: window_format(hot.layout))  # as on a GPU
    monkeypatch.setattr(WindowMover, "warm_up", fail)
    before = open_slabs()
    with caplog.at_level(logging.WARNING):
        memory = open_warm_memory(hot, config_of(hot.layout, "auto"))
    assert memory.compression is None and "as they are" in caplog.text
    memory.mover.close()
    memory.warm.close()
    assert open_slabs() == before


@pytest.mark.parametrize("way", ["windows", "frames"])
def test_a_kernel_that_does_not_compile_is_a_store_error(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def compile_it(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc"])

    FakeCuda(monkeypatch)
    if way == "windows":
        gpu, _ = gpu_windows(monkeypatch)
        gpu._kernels = SimpleNamespace(compress_section=compile_it)
        mover = object.__new__(WindowMover)
        mover._gpu, mover._hot = gpu, HotPool(tiny_warm(8, "windows")[0], 4, torch.device("cpu"))
        with pytest.raises(StoreError, match="gcc"):
            mover.warm_up()
        return
    hot, _, raw = fake_mover(tiny_warm(8, "windows")[0])
    raw.load_stream.num_queued = 1  # type: ignore[attr-defined]
    monkeypatch.setattr(FrameMover, "promote", compile_it)
    frames = object.__new__(FrameMover)
    frames._slots, frames._layout = raw.slots, CodedLayout(hot.layout)
    frames._load_stream, frames.stream = raw.load_stream, torch.cuda.Stream()
    with pytest.raises(StoreError, match="gcc"):
        frames.warm_up([Move(0, hot.scratch_block)])
    assert_idle(raw.load_stream)


@pytest.mark.parametrize(("codec", "num_threads"), [("exponent16", 6), ("zstd", 3)])
def test_more_threads_read_where_they_decode_nothing(hot: HotPool, codec: str, num_threads: int) -> None:
    warm = WarmPool(hot.layout.block_bytes, 4)
    memory = TierMemory(
        layout=hot.layout,
        codec=codec_by_name(codec),
        hot=hot,
        warm=warm,
        mover=Mover(hot, warm),
        compression=None,
        frames=object.__new__(FrameMover),
        threads=PriorityThreadPool(3, name="io"),
        num_readers=0,
        loaders=ThreadPoolExecutor(1),
    )
    assert memory.read_threads.num_threads == num_threads
    memory.close()


@pytest.mark.parametrize(("decodes", "num_staging"), [(True, 34), (False, 24)])
def test_more_blocks_are_on_their_way_where_a_gpu_decodes(
    hot: HotPool, monkeypatch: pytest.MonkeyPatch, decodes: bool, num_staging: int
) -> None:
    monkeypatch.setattr(warm_memory, "can_decode", lambda *_: decodes)
    monkeypatch.setattr(warm_memory, "_frames", lambda *_: None)
    config = replace(config_of(hot.layout, "windows"), warm_bytes=4 << 20)
    memory = open_warm_memory(hot, config)
    assert memory.compression is not None
    assert len(memory.compression.staging.slots) == num_staging
    memory.compression.mover.close()
    memory.mover.close()
    memory.warm.close()
    memory.compression.staging.close()


@pytest.mark.parametrize("way", ["__init__", "warm_up"])
def test_a_gpu_that_cannot_decode_leaves_that_to_the_cpu(
    hot: HotPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    monkeypatch.setattr(warm_memory, "can_decode", lambda *_: True)
    monkeypatch.setattr(Mover, "load_stream", None, raising=False)
    monkeypatch.setattr(FrameMover, "__init__", lambda *_: None)
    monkeypatch.setattr(FrameMover, way, fail)
    with caplog.at_level(logging.WARNING):
        memory = open_warm_memory(hot, config_of(hot.layout, "raw"))
    assert memory.frames is None
    assert "the CPU decodes" in caplog.text
    memory.mover.close()
    memory.warm.close()
