"""tierkv's engine beside nano-vLLM: many prompts, shared prompts, one sequence, a cached prompt, a request that joins.

Each engine runs in a process of its own, with one shape (Qwen3-8B's) and random weights. Needs a checkout of nano-vLLM:
TIERKV_NANO_VLLM names it. `--cpu` runs a tiny shape with the stand-ins of tests/engines, to see that this script works;
its figures then mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.nano_vllm import ROOT, SHAPES, tokens
from benchmarks.serving_engines import WINDOW, Engine, NanoEngine, TierkvEngine, random_model

__all__ = ["main"]

PARTS = ("many", "shared", "one", "hot", "join")


def main() -> None:
    """Run both engines and print a table; `--json FILE` keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--engines", nargs="+", default=["nano", "tierkv"], choices=["nano", "tierkv"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new", type=int, default=128, help="tokens to generate for each prompt")
    parser.add_argument("--shared", type=int, default=4096, help="tokens that the prompts of one part share")
    parser.add_argument("--hot", type=int, default=8192, help="tokens of the cached prompt")
    parser.add_argument("--temperature", type=float, default=0.6, help="for both engines; nano-vLLM knows no greedy")
    parser.add_argument("--step-tokens", type=int, default=16_384, help="new tokens of a pass at most, for both")
    parser.add_argument("--hot-gib", type=float, default=48.0, help="tierkv's memory for K and V on the GPU")
    parser.add_argument("--warm-gib", type=float, default=8.0)
    parser.add_argument("--fuse", default="auto", choices=["auto", "on", "off"])
    parser.add_argument(
        "--profile", action="store_true", help="also print where tierkv's decode steps spend their time"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=["nano", "tierkv"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print("FOUND " + json.dumps(measure(options)), flush=True)
        return
    found: dict[str, dict[str, Any]] = {}
    for engine in options.engines:
        started = time.perf_counter()
        found[engine] = start(engine)
        print(f"{engine}: {time.perf_counter() - started:.0f} s", flush=True)
    print_table(options, found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def start(engine: str) -> dict[str, Any]:
    """Measure one engine in a process of its own, with this process's arguments."""
    checkout = Path(os.environ.get("TIERKV_NANO_VLLM", ".")).resolve()
    paths = [str(ROOT), str(checkout), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:], "--engine", engine],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = {}
    for line in process.stdout.splitlines():
        if line.startswith("FOUND "):
            found = json.loads(line[6:])
        else:
            print(line, flush=True)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start one engine, measure every part, end it."""
    if options.cpu:
        options.shape = "tiny"
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options)
        started = time.perf_counter()
        if options.engine == "nano":
            return measure_parts(options, NanoEngine(options, config, Path(folder)), time.perf_counter() - started)
        return measure_tierkv(options, config, started)


def measure_tierkv(options: argparse.Namespace, config: Any, started: float) -> dict[str, Any]:
    from tierkv import CacheConfig, LoadedModel, open_runner

    model = random_model(config, "cpu" if options.cpu else "cuda")
    hot, warm = (int(gib * (1 << 30)) for gib in (options.hot_gib, options.warm_gib))
    if options.cpu:
        hot, warm = 256 << 20, 64 << 20
    loaded, cache = LoadedModel(model, None, "random"), CacheConfig(block_size=256, hot_bytes=hot, warm_bytes=warm)
    with open_runner(loaded, cache, max_step_tokens=options.step_tokens, fuse=options.fuse) as runner:
        runner.capture_graphs(max_sequences=options.prompts)  # nano-vLLM does so too
        engine = TierkvEngine(runner, options)
        found = measure_parts(options, engine, time.perf_counter() - started)
        if options.profile:
            engine.profile(1)
            engine.profile(options.prompts)
    return found


def measure_parts(options: argparse.Namespace, engine: Engine, start_s: float) -> dict[str, Any]:
    """Return the figures of one engine. Each part first warms up with prompts of its sizes."""
    found: dict[str, Any] = {"start_s": start_s}
    num_new, count = options.new, options.prompts
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "many": lambda: measure_many(engine, count, num_new),
        "shared": lambda: measure_shared(engine, count // 2, options.shared, num_new),
        "one": lambda: measure_one(engine, num_new),
        "hot": lambda: measure_hot(engine, options.hot),
        "join": lambda: measure_join(engine, count // 2),
    }
    for name in options.parts:
        gc.collect()
        started = time.perf_counter()
        try:
            found[name] = parts[name]()
        except Exception:  # noqa: BLE001 - the other parts are still worth their time
            traceback.print_exc()
            continue
        print(f"{options.engine} {name}: {time.perf_counter() - started:.1f} s {json.dumps(found[name])}", flush=True)
    return found


def measure_many(engine: Engine, count: int, num_new: int) -> dict[str, Any]:
    """Return new tokens a second of prompts of 100 to 1,024 tokens, and again when all are cached."""

    def prompts_of(first: int) -> list[list[int]]:
        sizes = torch.randint(100, 1025, (count,), generator=torch.Generator().manual_seed(first)).tolist()
        return [list(tokens(first + i, size)) for i, size in enumerate(sizes)]

    engine.generate(prompts_of(1_000_000), num_new)
    engine.generate(prompts_of(1_100_000), num_new)
    fresh = []
    for first in (1_200_000, 1_300_000):
        prompts = prompts_of(first)
        fresh.append(count * num_new / engine.generate(prompts, num_new))
    return {"fresh": fresh, "again": count * num_new / engine.generate(prompts, num_new)}


def measure_shared(engine: Engine, count: int, num_shared: int, num_new: int) -> dict[str, Any]:
    """Return new tokens a second of prompts with one prefix: first with an empty cache, then with all of it cached."""

    def prompts_of(prefix: int, first: int) -> list[list[int]]:
        shared = list(tokens(prefix, num_shared))
        return [shared + list(tokens(first + i, 100)) for i in range(count)]

    for first in (2_000_000, 2_100_000):
        engine.generate(prompts_of(100, first), num_new)
    fresh, cached = [], []
    for prefix in (101, 102):
        fresh.append(count * num_new / engine.generate(prompts_of(prefix, 2_200_000), num_new))
        cached.append(count * num_new / engine.generate(prompts_of(prefix, 2_300_000), num_new))
    return {"fresh": fresh, "cached": cached}


def measure_one(engine: Engine, num_new: int) -> dict[str, Any]:
    """Return the milliseconds of each token after the first of one sequence, the median of several sequences."""
    found = []
    for i in range(4):
        times = engine.ask(list(tokens(3_000_000 + i, 512)), num_new)
        found.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
    return {"token_ms": statistics.median(found[1:])}


def measure_hot(engine: Engine, num_cached: int) -> dict[str, Any]:
    """Return the milliseconds to the first token of a prompt that is cached but for its last 32 tokens."""
    shared = list(tokens(200, num_cached))
    for i in range(4):
        engine.ask([*shared, *tokens(4_000_000 + i, 32)], 4)
    found = [1e3 * engine.ask([*shared, *tokens(4_100_000 + i, 32)], 4)[0] for i in range(7)]
    return {"first_ms": statistics.median(found), "all_ms": found}


def measure_join(engine: Engine, count: int) -> dict[str, Any]:
    """Return how requests of 512 tokens fare that join decoding ones, and what those lose: medians, in seconds."""
    prompts = [list(tokens(5_000_000 + j, 300)) for j in range(count)]
    late = [list(tokens(5_600_000 + j, 512)) for j in range(9)]
    alone = [engine.ask(list(tokens(5_500_000 + j, 512)), 2)[0] for j in range(6)]
    rounds = engine.join(prompts, late)[2:]  # the second captures a graph
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"alone_s": statistics.median(alone[2:]), **found, "rounds": rounds}


def config_of(options: argparse.Namespace) -> Any:
    import transformers

    return transformers.Qwen3Config(
        **SHAPES[options.shape],
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        attention_bias=False,
        tie_word_embeddings=False,
        initializer_range=0.02,
        eos_token_id=None,
        bos_token_id=None,
        dtype=torch.float32 if options.cpu else torch.bfloat16,
    )


def print_table(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Print a line for each figure, with the ratio of tierkv's to nano-vLLM's."""
    device = "CPU" if options.cpu else torch.cuda.get_device_name()
    print(f"device: {device}  torch: {torch.__version__}  shape: {options.shape}  temperature: {options.temperature}")
    half = options.prompts // 2

    def best(*path: str) -> Callable[[dict[str, Any]], float]:
        def read(figures: dict[str, Any]) -> float:
            value: Any = figures
            for key in path:
                value = value[key]
            return float(statistics.median(value)) if isinstance(value, list) else float(value)

        return read

    lines: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("many", f"{options.prompts} prompts of 100 to 1,024 tokens, new tokens/s", best("many", "fresh")),
        ("many", "  the same prompts again", best("many", "again")),
        ("shared", f"{half} prompts that share {options.shared} tokens, new tokens/s", best("shared", "fresh")),
        ("shared", "  the prefix cached", best("shared", "cached")),
        ("one", "one sequence, ms a token", best("one", "token_ms")),
        ("hot", f"{options.hot} cached tokens and 32 new, ms to the first token", best("hot", "first_ms")),
        ("join", "512 tokens alone, ms to the first token", lambda each: 1e3 * float(each["join"]["alone_s"])),
        ("join", f"512 tokens join {half} decoding ones: first token, times alone", joined),
        ("join", f"  the others' next {WINDOW} tokens, times before", lost),
    ]
    print(f"{'':<66}" + "".join(f"{engine:>10}" for engine in found) + f"{'ratio':>8}")
    for part, name, read in lines:
        values = {engine: read(figures) for engine, figures in found.items() if part in figures}
        shown = "".join(f"{values[engine]:>10.2f}" if engine in values else f"{'-':>10}" for engine in found)
        ratio = f"{values['tierkv'] / values['nano']:8.3f}" if len(values) == 2 else ""
        print(f"{name:<66}{shown}{ratio}")


def joined(figures: dict[str, Any]) -> float:
    return float(figures["join"]["joined_s"]) / float(figures["join"]["alone_s"])


def lost(figures: dict[str, Any]) -> float:
    return float(figures["join"]["during_s"]) / float(figures["join"]["before_s"])


if __name__ == "__main__":
    main()
