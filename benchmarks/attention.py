"""The time of each attention backend by the shape of a batch, as a ratio to flash-attn 2; writes what is chosen from.

One kind of layer, by default Llama-3.1-8B's, over a block-major pool with scattered blocks. Every time is the GPU's own
for one layer (the launches are queued behind a pause), the median over rounds in which the backends take turns. A plan
is timed on the CPU. Each result is compared with flash-attn's: a backend that differs is not written.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ttft import machine
from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.measured import (
    AttentionTable,
    BatchSize,
    MeasuredPoint,
    load_table,
    save_table,
    table_place,
)
from tierkv.engine.backends.protocol import AttentionBackend, LayerShape, PagedQuery
from tierkv.errors import ConfigError
from tierkv.storage.hot import HotPool
from tierkv.tools.options import cache_directory
from tierkv.values.layout import BlockLayout

__all__ = ["SHAPES", "Choice", "Shape", "choices", "main", "measure", "merge"]

_BLOCK = 256
_LAYERS = 8  # so many that no layer's K and V stay in the L2 cache until the next round
_FLASH = "flash-attn"
_OTHERS = ("flashinfer-fa2", "flashinfer-fa3")
_MOST_ERROR = 1e-2  # of the root mean square; bfloat16 rounds to 2e-3
_PAUSE_CYCLES = 20_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """`sequences` sequences, each with `new` new tokens of `kv` tokens."""

    sequences: int
    new: int
    kv: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What attends a shape, and the microseconds of one layer, beside flash-attn's."""

    shape: Shape
    name: str
    us: float
    flash_us: float


# Decoding; a short suffix over a cached prefix; pieces of prompts beside each other; long pieces; nothing cached.
SHAPES = (
    *(Shape(count, 1, kv) for count, kv in [(1, 8192), (1, 32768), (4, 8192), (16, 2048), (16, 8192), (64, 2048)]),
    *(Shape(1, new, kv) for kv in (2048, 4096, 8192, 16384, 32768, 65536, 131072) for new in (32, 128)),
    *(Shape(count, new, kv) for count in (2, 4, 8) for new in (32, 128) for kv in (4096, 8192, 16384)),
    *(Shape(1, new, kv) for new in (512, 2048) for kv in (4096, 8192, 16384, 32768, 65536)),
    *(Shape(4, 512, kv) for kv in (2048, 4096, 8192)),
    *(Shape(1, new, new) for new in (512, 1024, 4096, 8192, 16384)),
    *(Shape(8, new, new) for new in (512, 1024)),
)


