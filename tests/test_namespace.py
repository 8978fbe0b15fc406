from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tierkv.layout import BlockLayout
from tierkv.namespace import Namespace, differing_fields

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=16, kv_heads=2, head_dim=8, dtype="float32")
BASE = Namespace(weights="w", architecture={"rope": {"theta": 1e4}}, layout=LAYOUT, name="model")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "x"},
        {"architecture": {"rope": {"theta": 1e6}}},
        {"layout": replace(LAYOUT, dtype="bfloat16")},
        {"layout": replace(LAYOUT, block_size=32)},
        {"adapter": "lora"},
        {"salt": "tenant"},
        {"tp_rank": 1, "tp_size": 2},
        {"lossy_codec": "lossy-int8"},
    ],
)
def test_whatever_decides_the_bytes_changes_the_digest(change: dict[str, Any]) -> None:
    changed = replace(BASE, **change)
    assert changed.digest != BASE.digest
    assert differing_fields(changed.identity(), BASE.identity())


def test_a_name_is_not_part_of_the_identity() -> None:
    assert replace(BASE, name="another").digest == BASE.digest


def test_the_description_does_not_hold_the_salt() -> None:
    assert b"secret-tenant" not in replace(BASE, salt="secret-tenant").describe()


def test_differences_are_named_down_to_the_field() -> None:
    other = replace(BASE, architecture={"rope": {"theta": 1e6}})
    left, right = json.loads(BASE.describe()), json.loads(other.describe())
    assert differing_fields(left, right) == ["architecture.rope.theta"]
