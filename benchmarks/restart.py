"""From the start of a process to the first token of a long prompt, with and without the store.

A child process loads a model of Llama-3.1-8B's shape with random weights from a checkpoint, opens its cache, and
answers one prompt whose K and V an earlier process has stored. Its time is shown in parts: the process and its imports,
the model, the cache with its checks of the model, and the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["Parts", "main", "measure"]

_WAYS = ("without the store", "with the store")
_POOL_BYTES = {"8b": 12 << 30, "small": 4 << 30, "tiny": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Seconds of one start, one after the other. cached_tokens: of the prompt, from the store."""

    process_s: float
    model_s: float
    cache_s: float
    first_token_s: float
    cached_tokens: int

    @property
    def total_s(self) -> float:
        """Seconds from the start of the process to the first token."""
        return self.process_s + self.model_s + self.cache_s + self.first_token_s


def main() -> None:
    """Run the benchmark and print its table; `--json FILE` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on a CPU, with a tiny model unless --shape says else")
    parser.add_argument("--shape", choices=sorted(_POOL_BYTES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--from-disk", action="store_true", help="empty the page cache before each start; needs root")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(asdict(_run_child(json.loads(arguments.child)))))
        return
    import torch

    from benchmarks.ttft import machine

    device = "cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda"
    shape = arguments.shape or ("8b" if device == "cuda" else "tiny")
    described = {**machine(torch.device(device)), "shape": shape}
    print("  ".join(f"{name}: {value}" for name, value in described.items()), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        _write_checkpoint(Path(directory) / "model", shape, device)
        rows = [
            measure(Path(directory), shape, device, tokens, arguments.repeats, from_disk=arguments.from_disk)
            for tokens in arguments.tokens
        ]
    for tokens, ways in zip(arguments.tokens, rows, strict=True):
        _print_table(tokens, ways)
    if arguments.json:
        kept = [
            [tokens, {way: asdict(parts) for way, parts in ways.items()}]
            for tokens, ways in zip(arguments.tokens, rows, strict=True)
        ]
        arguments.json.write_text(json.dumps({"machine": described, "rows": kept}, indent=1))


def measure(
    folder: Path, shape: str, device: str, tokens: int, repeats: int, *, from_disk: bool = False
) -> dict[str, Parts]:
    """Return the median parts of each way. One more start of each comes first: it fills page cache and store."""
    found: dict[str, list[Parts]] = {way: [] for way in _WAYS}
    for repeat in range(repeats + 1):
        for way in _WAYS:  # in turn, so that both have the same noise
            parts = _start(folder, shape, device, tokens, has_store=way == _WAYS[1], from_disk=from_disk)
            if repeat:
                found[way].append(parts)
    return {
        way: Parts(**{each.name: statistics.median(getattr(p, each.name) for p in all_parts) for each in fields(Parts)})
        for way, all_parts in found.items()
    }


def _start(folder: Path, shape: str, device: str, tokens: int, *, has_store: bool, from_disk: bool) -> Parts:
    if from_disk:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    given = {
        "started": time.time(),
        "model": str(folder / "model"),
        "store": str(folder / f"store-{tokens}") if has_store else None,
        "pool_bytes": _POOL_BYTES[shape],
        "device": device,
        "tokens": tokens,
    }
    command = [sys.executable, "-m", "benchmarks.restart", "--child", json.dumps(given)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True)
    return Parts(**json.loads(answer.stdout.splitlines()[-1]))


def _run_child(given: dict[str, Any]) -> Parts:
    """Answer one prompt, and say how long each part took."""
    import torch

    from tierkv.config import CacheConfig
    from tierkv.engine.models import load_model
    from tierkv.engine.runner import GenerationOptions, open_runner

    marks = [given["started"], time.time()]
    loaded = load_model(given["model"], device=given["device"])
    marks.append(time.time())
    config = CacheConfig(
        cold_path=Path(given["store"]) if given["store"] else None,
        cold_bytes=64 << 30,
        hot_bytes=given["pool_bytes"],
        warm_bytes=given["pool_bytes"] // 2 if given["store"] else 256 << 20,
    )
    generator = torch.Generator().manual_seed(given["tokens"])
    prompt = torch.randint(0, 256, (given["tokens"],), generator=generator).tolist()
    with open_runner(loaded, config) as runner:
        marks.append(time.time())
        (answer,) = runner.generate([prompt], GenerationOptions(max_new_tokens=1, store_partial=True))
        marks.append(time.time())
    seconds = [later - earlier for earlier, later in pairwise(marks)]
    names = ("process_s", "model_s", "cache_s", "first_token_s")
    return Parts(**dict(zip(names, seconds, strict=True)), cached_tokens=sum(answer.cached_tokens.values()))


def _write_checkpoint(path: Path, shape: str, device: str) -> None:
    """Write a random model of a shape, and the tokenizer of the embedded model, which load_model wants."""
    import shutil

    import torch

    from benchmarks.ttft import random_model
    from tierkv.engine.embedded_model import write_embedded_model

    model = random_model(shape, torch.device(device))
    model.save_pretrained(path)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as other:
        write_embedded_model(Path(other))
        for name in os.listdir(other):
            if name.startswith("tokenizer") or name.endswith(".jinja") or name == "special_tokens_map.json":
                shutil.copy(Path(other) / name, path / name)


def _print_table(tokens: int, ways: dict[str, Parts]) -> None:
    names = ("process", "model", "cache", "first token", "together")
    print(f"\na prompt of {tokens:,} tokens, seconds")
    print(" " * 20 + "".join(f"{name:>13}" for name in names) + f"{'cached':>10}")
    for way, parts in ways.items():
        values = (parts.process_s, parts.model_s, parts.cache_s, parts.first_token_s, parts.total_s)
        print(f"{way:<20}" + "".join(f"{value:>13.3f}" for value in values) + f"{int(parts.cached_tokens):>10,}")
    plain, stored = (ways[way] for way in _WAYS)
    print(
        f"first token {plain.first_token_s / stored.first_token_s:.1f} times as fast, "
        f"from the start of the process {plain.total_s / stored.total_s:.2f} times"
    )


if __name__ == "__main__":
    main()
