"""The time to the first token from each tier, as a ratio to computing the whole prompt.

A model of Llama-3.1-8B's shape with random weights; prompts of 1k, 8k and 32k cached tokens and a few new ones.
Beside it the same prefill by plain Transformers, and the speeds of the link and of the disk in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.disk_speed import read_direct_gb_s
from tierkv.config import CacheConfig
from tierkv.engine.attention import use_attention
from tierkv.engine.backends.factory import ATTENTION_NAMES
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.readers.pool import ReaderPool
from tierkv.values.block import Tier

__all__ = ["SHAPES", "Timing", "drop_page_cache", "machine", "main", "measure", "random_model"]

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "small": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token of prompts with `tokens` cached tokens, and tokens found in each tier, by way."""

    tokens: int
    times_s: dict[str, float]
    cached: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class _Disk:
    """GB/s of the store's file, read around the page cache by as many threads; stored bytes of a token."""

    gb_s: float
    num_threads: int
    token_bytes: float


@dataclass(frozen=True, slots=True)
class _Way:
    """What is evicted before each request, and the options of the request."""

    evicted: tuple[Tier, ...] = ()
    use_cache: bool = True
    compute_or_load: bool = False
    from_disk: bool = False


WAYS: dict[str, _Way] = {
    "recompute": _Way(use_cache=False),
    "hot": _Way(),
    "warm": _Way((Tier.HOT,)),
    "cold, page cache": _Way((Tier.HOT, Tier.WARM)),
    "cold, page cache, compute or load": _Way((Tier.HOT, Tier.WARM), compute_or_load=True),
    "cold, disk": _Way((Tier.HOT, Tier.WARM), from_disk=True),
    "cold, disk, compute or load": _Way((Tier.HOT, Tier.WARM), compute_or_load=True, from_disk=True),
}


def main() -> None:
    """Run the benchmark and print its table; `--json FILE` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32_768])
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the prompt that are not cached")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", choices=ATTENTION_NAMES, default="auto")
    parser.add_argument("--attention-table", type=Path, help="as benchmarks.attention writes it")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--reader-processes", type=int, help="num_reader_processes; by the cores if left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = LoadedModel(random_model(arguments.shape, device), None, arguments.shape)
    described = machine(device)
    print("  ".join(f"{name}: {value}" for name, value in described.items()))
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(
            cold_path=Path(directory) / "store",
            hot_bytes=(12 << 30) if device.type == "cuda" else (1 << 30),
            warm_bytes=(10 << 30) if device.type == "cuda" else (1 << 30),
            cold_bytes=16 << 30,
            num_reader_processes=arguments.reader_processes,
        )
        options: dict[str, Any] = {"attention": arguments.attention, "attention_table": arguments.attention_table}
        with open_runner(loaded, config, max_step_tokens=65_536, **options) as runner:
            print(f"block: {runner.cache.layout.block_bytes / 2**20:.1f} MiB of {config.block_size} tokens")
            readers = _wait_for_readers(runner)
            rows = [
                measure(runner, count, arguments.new_tokens, arguments.repeats, arguments.ways)
                for count in arguments.tokens
            ]
            for row in rows:
                row.times_s["plain transformers"] = _plain_prefill_s(loaded.model, row.tokens, arguments.repeats)
            if readers:
                print(f"decoded by processes: {readers.stats()}")
            link = _link_gb_s(runner) if device.type == "cuda" else None
            disk = _disk_of(runner, config.cold_path)
    _print_table(rows, link, disk)
    if arguments.json:
        result = {
            "machine": described,
            "link_gb_s": link,
            "disk_gb_s": disk and disk.gb_s,
            "rows": [[r.tokens, r.times_s, r.cached] for r in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1))


def random_model(shape: str | dict[str, Any], device: torch.device) -> Any:
    """Return a Llama of that shape, a name or what its configuration says, with random weights made on the device."""
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=131_072, eos_token_id=None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def measure(runner: Runner, num_cached: int, num_new: int, repeats: int, names: Sequence[str] = tuple(WAYS)) -> Timing:
    """Return the median seconds to the first token, by the tier of the prompt's cached part."""
    generator = torch.Generator().manual_seed(num_cached)
    vocabulary = runner.loaded.model.config.vocab_size
    prefix = torch.randint(0, vocabulary, (num_cached,), generator=generator).tolist()
    runner.prefill(prefix)
    runner.cache.flush()
    cache = runner.cache
    times: dict[str, float] = {}
    cached: dict[str, dict[str, int]] = {}
    for name in names:
        way = WAYS[name]
        measured: list[float] = []
        runner.compute_or_load = way.compute_or_load
        for repeat in range(repeats + 2):
            suffix = torch.randint(0, vocabulary, (num_new,), generator=generator).tolist()
            cache.flush()  # the previous request's background writes must not slow this one
            for tier in way.evicted:
                cache.evict(tier)
            if way.from_disk:
                drop_page_cache()
            options = GenerationOptions(
                max_new_tokens=1, stop_ids=frozenset(), store_partial=False, use_cache=way.use_cache
            )
            (result,) = runner.generate([prefix + suffix], options)
            if repeat > 1:  # the first request warms up, the second captures a graph
                measured.append(result.ttft_s)
            else:
                runner.wait_for_kernels()  # a graph takes the backend that is compiled when it is captured
            cached[name] = {tier.value: count for tier, count in result.cached_tokens.items() if count}
        times[name] = statistics.median(measured)
    return Timing(num_cached, times, cached)


