"""Backends that compute nothing, batches that are only sizes, and measured figures: for tests of the choice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.measured import (
    AttentionTable,
    MeasuredPoint,
)
from tierkv.engine.backends.protocol import LayerShape

__all__ = [
    "CPU",
    "LAYER",
    "MEASURED",
    "NO_PLAN",
    "ON_CPU",
    "WIN",
    "Stub",
    "auto",
    "batch_of",
    "measured",
    "point",
    "table_of",
    "written",
]

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
