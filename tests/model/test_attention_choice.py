"""Which attention backend serves which batch: by what was measured, by what is compiled, or because it is forced."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_flashinfer import PrefillWrapper, fake_flashinfer

from tierkv.engine.attention import SequenceStep
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import ATTENTION_NAMES, make_attention
from tierkv.engine.backends.flash import FlashBackend
from tierkv.engine.backends.flashinfer import (
    FlashInferBackend,
    FlashInferLimits,
    FlashInferWorkspace,
    flashinfer_limits,
)
from tierkv.engine.backends.measured import (
    AttentionTable,
    BatchSize,
    MeasuredPoint,
    load_table,
    packaged_table,
    save_table,
    table_place,
)
from tierkv.engine.backends.protocol import LayerShape
from tierkv.engine.backends.torch_attention import TorchBackend
from tierkv.engine.graph_inputs import GraphShape
from tierkv.engine.graphs import GraphedModel
from tierkv.errors import ConfigError
from tierkv.values.layout import BlockLayout

CPU = torch.device("cpu")
LAYER = LayerShape("cuda", torch.bfloat16, 32, 8, 128, 128, 256, 0.1)
ON_CPU = replace(LAYER, device="cpu")


class Stub:
    """A backend that serves what it is told to."""

    def __init__(self, name: str, reason: str | None = None) -> None:
        self.name = name
        self.reason = reason
        self.is_ready = True

    def why_not(self, layer: LayerShape, batch: object = None) -> str | None:
        return self.reason

    def prepare(self, layer: LayerShape, *, wait: bool) -> bool:
        self.is_ready = self.is_ready or wait
        return self.is_ready

    def plan(self, layer: LayerShape, batch: object) -> Any:
        return self.name


def batch_of(*sizes: tuple[int, int], kv_range: tuple[int, int] | None = None) -> Any:
    """Return a batch of sequences with (new tokens, tokens with K and V)."""
    starts = [sum(new for new, _ in sizes[:i]) for i in range(len(sizes) + 1)]
    return SimpleNamespace(
        query_starts=starts,
        kv_lengths=[kv for _, kv in sizes],
        max_new=max(new for new, _ in sizes),
        kv_range=kv_range,
    )


def auto(
    table: AttentionTable | None, *, num_layers: int = 32, waits: bool = False
) -> tuple[AttentionChoice, list[Stub]]:
    flash, fa2, fa3, plain = (Stub(name) for name in ("flash-attn", "flashinfer-fa2", "flashinfer-fa3", "torch"))
    choice = AttentionChoice([flash, fa2, plain], faster=[fa2, fa3], table=table, num_layers=32, waits=waits)
    return choice, [flash, fa2, fa3, plain]


def point(new: int, kv: int, us: dict[str, float], *, sequences: int = 1, **options: Any) -> MeasuredPoint:
    return MeasuredPoint(heads=32, kv_heads=8, head_dim=128, sequences=sequences, new=new, kv=kv, us=us, **options)


def table_of(*points: MeasuredPoint) -> AttentionTable:
    return AttentionTable(device="test", points=points)


def written(new: int | str, us: str) -> str:
    """Return the text of a table with one point."""
    sizes = f'"heads": 1, "kv_heads": 1, "head_dim": 8, "sequences": 1, "new": {new}, "kv": 8'
    return f'{{"version": 1, "device": "x", "points": [{{{sizes}, "us": {us}}}]}}'


WIN = {"flash-attn": 100.0, "flashinfer-fa2": 50.0}
NO_PLAN = {"flashinfer-fa2": 0.01}


def measured(sequences: int, new: int, kv: int, flash: float, fa2: float, fa3: float) -> MeasuredPoint:
    us = {"flash-attn": flash, "flashinfer-fa2": fa2, "flashinfer-fa3": fa3}
    return point(new, kv, us, sequences=sequences)


MEASURED = table_of(  # on one H200
    measured(16, 1, 8192, 133.8, 133.8, 453.9),
    measured(64, 1, 2048, 132.3, 134.8, 511.7),
    measured(1, 32, 8192, 48.2, 49.3, 123.5),
    measured(1, 32, 32768, 143.3, 68.5, 467.0),
    measured(8, 128, 4096, 234.6, 215.6, 133.3),
)


# --- By the table --------------------------------------------------------------------------------------


def test_without_a_table_it_is_flash_attn() -> None:
    choice, _ = auto(None)
    assert choice.choose(LAYER, batch_of((32, 32768))).name == "flash-attn"


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (batch_of((32, 32800)), "flashinfer-fa2"),
        (batch_of((32, 8192)), "flash-attn"),
        (batch_of((1, 32800)), "flash-attn"),
        (batch_of(*[(128, 4224)] * 8), "flashinfer-fa3"),
        (batch_of(*[(1, 8192)] * 16), "flash-attn"),
        (batch_of(*[(1, 2048)] * 64), "flash-attn"),
        (batch_of((4096, 4096)), "flash-attn"),
        (batch_of((32, 32800), kv_range=GraphShape(1, 32, 256).kv_range(256)), "flashinfer-fa2"),
        (batch_of((32, 32800), kv_range=GraphShape(1, 32, 512).kv_range(256)), "flash-attn"),
        (batch_of((32, 32800), kv_range=GraphShape(1, 32, 16).kv_range(256)), "flash-attn"),
    ],
)
def test_a_batch_gets_what_was_measured_near_it(batch: Any, name: str) -> None:
    choice, _ = auto(MEASURED)
    assert choice.choose(LAYER, batch).name == name


def test_the_packaged_table_of_an_h200_never_chooses_what_was_slower_there() -> None:
    table = packaged_table("NVIDIA H200")
    assert table is not None
    choice, _ = auto(table)
    for each in table.points:
        layer = replace(LAYER, heads=each.heads, kv_heads=each.kv_heads, k_dim=each.head_dim, window=each.window)
        batch = batch_of(*[(each.new, each.kv)] * each.sequences)
        assert each.us[choice.choose(layer, batch).name] <= each.us["flash-attn"], each
    for batch in (batch_of((32, 32800)), batch_of(*[(128, 4224)] * 8)):
        assert choice.choose(LAYER, batch).name != "flash-attn", "the two gains that it is there for"


def test_other_layers_than_the_measured_ones_are_left_to_flash_attn() -> None:
    choice, _ = auto(MEASURED)
    batch = batch_of((32, 32800))
    assert choice.choose(LAYER, batch).name == "flashinfer-fa2"
    for other in ({"heads": 64}, {"kv_heads": 4}, {"k_dim": 64, "v_dim": 64}, {"window": 4096}):
        assert choice.choose(replace(LAYER, **other), batch).name == "flash-attn", other


def test_a_device_without_a_packaged_table_has_none() -> None:
    assert packaged_table("NVIDIA Nothing") is None


@pytest.mark.parametrize(
    ("batch", "is_near"),
    [
        (batch_of((32, 4096)), True),
        (batch_of((16, 2048)), True),
        (batch_of((64, 8192)), True),
        (batch_of((15, 4096)), False),
        (batch_of((65, 4096)), False),
        (batch_of((32, 2047)), False),
        (batch_of((32, 8193)), False),
        (batch_of((32, 4096), (32, 4096)), True),
        (batch_of((32, 4096), (32, 4096), (32, 4096)), False),
        (batch_of((60, 2500), (60, 8200)), False),
        (batch_of((4, 4096), (90, 4096)), False),
        (batch_of((32, 0), kv_range=(2048, 8192)), True),
        (batch_of((32, 0), kv_range=(2047, 8192)), False),
        (batch_of((32, 0), kv_range=(2048, 8193)), False),
    ],
)
def test_a_point_speaks_for_sizes_from_half_to_double(batch: Any, is_near: bool) -> None:
    table = table_of(point(32, 4096, WIN))
    assert table.faster(LAYER, BatchSize.of(batch), num_layers=32) == (["flashinfer-fa2"] if is_near else [])


def test_every_point_near_a_batch_must_agree() -> None:
    loss = point(64, 4096, {"flash-attn": 100.0, "flashinfer-fa2": 98.0}, plan_us=NO_PLAN)
    size = BatchSize.of(batch_of((40, 4096)))
    assert table_of(point(32, 4096, WIN)).faster(LAYER, size, num_layers=32)
    assert not table_of(point(32, 4096, WIN), loss).faster(LAYER, size, num_layers=32)
    assert table_of(point(32, 4096, WIN), replace(loss, new=128)).faster(LAYER, size, num_layers=32)


def test_points_of_the_same_size_come_before_those_around_it() -> None:
    lost = {"flash-attn": 100.0, "flashinfer-fa2": 120.0}
    size = BatchSize.of(batch_of((32, 4224)))
    around = [point(16, 4096, lost), point(64, 4096, lost), point(32, 8192, lost), point(32, 4096, lost, sequences=2)]
    assert table_of(point(32, 4096, WIN), *around).faster(LAYER, size, num_layers=32)
    for other in around:  # if nothing of its size was measured, one around it speaks
        assert not table_of(other).faster(LAYER, size, num_layers=32)
        assert table_of(replace(other, us=WIN)).faster(LAYER, size, num_layers=32)


def test_only_the_next_points_below_and_above_speak() -> None:
    lost = {"flash-attn": 100.0, "flashinfer-fa2": 120.0}
    size = BatchSize.of(batch_of((40, 6000)))
    grid = [point(new, kv, WIN) for new in (32, 48) for kv in (4096, 8192)]
    assert table_of(*grid, point(32, 3000, lost), point(80, 4096, lost)).faster(LAYER, size, num_layers=32)
    for corner in grid:
        spoiled = [replace(each, us=lost) if each is corner else each for each in grid]
        assert not table_of(*spoiled).faster(LAYER, size, num_layers=32), corner


def test_a_graph_needs_a_gain_at_both_ends_of_what_it_holds() -> None:
    wide = BatchSize.of(batch_of((32, 0), kv_range=(4096, 16384)))
    short, long = point(32, 4096, WIN), point(32, 16384, WIN)
    lost = replace(long, us={"flash-attn": 100.0, "flashinfer-fa2": 101.0})
    assert table_of(short, long).faster(LAYER, wide, num_layers=32)
    assert not table_of(short, lost).faster(LAYER, wide, num_layers=32)
    assert not table_of(lost, replace(short, kv=2048)).faster(LAYER, wide, num_layers=32)


@pytest.mark.parametrize(("us", "is_faster"), [(96.0, True), (97.5, False), (101.0, False)])
def test_a_gain_within_the_noise_is_none(us: float, is_faster: bool) -> None:
    table = table_of(point(32, 4096, {"flash-attn": 100.0, "flashinfer-fa2": us}, plan_us=NO_PLAN))
    assert bool(table.faster(LAYER, BatchSize.of(batch_of((32, 4096))), num_layers=32)) is is_faster


def test_a_plan_costs_its_share_of_each_layer() -> None:
    table = table_of(point(32, 4096, WIN, plan_us={"flashinfer-fa2": 900.0}))
    size = BatchSize.of(batch_of((32, 4096)))
    assert table.faster(LAYER, size, num_layers=32)
    assert not table.faster(LAYER, size, num_layers=16)


def test_a_plan_that_was_not_timed_is_dear() -> None:
    table, size = table_of(point(32, 4096, WIN)), BatchSize.of(batch_of((32, 4096)))
    assert table.faster(LAYER, size, num_layers=16)
    assert not table.faster(LAYER, size, num_layers=8)


def test_the_fastest_that_serves_is_taken() -> None:
    times = {"flash-attn": 100.0, "flashinfer-fa2": 60.0, "flashinfer-fa3": 40.0}
    choice, (_, _, fa3, _) = auto(table_of(point(32, 4096, times)))
    batch = batch_of((32, 4096))
    assert choice.choose(LAYER, batch).name == "flashinfer-fa3"
    fa3.reason = "not on this device"
    assert choice.choose(LAYER, batch).name == "flashinfer-fa2"


def test_windows_are_measured_apart() -> None:
    table = table_of(point(32, 4096, WIN, window=1024))
    size = BatchSize.of(batch_of((32, 4096)))
    assert not table.faster(LAYER, size, num_layers=32)
    assert table.faster(replace(LAYER, window=1500), size, num_layers=32)
    assert not table.faster(replace(LAYER, window=4000), size, num_layers=32)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = AttentionTable(
        device="a GPU",
        source="here",
        points=(point(32, 4096, WIN, plan_us=NO_PLAN), point(1, 64, WIN, sequences=4, window=32)),
    )
    path = tmp_path / "new" / "table.json"
    save_table(table, path)
    assert load_table(path) == table
    assert [each.name for each in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "device": "x", "points": []}',
        '{"version": 1, "device": "x", "points": [{"heads": 1}]}',
        written(0, '{"flash-attn": 1}'),
        written(9, '{"flash-attn": 1}'),
        written('"1"', '{"flash-attn": 1}'),
        written(1, "{}"),
        written(1, '{"flash-attn": 0}'),
        written(1, '{"flash-attn": "fast"}'),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="table"):
        make_attention("auto", CPU, table=path)


# --- By what serves ------------------------------------------------------------------------------------


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


def test_a_machines_table_has_a_plain_name() -> None:
    assert table_place("NVIDIA H200 (80 GB)/../x").as_posix() == "attention/nvidia_h200_80_gb_x.json"


def test_a_written_point_is_valid(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(written(1, '{"flash-attn": 1}'))
    assert load_table(tmp_path / "table.json").points


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
    ("name", "may"),
    [("auto", True), ("torch", True), ("flash-attn", True), ("flashinfer-fa2", False), ("flashinfer-fa3", False)],
)
def test_a_forced_backend_is_not_bypassed_by_a_cascade(name: str, may: bool) -> None:
    assert make_attention(name, CPU).can_cascade() is may


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


# --- FlashInfer's own reasons --------------------------------------------------------------------------


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
