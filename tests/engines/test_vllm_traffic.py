"""Mixed traffic through the connector on vLLM's real engine: nothing grows that should not."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vllm_life import start

import benchmarks.vllm_traffic as traffic

AT_REST = traffic.Sample(
    minute=0.0,
    requests=0,
    memory_mib=500.0,
    mapped_mib=160.0,
    descriptors=60,
    threads=6,
    objects=1000,
    known=0,
    warm_blocks=240,
    pinned_slots=0,
    store_mib=8.0,
)


@pytest.mark.parametrize(
    ("field", "step"),
    [
        ("memory_mib", 2.0),
        ("descriptors", 1),
        ("threads", 1),
        ("objects", 300),
        ("pinned_slots", 1),
        ("store_mib", 2.0),
    ],
)
def test_what_grows_with_every_sample_is_found_and_nothing_else(field: str, step: float) -> None:
    grown: list[Any] = [
        dataclasses.replace(AT_REST, **{field: getattr(AT_REST, field) + at * step}) for at in range(15)
    ]
    assert list(traffic.growth(grown, mapped_mib=40)) == [field]
    assert traffic.growth([AT_REST] * 15, mapped_mib=40) == {}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run make test-engines")
def test_mixed_traffic_leaves_nothing_behind() -> None:
    """TIERKV_TRAFFIC_MINUTES names how long it lasts: ten minutes for a careful look."""
    minutes = os.environ.get("TIERKV_TRAFFIC_MINUTES", "0.6")
    lines = start(str(Path(traffic.__file__)), "--minutes", minutes, "--every", "2", "--cold-mib", "8")
    *samples, counts = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(samples) > 5
    assert samples[-1]["warm_blocks"] or samples[-2]["warm_blocks"]
    assert counts["loaded_blocks"] > 20 and counts["saved_blocks"] > 100
    assert not counts.get("failed_blocks")
