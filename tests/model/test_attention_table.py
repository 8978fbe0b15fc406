"""Which backend a table of measured times chooses, and what is no table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attention_stubs import (
    CPU,
    LAYER,
    MEASURED,
    NO_PLAN,
    WIN,
    auto,
    batch_of,
    point,
    table_of,
    written,
)

from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.measured import (
    AttentionTable,
    BatchSize,
    load_table,
    packaged_table,
    save_table,
    table_place,
)
from tierkv.engine.graph_inputs import GraphShape
from tierkv.errors import ConfigError


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


def test_a_machines_table_has_a_plain_name() -> None:
    assert table_place("NVIDIA H200 (80 GB)/../x").as_posix() == "attention/nvidia_h200_80_gb_x.json"


def test_a_written_point_is_valid(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(written(1, '{"flash-attn": 1}'))
    assert load_table(tmp_path / "table.json").points