class _Bench:
    """A pool, and the backends that are compared over it."""

    def __init__(self, layer: LayerShape, backends: Sequence[AttentionBackend], most_tokens: int) -> None:
        self.layer = layer
        self.backends = backends
        self.device = torch.device("cuda")
        layout = BlockLayout.uniform(
            num_layers=_LAYERS,
            block_size=_BLOCK,
            kv_heads=layer.kv_heads,
            head_dim=layer.k_dim,
            dtype=str(layer.dtype).removeprefix("torch."),
        )
        self.pool = HotPool(layout, most_tokens // _BLOCK, self.device)
        self.pool.blocks.normal_()

    def measure(self, shape: Shape, *, rounds: int) -> tuple[MeasuredPoint, dict[str, float]]:
        """Return the times of all backends, and each one's difference from flash-attn's result."""
        ways = {backend.name: self._prepare(backend, shape) for backend in self.backends}
        wanted = ways[_FLASH].results()
        errors = {name: _difference(way.results(), wanted) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(way.device_us())
        us = {name: round(statistics.median(each), 2) for name, each in times.items() if errors[name] <= _MOST_ERROR}
        plans = {name: round(ways[name].plan_us(), 1) for name in us if name != _FLASH}
        layer = self.layer
        point = MeasuredPoint(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.k_dim,
            sequences=shape.sequences,
            new=shape.new,
            kv=shape.kv,
            us=us,
            plan_us=plans,
            window=layer.window,
        )
        return point, errors

    def _prepare(self, backend: AttentionBackend, shape: Shape) -> _Way:
        blocks = -(-shape.kv // _BLOCK)
        free = random.Random(0).sample(range(self.pool.num_blocks), shape.sequences * blocks)
        steps = [
            SequenceStep(
                block_table=free[i * blocks : (i + 1) * blocks], num_past=shape.kv - shape.new, num_new=shape.new
            )
            for i in range(shape.sequences)
        ]
        choice = AttentionChoice([backend], is_forced=True)

        def build() -> AttentionBatch:
            return build_batch(self.pool, steps, block_size=_BLOCK, device=self.device, attention=choice)

        torch.manual_seed(1)
        sizes = (shape.sequences * shape.new, self.layer.heads, self.layer.k_dim)
        query = torch.randn(sizes, dtype=self.layer.dtype, device=self.device)
        first = build()
        places = (first.block_ids, first.offsets)
        queries = [
            PagedQuery(
                query=query,
                new_keys=self.pool.key_cache(number)[places],
                new_values=self.pool.value_cache(number)[places],
                keys=self.pool.key_cache(number),
                values=self.pool.value_cache(number),
                scale=self.layer.scale,
                window=self.layer.window,
            )
            for number in range(_LAYERS)
        ]
        backend.prepare(self.layer, wait=True)
        reason = backend.why_not(self.layer, first)
        if reason:
            raise ConfigError(f"{backend.name} does not serve this layer: {reason}")
        return _Way(backend, self.layer, build, queries)


class _Way:
    """One backend's attention over one batch, in all layers."""

    def __init__(
        self,
        backend: AttentionBackend,
        layer: LayerShape,
        build: Callable[[], AttentionBatch],
        queries: Sequence[PagedQuery],
    ) -> None:
        self._backend = backend
        self._layer = layer
        self._build = build
        self._queries = queries

    def results(self) -> list[Tensor]:
        plan = self._backend.plan(self._layer, self._build())
        return [plan.run(query) for query in self._queries]

    def device_us(self) -> float:
        """Return the GPU's time of one layer."""
        plan = self._backend.plan(self._layer, self._build())
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_PAUSE_CYCLES)  # meanwhile the launches are queued
        start.record()
        for query in self._queries:
            plan.run(query)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / len(self._queries)

    def plan_us(self, repeats: int = 20) -> float:
        """Return the CPU's time of a plan, the copies that it starts included."""
        batch = self._build()
        times: list[float] = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._backend.plan(self._layer, batch)
            times.append((time.perf_counter() - started) * 1e6)
        return statistics.median(times)


def main() -> None:
    """Measure, print the table, and write it to where commands on this machine look for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, help="of a layer with a sliding window, in tokens")
    parser.add_argument("--layers", type=int, default=32, help="of the model, which share the time of a plan")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", metavar="SEQUENCES,NEW,KV", help="instead of the whole grid")
    parser.add_argument("--without", nargs="+", choices=_OTHERS, default=[], help="backends that are left out")
    parser.add_argument("--out", type=Path, help="file to write, instead of the one for this machine")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.attention needs a GPU with flash-attn: there is no CUDA device here")
        return
    layer = LayerShape(
        "cuda",
        torch.bfloat16,
        arguments.heads,
        arguments.kv_heads,
        arguments.head_dim,
        arguments.head_dim,
        _BLOCK,
        arguments.head_dim**-0.5,
        arguments.window,
    )
    shapes = [_parsed(text) for text in arguments.shapes] if arguments.shapes else list(SHAPES)
    table = measure(layer, shapes, rounds=arguments.rounds, without=arguments.without)
    path = arguments.out or cache_directory(os.environ) / table_place(table.device)
    table = merge(load_table(path) if path.exists() else None, table)
    save_table(table, path)
    print(f"\n{len(table.points)} points written to {path}\n")
    _print_choices(table, layer, shapes, num_layers=arguments.layers)


def measure(
    layer: LayerShape, shapes: Sequence[Shape], *, rounds: int = 7, without: Sequence[str] = ()
) -> AttentionTable:
    """Measure shapes on the current GPU, and print each. A shape that fails is left out."""
    device = torch.device("cuda")
    described = machine(device) | {name: _version(name) for name in ("flash-attn", "flashinfer-python")}
    print("  ".join(f"{name}: {value}" for name, value in described.items()))
    print(f"a layer of {layer.heads} heads, {layer.kv_heads} of K and V, of {layer.k_dim}, window {layer.window}\n")
    backends = _backends(layer, device, without)
    most = max(shape.sequences * -(-shape.kv // _BLOCK) * _BLOCK for shape in shapes)
    bench = _Bench(layer, backends, most)
    names = [backend.name for backend in backends]
    print(f"{'sequences':>9} {'new':>6} {'kv':>7}  " + "  ".join(f"{name:>15} us   ratio" for name in names))
    points: list[MeasuredPoint] = []
    with torch.inference_mode():
        for shape in shapes:
            try:
                point, errors = bench.measure(shape, rounds=rounds)
            except Exception as exc:  # noqa: BLE001 - a failed shape must not lose the others
                print(f"{shape.sequences:>9} {shape.new:>6} {shape.kv:>7}  {type(exc).__name__}: {exc}")
                continue
            points.append(point)
            print(_line(point, errors, names))
    source = ", ".join(f"{name} {described[name]}" for name in ("torch", "flash-attn", "flashinfer-python"))
    return AttentionTable(device=described["device"], points=tuple(points), source=source)


def merge(old: AttentionTable | None, new: AttentionTable) -> AttentionTable:
    """Return a table with the new points, and those old ones of the same device that were not measured again."""
    if old is None or old.device != new.device:
        return new
    known = {_key(point) for point in new.points}
    kept = tuple(point for point in old.points if _key(point) not in known)
    return replace(new, points=(*kept, *new.points))


def _key(point: MeasuredPoint) -> tuple[object, ...]:
    sizes = (point.heads, point.kv_heads, point.head_dim, point.window)
    return (*sizes, point.sequences, point.new, point.kv)


def _backends(layer: LayerShape, device: torch.device, without: Sequence[str]) -> list[AttentionBackend]:
    """Return flash-attn and the others that serve the layer; print why the rest does not."""
    found: list[AttentionBackend] = []
    for name in (_FLASH, *_OTHERS):
        if name in without:
            continue
        (backend,) = make_attention(name, device).backends
        started = time.perf_counter()
        backend.prepare(layer, wait=True)
        reason = backend.why_not(layer)
        if reason is None:
            found.append(backend)
            print(f"{name}: kernels ready after {time.perf_counter() - started:.1f} s")
        elif name == _FLASH:
            raise ConfigError(f"there is nothing to compare with: {name}: {reason}")
        else:
            print(f"{name}: {reason}")
    return found


def _difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest difference of a layer, as a share of the root mean square."""
    return max(
        float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())
        for a, b in zip(got, want, strict=True)
    )


def _line(point: MeasuredPoint, errors: dict[str, float], names: Sequence[str]) -> str:
    cells = []
    for name in names:
        if name in point.us:
            plan = f" plan {point.plan_us[name]:.0f}" if name in point.plan_us else ""
            cells.append(f"{point.us[name]:>15.1f}    {point.us[_FLASH] / point.us[name]:>5.2f}{plan}")
        else:
            cells.append(f"{'wrong by ' + format(errors[name], '.1e'):>15}         ")
    return f"{point.sequences:>9} {point.new:>6} {point.kv:>7}  " + "  ".join(cells)


def choices(table: AttentionTable, layer: LayerShape, shapes: Sequence[Shape], *, num_layers: int) -> Iterator[Choice]:
    """Yield what `auto` takes for each shape that the table has, and its time with a layer's share of a plan."""
    by_key = {_key(point): point for point in table.points}
    for shape in shapes:
        sizes = (layer.heads, layer.kv_heads, layer.k_dim, layer.window)
        point = by_key.get((*sizes, shape.sequences, shape.new, shape.kv))
        if point is None:
            continue
        size = BatchSize(sequences=shape.sequences, new=(shape.new, shape.new), kv=(shape.kv, shape.kv))
        faster = table.faster(layer, size, num_layers=max(1, num_layers // 2))
        name = faster[0] if faster else _FLASH
        yield Choice(shape, name, point.us[name] + point.plan_us.get(name, 0.0) / num_layers, point.us[_FLASH])


def _print_choices(table: AttentionTable, layer: LayerShape, shapes: Sequence[Shape], *, num_layers: int) -> None:
    found = list(choices(table, layer, shapes, num_layers=num_layers))
    for each in found:
        sizes = f"{each.shape.sequences:>9} {each.shape.new:>6} {each.shape.kv:>7}"
        print(f"{sizes}  {each.name:<15} {each.flash_us / each.us:>5.2f} of flash-attn's speed")
    if found:
        print(f"least: {min(each.flash_us / each.us for each in found):.2f}")


def _parsed(text: str) -> Shape:
    sequences, new, kv = (int(part) for part in text.split(","))
    return Shape(sequences, new, kv)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        try:
            return str(importlib.import_module(name.split("-")[0]).__version__)
        except (ImportError, AttributeError):
            return "not installed"


if __name__ == "__main__":
    main()
