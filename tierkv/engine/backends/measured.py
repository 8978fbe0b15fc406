"""The measured times of attention backends on one device, and which of them is faster than flash-attn for a batch.

`python -m benchmarks.attention` writes such a table. A backend is faster only where every measured point around a batch
says so; where nothing near was measured, none is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from tierkv.engine.backends.protocol import Batch, LayerShape
from tierkv.errors import ConfigError

__all__ = ["AttentionTable", "BatchSize", "MeasuredPoint", "load_table", "packaged_table", "save_table", "table_place"]

_TABLES = Path(__file__).parent / "tables"
_FLASH = "flash-attn"
_VERSION = 1
_NEAR = 2.0  # a point speaks for sizes between its half and its double
_EQUAL = 1.05  # new tokens on top of a measured length
_MARGIN = 0.97  # of flash-attn's time: runs of the same kernel differ by 1 to 2 percent
_UNKNOWN_PLAN_US = 500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """The size of a batch. new, kv: new tokens, and tokens with K and V, of a sequence, the least and the most.

    For sequences of different lengths the least is their mean, and the most the longest one.
    """

    sequences: int
    new: tuple[float, float]
    kv: tuple[float, float]

    @classmethod
    def of(cls, batch: Batch) -> BatchSize:
        """Return the size of a batch; of a static one, of all that it may hold."""
        sequences = len(batch.query_starts) - 1
        new = (batch.query_starts[-1] / sequences, float(batch.max_new))
        if batch.kv_range is not None:
            low, high = batch.kv_range
            return cls(sequences=sequences, new=new, kv=(low, high))
        kv = (sum(batch.kv_lengths) / sequences, float(max(batch.kv_lengths)))
        return cls(sequences=sequences, new=new, kv=kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """Times of one batch. `sequences` sequences, each with `new` new tokens of `kv` tokens.

    us: microseconds of one layer, by backend. plan_us: of one plan, by backend; a backend without one takes half a
    millisecond. window: of a layer that has one.
    """

    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    new: int
    kv: int
    us: Mapping[str, float]
    plan_us: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_heads, self.head_dim, self.sequences, self.new, self.kv)
        if min(sizes) <= 0 or self.new > self.kv:
            raise ConfigError(f"the sizes of a measured point must be positive and fit each other, got {self}")
        times = [*self.us.values(), *self.plan_us.values()]
        if _FLASH not in self.us or min(times) <= 0:
            raise ConfigError(f"a measured point needs positive times, and flash-attn's among them, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTable:
    """What was measured on one device. source: when and with which versions."""

    device: str
    points: tuple[MeasuredPoint, ...]
    source: str = ""
    version: int = _VERSION

    def faster(self, layer: LayerShape, size: BatchSize, *, num_layers: int) -> list[str]:
        """Return the backends that are faster than flash-attn for such layers of a batch, the fastest first.

        num_layers: layers of one plan; its time is divided among them.
        """
        near = [point for point in self.points if _fits(point, layer)]
        ends = [_around(near, size, end) for end in (0, 1)]
        if not all(ends):
            return []
        ratios: dict[str, float] = {}
        for name in ends[0][0].us:
            found = [_ratio(point, name, num_layers) for points in ends for point in points]
            if name != _FLASH and all(ratio is not None and ratio < _MARGIN for ratio in found):
                ratios[name] = max(ratio for ratio in found if ratio is not None)
        return sorted(ratios, key=lambda name: ratios[name])


def _fits(point: MeasuredPoint, layer: LayerShape) -> bool:
    """Return whether a point was measured with such layers: a window between half and double of theirs."""
    if (point.heads, point.kv_heads, point.head_dim) != (layer.heads, layer.kv_heads, layer.k_dim):
        return False
    if point.window is None or layer.window is None:
        return point.window is layer.window
    return _is_within(point.window, layer.window)


def _around(points: list[MeasuredPoint], size: BatchSize, end: int) -> list[MeasuredPoint]:
    """Return the points that speak for the least (0) or the most (1) that a batch may be.

    They are near it, and in each of its sizes equal to it or the next below and above of those that are left.
    """
    axes: list[tuple[Callable[[MeasuredPoint], int], float]] = [
        (lambda point: point.new, size.new[end]),
        (lambda point: point.sequences, size.sequences),
        (lambda point: point.kv, size.kv[end]),
    ]
    for value_of, wanted in axes:
        points = [point for point in points if _is_within(value_of(point), wanted)]
    for value_of, wanted in axes:
        values = {value_of(point) for point in points}
        equal = {value for value in values if _is_within(value, wanted, _EQUAL)}
        below, above = (sorted(value for value in values if is_above is (value > wanted)) for is_above in (False, True))
        kept = equal or {*below[-1:], *above[:1]}
        points = [point for point in points if value_of(point) in kept]
    return points


def _is_within(measured: float, wanted: float, factor: float = _NEAR) -> bool:
    return measured <= factor * wanted and wanted <= factor * measured


def _ratio(point: MeasuredPoint, name: str, num_layers: int) -> float | None:
    """Return a backend's time as a share of flash-attn's; None if it was not measured."""
    if name not in point.us:
        return None
    plan_us = point.plan_us.get(name, _UNKNOWN_PLAN_US)
    return (point.us[name] + plan_us / num_layers) / point.us[_FLASH]


def table_place(device_name: str) -> Path:
    """Return where a machine keeps the table of a device, below the user's cache directory for tierkv."""
    return Path("attention", re.sub(r"[^a-z0-9]+", "_", device_name.lower()) + ".json")


def load_table(path: Path) -> AttentionTable:
    """Read a table. Raises ConfigError for a file that is none, or that cannot be read."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=AttentionTable)
    except (OSError, msgspec.MsgspecError) as exc:
        raise ConfigError(
            f"{path} is no table of attention times: {exc}", hint="python -m benchmarks.attention writes one"
        ) from exc
    if table.version != _VERSION:
        raise ConfigError(f"{path} is a table of version {table.version}, this tierkv reads version {_VERSION}")
    return table


def save_table(table: AttentionTable, path: Path) -> None:
    """Write a table, one point a line, and its folder. A reader finds the old table or the new one."""
    head = {"version": table.version, "device": table.device, "source": table.source}
    lines = ",\n  ".join(json.dumps(_plain(point)) for point in table.points)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(head)[:-1] + ',\n "points": [\n  ' + lines + "\n ]}\n", encoding="utf-8")
    unfinished.replace(path)


def _plain(point: MeasuredPoint) -> dict[str, object]:
    return {name: value for name, value in asdict(point).items() if value is not None and value != {}}


def packaged_table(device_name: str) -> AttentionTable | None:
    """Return the table that comes with tierkv for a device; None if it has none."""
    tables = (load_table(path) for path in sorted(_TABLES.glob("*.json")))
    return next((table for table in tables if table.device == device_name), None)