def _wait_for_readers(runner: Runner) -> ReaderPool | None:
    """Return the cache's reader processes, if it has any, once they can read."""
    readers = runner.cache._tiers.memory.readers
    print(f"reader processes: {readers.num_processes if readers else 0}")
    if readers:
        readers.start()  # the store is empty yet
    deadline = time.monotonic() + 60
    while readers and readers.stats().ready < readers.num_processes:
        assert time.monotonic() < deadline, "the reader processes do not start"
        time.sleep(0.01)
    return readers


def _plain_prefill_s(model: Any, num_tokens: int, repeats: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (1, num_tokens), device=model.device)
    measured: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.inference_mode(), use_attention(model, "sdpa"):
            int(model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        measured.append(time.perf_counter() - started)
    return statistics.median(measured[1:])


def _link_gb_s(runner: Runner) -> float:
    """Return the speed of one large copy from page-locked memory to the GPU, in GB/s."""
    source = torch.empty(2 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2 << 30, dtype=torch.uint8, device=runner.loaded.model.device)
    speeds: list[float] = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        speeds.append(source.numel() / (time.perf_counter() - started) / 1e9)
    return max(speeds)


def _disk_of(runner: Runner, path: Path | None) -> _Disk | None:
    """Return how fast the store's disk is; None where that cannot be measured."""
    cold = runner.cache.cold
    assert path is not None
    assert cold is not None
    num_threads = runner.cache._tiers.memory.read_threads.num_threads
    stored, raw = (sum(getattr(each, name) for each in cold.namespaces()) for name in ("stored_bytes", "raw_bytes"))
    try:
        gb_s = read_direct_gb_s(path / "data.mdb", num_threads=num_threads)
    except OSError as exc:
        print(f"(the disk's own speed is not measured: {exc.strerror})")
        return None
    return _Disk(gb_s, num_threads, runner.cache.layout.token_bytes * stored / raw)


def drop_page_cache() -> None:
    """Make the next read of a block come from the disk; needs root, and prints a line without it.

    What stays are the pages of LMDB's trees that this process has mapped: opening a store has read them all, and a
    process that runs keeps them. Blocks are read with `pread`, so none of their pages is among them.
    """
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as exc:
        print(f"(the page cache stays: {exc.strerror})")


def machine(device: torch.device) -> dict[str, str]:
    """Return the device and the versions, on which a benchmark's figures depend."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _print_table(rows: list[Timing], link: float | None, disk: _Disk | None) -> None:
    for row in rows:
        base = row.times_s.get("recompute", row.times_s["plain transformers"])
        print(f"{row.tokens} tokens cached")
        for name, seconds in row.times_s.items():
            found = ", ".join(f"{count} {tier}" for tier, count in row.cached.get(name, {}).items())
            print(f"  {name:<36}{seconds * 1e3:>10.1f} ms {base / seconds:>7.1f}x  {found}")
    if link:
        print(f"link, one large copy: {link:.1f} GB/s")
    if disk:
        print(f"disk, around the page cache by {disk.num_threads} threads: {disk.gb_s:.2f} GB/s")
        for row in rows:
            if {"cold, disk", "hot"} <= row.times_s.keys():
                least_s = row.tokens * disk.token_bytes / disk.gb_s / 1e9
                added_s = row.times_s["cold, disk"] - row.times_s["hot"]
                print(
                    f"{row.tokens} tokens: the disk alone would take {least_s * 1e3:.1f} ms; cold, disk adds "
                    f"{added_s * 1e3:.1f} ms to hot: {least_s / added_s:.2f} of the disk's speed"
                )


if __name__ == "__main__":
    main()
