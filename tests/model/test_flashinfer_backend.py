"""What FlashInfer's backend serves, and how its kernels are compiled beside requests."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_stubs import (
    CPU,
    LAYER,
    ON_CPU,
    batch_of,
)
from fake_flashinfer import PrefillWrapper, fake_flashinfer

from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.flashinfer import (
    FlashInferBackend,
    FlashInferLimits,
    FlashInferWorkspace,
    flashinfer_limits,
)
from tierkv.engine.backends.torch_attention import TorchBackend
from tierkv.errors import ConfigError


def backend_of(kernels: str = "fa2", *, num_bytes: int = 1 << 28, **limits: Any) -> FlashInferBackend:
    known = FlashInferLimits(**{"devices": frozenset({"cuda", "cpu"}), **limits})
    return FlashInferBackend(kernels, limits=known, workspace=FlashInferWorkspace(CPU, num_bytes))


@pytest.mark.parametrize(
    ("installed", "kernels", "capability", "reason"),
    [
        ("0.6.4", "fa2", (9, 0), None),
        ("0.6.11", "fa3", (9, 0), None),
        ("0.6.4", "fa2", (8, 6), None),
        ("0.7.0", "fa2", (9, 0), "tierkv knows FlashInfer 0.6, and this is 0.7.0"),
        ("0.60.1", "fa2", (9, 0), "this is 0.60.1"),
        (None, "fa2", (9, 0), "this is of an unknown version"),
        ("0.6.4", "fa3", (8, 0), "no fa3 kernels for compute capability 8.0"),
        ("0.6.4", "fa3", (10, 0), "no fa3 kernels for compute capability 10.0"),
        ("0.6.4", "fa2", (7, 5), "no fa2 kernels for compute capability 7.5"),
    ],
)
def test_flashinfer_needs_a_version_and_a_device_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
    installed: str | None,
    kernels: str,
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    def version(name: str) -> str:
        assert name == "flashinfer-python"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    monkeypatch.setattr("tierkv.engine.backends.flashinfer.version", version)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    limits = flashinfer_limits(kernels, torch.device("cuda"))
    if reason is None:
        assert (limits.missing, limits.multiprocessors) == (None, 132)
    else:
        assert reason in str(limits.missing)
        backend = FlashInferBackend(kernels, limits=limits, workspace=FlashInferWorkspace(CPU))
        assert backend.why_not(LAYER) == limits.missing


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"window": 99, "softcap": 20.0, "heads": 8}, None),
        ({"k_dim": 64, "v_dim": 64}, None),
        ({"k_dim": 256, "v_dim": 256}, None),
        ({"k_dim": 80, "v_dim": 80}, "head dims 80"),
        ({"v_dim": 64}, "head dims 128 and 64"),
        ({"dtype": torch.float32}, "float32"),
        ({"device": "mps"}, "mps"),
    ],
)
def test_flashinfer_says_what_it_does_not_serve(changes: dict[str, Any], reason: str | None) -> None:
    found = backend_of().why_not(replace(LAYER, **changes))
    assert found is None if reason is None else reason in str(found)


def test_partial_results_must_fit_the_workspace() -> None:
    """As fa2's scheduler counts: heads * programs * rows * (dim + 1) floats, programs = 2 * multiprocessors / heads."""
    needed = 32 * (264 // 8) * 128 * 129 * 4
    assert backend_of(num_bytes=needed, multiprocessors=132).why_not(LAYER) is None
    assert "workspace" in str(backend_of(num_bytes=needed - 1, multiprocessors=132).why_not(LAYER))
    assert backend_of("fa3", num_bytes=0, multiprocessors=132).why_not(LAYER) is None

    def fits(count: int, new: int, most: int) -> bool:
        """Return whether a graph fits, which has a program for each tile of queries, whatever splits."""
        static = batch_of(*[(new, 600)] * count, kv_range=(1, 4096))
        backend = backend_of(num_bytes=most, multiprocessors=132)
        return backend.why_not(LAYER, static) is None

    assert fits(1, 512, needed)
    tiles = -(-64 * 4 * 4 // 128) + 63
    for_many = 32 * tiles * 128 * 129 * 4
    assert fits(64, 4, for_many)
    assert not fits(64, 4, for_many - 1)
    for_decoding = 32 * (256 * 4 // 16 + 255) * 16 * 129 * 4
    assert fits(256, 1, for_decoding)
    assert not fits(256, 1, for_decoding - 1)


def test_kernels_are_compiled_in_the_background_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, builds = threading.Event(), threading.Event(), []

    class Slow(PrefillWrapper):
        def plan(self, *args: Any, **options: Any) -> None:
            builds.append(threading.current_thread().name)
            started.set()
            assert go.wait(20)
            super().plan(*args, **options)

    module: Any = fake_flashinfer()
    module.BatchPrefillWithPagedKVCacheWrapper = Slow
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    backend = backend_of()
    assert not backend.prepare(ON_CPU, wait=False)
    assert started.wait(20)
    assert not backend.prepare(replace(ON_CPU, heads=8, scale=0.5), wait=False), "the same kernels"
    go.set()
    assert backend.prepare(ON_CPU, wait=True)
    assert backend.why_not(ON_CPU) is None
    assert builds == ["build flashinfer-fa2"]
    assert backend.prepare(replace(ON_CPU, window=7), wait=True)
    assert len(builds) == 2, "windows have kernels of their own"


def test_kernels_that_cannot_be_compiled_are_named_once_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PrefillWrapper):
        def plan(self, *args: Any, **options: Any) -> None:
            raise RuntimeError("ninja: nvcc not found")

    module: Any = fake_flashinfer()
    module.BatchPrefillWithPagedKVCacheWrapper = Broken
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    backend, batch = backend_of(), batch_of((1, 8))
    choice = AttentionChoice([backend, TorchBackend()], waits=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choice.choose(ON_CPU, batch).name == "torch"
    assert [record.getMessage().count("nvcc not found") for record in caplog.records] == [1]
    assert not choice.is_building
    with pytest.raises(ConfigError, match="nvcc not found"):
        AttentionChoice([backend_of()], is_forced=True).choose(ON_CPU, batch)
