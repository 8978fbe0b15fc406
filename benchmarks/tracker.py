"""What observers cost a decode loop: the same loop with and without observers, step by step in turn.

A step's time drifts with the machine, so the modes alternate step by step within one run and each step is compared
with its neighbours. On a CPU the time is that of the engine's own thread, so that other processes count less. The last
lines time the hot path alone, for a batch of a size that a GPU decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.ttft import machine
from tierkv.config import CacheConfig
from tierkv.engine.models import load_model
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.profiling.tracker import MemoryTracker
from tierkv.tools.options import cache_directory
from tierkv.values.block import Tier
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion
from tierkv.values.layout import BlockLayout
from tierkv.values.stats import CacheStats

__all__ = ["main"]

LIMIT = 0.02
_SEQUENCES, _BLOCKS = 16, 128
GPU_STEP_S = 6.02e-3  # Llama-3.1-8B's shape, batch 16, CUDA graph, one H200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; without it the embedded model")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--batch", type=int, default=4, help="sequences that decode together")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1500, help="decode steps, a third with each mode")
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device=arguments.device, cache_dir=cache_directory(os.environ))
    described = {**machine(loaded.model.device), "threads": str(torch.get_num_threads())}
    print("machine:", ", ".join(f"{name} {value}" for name, value in described.items()))
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(cold_path=Path(directory) / "store", hot_bytes=1 << 30, warm_bytes=1 << 30)
        with open_runner(loaded, config) as runner:
            steps = _decode(runner, arguments.batch, arguments.prompt_tokens, arguments.steps)
    print(f"{arguments.batch} sequences of {arguments.prompt_tokens} tokens and more, {len(steps['off'])} steps a mode")
    rows = [_compare(name, steps) for name in ("tracker", "profiler")]
    alone = {name: _hot_path_s(observers) for name, observers in _hot_paths()}
    for name, seconds in alone.items():
        print(
            f"{name}, hot path alone, {_SEQUENCES} sequences of {_BLOCKS} blocks: {seconds * 1e6:.1f} us a step, "
            f"{seconds / GPU_STEP_S:.2%} of a GPU's {GPU_STEP_S * 1e3:.2f} ms (limit {LIMIT:.0%})"
        )
    if arguments.json:
        result = {"machine": described, "rows": rows, "hot_path_us": {k: v * 1e6 for k, v in alone.items()}}
        arguments.json.write_text(json.dumps(result, indent=1))


def _decode(runner: Runner, batch: int, prompt_tokens: int, num_steps: int) -> dict[str, list[float]]:
    """Return the seconds of each decode step by mode; the modes take turns in a random order."""
    randomly = random.Random(0)
    prompts = [[randomly.randrange(32, 120) for _ in range(prompt_tokens)] for _ in range(batch)]
    for prompt in prompts:
        runner.prefill(prompt)
    runner.cache.flush()
    observers: dict[str, list[CacheObserver]] = {
        "off": [],
        "tracker": [MemoryTracker()],
        "profiler": _observers_of_a_profiler(),
    }
    events = runner.stream(
        prompts, GenerationOptions(max_new_tokens=num_steps + 10, stop_ids=frozenset(), store_partial=False)
    )
    for _ in range(9 * batch):  # prefill, and steps to warm up
        next(events)
    steps: dict[str, list[float]] = {name: [] for name in observers}
    clock = time.perf_counter if runner.loaded.model.device.type == "cuda" else time.thread_time
    for _ in range(num_steps // len(observers)):
        for name in randomly.sample(sorted(observers), len(observers)):
            with _observed(runner, observers[name]):
                started = clock()
                for _ in range(batch):
                    next(events)
                steps[name].append(clock() - started)
    events.close()  # type: ignore[attr-defined]  # a generator, declared as an iterator
    return steps


class _FakeCache:
    """A cache for a profiler that only keeps its observers."""

    def __init__(self) -> None:
        self.observers: list[CacheObserver] = []
        self.config = CacheConfig()
        self.layout = BlockLayout.uniform(num_layers=1, block_size=256, kv_heads=1, head_dim=1, dtype="bfloat16")

    def stats(self) -> CacheStats:
        """Return nothing counted."""
        return CacheStats()

    def add_observer(self, observer: CacheObserver) -> None:
        """Keep the observer."""
        self.observers.append(observer)

    def remove_observer(self, observer: CacheObserver) -> None:
        """Keep it: the profiler is never closed."""


def _observers_of_a_profiler() -> list[CacheObserver]:
    """Return what a profiler adds to a cache."""
    cache = _FakeCache()
    MemoryProfiler(cache)
    return cache.observers


@contextmanager
def _observed(runner: Runner, observers: Sequence[CacheObserver]) -> Iterator[None]:
    for observer in observers:
        runner.cache.add_observer(observer)
    try:
        yield
    finally:
        for observer in observers:
            runner.cache.remove_observer(observer)


def _compare(name: str, steps: dict[str, list[float]]) -> dict[str, float | str]:
    """Print the cost of a mode as a share of the step without it: the median of differences within each turn."""
    plain = statistics.median(steps["off"])
    differences = [on - off for on, off in zip(steps[name], steps["off"], strict=True)]
    share = statistics.median(differences) / plain
    # The median's standard error, by its spread over the middle half of a bell.
    quarters = statistics.quantiles(differences, n=4)
    error = 1.2533 * (quarters[2] - quarters[0]) / 1.349 / len(differences) ** 0.5 / plain
    print(
        f"{name:>9}: step {statistics.median(steps[name]) * 1e3:.3f} ms, without {plain * 1e3:.3f} ms: "
        f"{share:+.2%} (standard error {error:.2%}), limit {LIMIT:.0%}"
    )
    return {"mode": name, "step_ms": statistics.median(steps[name]) * 1e3, "share": share, "error": error}


def _hot_paths() -> Iterator[tuple[str, Sequence[CacheObserver]]]:
    yield "tracker, every step recorded", [MemoryTracker(sample_every=1)]
    yield "tracker", [MemoryTracker()]
    yield "profiler", _observers_of_a_profiler()


def _hot_path_s(observers: Sequence[CacheObserver], *, rounds: int = 1000) -> float:
    """Return the seconds that observers take of one decode step of a whole batch."""
    count = _SEQUENCES * _BLOCKS
    region = MemoryRegion(
        purpose="hot pool", shape=(count, 1), dtype="bfloat16", num_bytes=count, address=0, device="cuda",
        tier=Tier.HOT, slot_bytes=1,
    )  # fmt: skip
    for observer in observers:
        observer.on_memory(region)
        for slot in range(count):
            name = slot.to_bytes(16, "little")
            observer.on_block(BlockEvent(EventKind.REGISTER, Tier.HOT, name, b"", 256, 1, slot))
    tables = [list(range(i * _BLOCKS, (i + 1) * _BLOCKS)) for i in range(_SEQUENCES)]
    started = time.perf_counter()
    for _ in range(rounds):
        for table in tables:
            for observer in observers:
                observer.on_use(table)
    return (time.perf_counter() - started) / rounds


if __name__ == "__main__":
    main()
