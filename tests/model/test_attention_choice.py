"""Which attention backend serves a batch: by what is there, what is compiled, or because it is forced."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from attention_stubs import (
    CPU,
    LAYER,
    MEASURED,
    ON_CPU,
    WIN,
    auto,
    batch_of,
    point,
    table_of,
)

from tierkv.engine.attention import SequenceStep
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import ATTENTION_NAMES, make_attention
from tierkv.engine.backends.flash import FlashBackend
from tierkv.engine.backends.torch_attention import TorchBackend
from tierkv.engine.graphs import GraphedModel
from tierkv.errors import ConfigError
from tierkv.values.layout import BlockLayout


def test_what_flash_attn_does_not_serve_falls_to_the_next() -> None:
    choice, (flash, fa2, _, _) = auto(MEASURED)
    flash.reason = "blocks of 16 tokens"
    assert choice.choose(LAYER, batch_of((32, 32800))).name == "flashinfer-fa2"
    fa2.reason = "not installed"
    assert choice.choose(LAYER, batch_of((32, 32800))).name == "torch"


def test_a_backend_that_is_compiled_is_waited_for_elsewhere() -> None:
    choice, (_, fa2, _, _) = auto(table_of(point(32, 4096, WIN)))
    fa2.is_ready, batch = False, batch_of((32, 4096))
    assert not choice.is_building
    assert choice.choose(LAYER, batch).name == "flash-attn"
    assert choice.is_building
    fa2.is_ready = True
    assert not choice.is_building
    assert choice.choose(LAYER, batch).name == "flashinfer-fa2"


def test_a_caller_may_wait_for_it() -> None:
    choice, (_, fa2, _, _) = auto(table_of(point(32, 4096, WIN)))
    fa2.is_ready = False
    choice.choose(LAYER, batch_of((32, 4096)))
    choice.wait()
    assert fa2.is_ready
    assert not choice.is_building


def test_ranks_wait_for_it() -> None:
    choice, (_, fa2, _, _) = auto(table_of(point(32, 4096, WIN)), waits=True)
    fa2.is_ready = False
    assert choice.choose(LAYER, batch_of((32, 4096))).name == "flashinfer-fa2"
    assert not choice.is_building


@pytest.mark.parametrize("name", ATTENTION_NAMES[2:])
def test_a_forced_backend_that_does_not_serve_raises(name: str) -> None:
    choice = make_attention(name, CPU)
    assert choice.is_forced
    with pytest.raises(ConfigError, match=f"forced does not serve this model.*{name}"):
        choice.plan(ON_CPU, batch_of((1, 8)))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention must be one of auto, torch"):
        make_attention("flash", CPU)


def test_on_a_cpu_it_is_torch() -> None:
    choice = make_attention("auto", CPU, num_layers=32)
    assert [type(each) for each in choice.backends] == [TorchBackend]
    assert choice.choose(ON_CPU, batch_of((1, 8))).name == "torch"


def test_nothing_is_imported_before_it_is_used() -> None:
    """Not even where both are installed: an import of FlashInfer takes seconds."""
    code = (
        "import sys, torch; from tierkv.engine.backends.factory import make_attention;"
        "[make_attention(name, torch.device('cpu')) for name in"
        " ('auto', 'torch', 'flash-attn', 'flashinfer-fa2', 'flashinfer-fa3')];"
        "sys.exit(any(name in sys.modules for name in ('flashinfer', 'flash_attn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_graph_has_torch_or_a_varying_batch_of_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.engine.backends.flash.flash_head_dims", lambda: frozenset({128}))
    flash, plain = FlashBackend(), TorchBackend()
    static = batch_of((1, 8), (1, 8), kv_range=(1, 4096))
    static.is_even = True
    assert flash.why_not(LAYER, static) is None
    assert "CUDA graph" in str(plain.why_not(LAYER, static))
    static.is_even = False
    assert "CUDA graph" in str(flash.why_not(LAYER, static))
    with pytest.raises(RuntimeError, match="no attention backend serves"):
        AttentionChoice([flash, plain]).choose(LAYER, static)


def test_graphs_need_a_backend_that_can_be_captured_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.engine.backends.flash.flash_head_dims", lambda: frozenset({128}))

    def layout(dim: int, size: int = 256) -> BlockLayout:
        return BlockLayout.uniform(num_layers=2, block_size=size, kv_heads=2, head_dim=dim, dtype="bfloat16")

    plain = AttentionChoice([FlashBackend(), TorchBackend()])
    assert plain.can_capture(layout(128), "cuda")
    assert not plain.can_capture(layout(80), "cuda")
    assert not plain.can_capture(layout(128, size=16), "cuda")
    assert not plain.can_capture(layout(128), "cpu")
    assert not AttentionChoice([TorchBackend()], is_forced=True).can_capture(layout(128), "cuda")


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("auto", ["cpu", "cuda"]),
        ("torch", ["cpu"]),
        ("flash-attn", ["cuda"]),
        ("flashinfer-fa2", []),
        ("flashinfer-fa3", []),
    ],
)
def test_a_forced_backend_is_not_bypassed_by_a_cascade(name: str, devices: list[str]) -> None:
    """On a GPU flash-attn reads a shared prefix, on a CPU torch does."""
    choice = make_attention(name, CPU)
    assert [device for device in ("cpu", "cuda") if choice.can_cascade(device)] == devices


def test_no_graph_is_captured_while_kernels_are_compiled() -> None:
    attention: Any = SimpleNamespace(can_capture=lambda *_: True, is_building=True)
    cache: Any = SimpleNamespace(layout=None, config=SimpleNamespace(block_size=16), ranks=SimpleNamespace(size=1))
    graphs = GraphedModel(SimpleNamespace(device=CPU), cache, attention=attention)
    captured = []
    graphs._is_usable = True  # as on a GPU
    graphs._try_capture = captured.append  # type: ignore[assignment, method-assign]
    steps = [SequenceStep(block_table=[1], num_past=3, num_new=1)]
    for _ in range(3):
        assert graphs.run(steps, [1]) is None
    assert not captured
    attention.is_building = False
    assert graphs.run(steps, [1]) is None
    assert len(captured) == 1
