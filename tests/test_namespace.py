from __future__ import annotations

import copy
import json
import operator
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace, differing_fields, parse_description

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


def test_equal_namespaces_are_one_key() -> None:
    again = Namespace(weights="w", architecture={"rope": {"theta": 1e4}}, layout=LAYOUT, name="model")
    assert {BASE: 1, again: 2} == {BASE: 2}
    assert len({BASE, replace(BASE, architecture={"rope": {"theta": 1e6}}), replace(BASE, salt="tenant")}) == 3
    for copied in (pickle.loads(pickle.dumps(BASE)), copy.deepcopy(BASE)):
        assert copied == BASE
        assert hash(copied) == hash(BASE)


def test_a_namespace_does_not_follow_the_values_that_it_was_made_from() -> None:
    given: dict[str, Any] = {"rope": {"theta": 1e4}, "layers": [1, [2]]}
    namespace = replace(BASE, architecture=given)
    digest = namespace.digest
    given["rope"]["theta"] = 1e6
    given["layers"][1].append(3)
    given["more"] = 1
    assert namespace.digest == digest
    assert namespace.identity()["architecture"] == {"rope": {"theta": 1e4}, "layers": [1, [2]]}
    namespace.identity()["architecture"]["rope"]["theta"] = 1e6
    assert namespace.digest == digest


CHANGES: dict[str, Callable[[Any], object]] = {
    "weights": lambda namespace: setattr(namespace, "weights", "x"),
    "architecture": lambda namespace: namespace.architecture.update(rope=None),
    "item": lambda namespace: operator.setitem(namespace.architecture, "rope", None),
    "deleted item": lambda namespace: operator.delitem(namespace.architecture, "rope"),
    "or": lambda namespace: operator.ior(namespace.architecture, {"rope": None}),
    "nested item": lambda namespace: operator.setitem(namespace.architecture["rope"], "theta", 1e6),
    "element": lambda namespace: operator.setitem(namespace.architecture["layers"], 0, 9),
    "popped": lambda namespace: namespace.architecture.pop("rope"),
    "cleared": lambda namespace: namespace.architecture["rope"].clear(),
    "layer": lambda namespace: operator.setitem(namespace.layout.layers, 0, None),
    "layer's heads": lambda namespace: setattr(namespace.layout.layers[0], "kv_heads", 4),
    "block size": lambda namespace: setattr(namespace.layout, "block_size", 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_namespace_and_all_its_fields_refuse_changes(change: Callable[[Any], object]) -> None:
    layout = BlockLayout(block_size=16, dtype="float32", layers=list(LAYOUT.layers))  # type: ignore[arg-type]
    namespace = replace(BASE, architecture={"rope": {"theta": 1e4}, "layers": [1, [2]]}, layout=layout)
    digest, number = namespace.digest, hash(namespace)
    with pytest.raises((TypeError, AttributeError)):
        change(namespace)
    assert (namespace.digest, hash(namespace)) == (digest, number)


def test_an_architecture_of_other_than_json_values_is_refused() -> None:
    for wrong in ({"x": {1, 2}}, {"x": [b"bytes"]}, json.loads('{"x":' * 900 + "1" + "}" * 900)):
        with pytest.raises(ConfigError):
            replace(BASE, architecture=wrong).describe()


def test_the_description_does_not_hold_the_salt() -> None:
    assert b"secret-tenant" not in replace(BASE, salt="secret-tenant").describe()


def test_differences_are_named_down_to_the_field() -> None:
    other = replace(BASE, architecture={"rope": {"theta": 1e6}})
    left, right = json.loads(BASE.describe()), json.loads(other.describe())
    assert differing_fields(left, right) == ["architecture.rope.theta"]


def test_a_description_has_the_digest_of_what_it_describes() -> None:
    odd = {2: float("inf"), 10: "é", "deep": [{"a": None}]}
    for namespace in (BASE, replace(BASE, salt="tenant", architecture=odd), replace(BASE, name="a\udcff")):
        described = parse_description(namespace.describe())
        assert described.digest == namespace.digest
        assert described.layout == LAYOUT


@pytest.mark.parametrize("key", sorted(json.loads(BASE.describe()).keys() - {"name", "format_version"}))
def test_no_field_of_a_description_can_change_under_the_same_digest(key: str) -> None:
    fields = json.loads(BASE.describe())
    other = {"tp_rank": 1, "tp_size": 2, "block_size": 32, "dtype": "float16", "layers": [[1, 16, 0]]}
    fields[key] = other.get(key, {"rope": {}} if key == "architecture" else "other")
    fields["tp_size"] = max(fields["tp_size"], fields["tp_rank"] + 1)
    assert parse_description(json.dumps(fields).encode()).digest != BASE.digest


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(BASE.describe()), **fields}).encode()


HOSTILE = (
    *(b"", b"[]", b"null", b"1", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"a":' * 30_000, b" " * (1 << 16) + b"{}"),
    *(changed(extra=1), changed(weights=""), changed(weights=3), changed(tp_rank=1), changed(tp_rank=-1)),
    *(changed(tp_size=True), changed(format_version=2), changed(lossy_codec=""), changed(architecture=[])),
    *(
        changed(layers=[[1, 1]]),
        changed(layers=[[2, 1, 0]]),
        changed(layers=[[1, 0, 0]]),
        changed(layers=[[1.5, 1, 1]]),
        changed(layers=["abc"]),
    ),
    *(changed(layers=[[1, 1, 0.0]]), changed(layers=[[1, 1, False]]), changed(layers=[[1, 1, -1]])),
    *(changed(layers=[[1 << 60, 1, 1]]), changed(layers=[[1, 1, 1]] * 5000), changed(layers=[]), changed(layers=[3])),
    *(changed(block_size=10**9), changed(dtype="int3"), changed(dtype=["a"]), changed(name="\udcff")),
    *(changed(weights="\udcff"), changed(architecture={"\udcff": 1}), b'{"weights":1e999999}', b"9" * 10_000),
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_description_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_description(text)


def test_a_description_that_is_too_long_is_not_written() -> None:
    with pytest.raises(ConfigError, match="bytes"):
        replace(BASE, architecture={"x": "y" * (1 << 16)}).describe()
