"""A model split over several GPUs, with a process and a cache for each: the cost of agreeing, the gain of caching.

Starts the processes itself. A Llama of the shape chosen, with random weights, is split by its own tensor-parallel
plan. Printed: the time of one agreement, the time to first token by where the prompt's cached part lies, and what
happens when one rank loses a block. Without GPUs the same runs on the CPU, for the shape "tiny".
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel, split_model
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.values.block import Tier

__all__ = ["main"]

_GIB = 1 << 30

# What is evicted before each request, and whether the request may use the cache.
_WAYS: dict[str, tuple[tuple[Tier, ...], bool]] = {
    "recompute": ((), False),
    "hot": ((), True),
    "warm": ((Tier.HOT,), True),
    "cold, page cache": ((Tier.HOT, Tier.WARM), True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    shape: str
    tokens: int
    new_tokens: int
    repeats: int
    decode: int
    graphs: bool


def main() -> None:
    """Start the ranks, wait for them, and end with 1 if one of them failed or took too long."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=gpus if gpus > 1 else 2)
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b" if gpus > 1 else "tiny")
    parser.add_argument("--tokens", type=int, default=8192 if gpus > 1 else 1024, help="cached tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the prompt that are not cached")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", type=int, default=16, help="tokens to decode, for the time of one")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs, collectives included")
    parser.add_argument("--timeout-s", type=float, default=240, help="after which every rank is killed")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is None:
        sys.exit(_start(arguments.ranks, arguments.timeout_s))
    options = _Options(**{name: getattr(arguments, name) for name in _Options.__slots__})
    _run_rank(arguments.rank, arguments.ranks, arguments.directory, options)


def _start(size: int, timeout_s: float) -> int:
    """Run this command once for each rank, with the same options."""
    environment = {
        **os.environ,
        "NCCL_NVLS_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
    }  # a GPU may be shared
    if torch.cuda.device_count() < size:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Transformers splits over the GPUs that it sees
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], "--directory", directory]
        ranks = [
            subprocess.Popen(
                [*command, "--ranks", str(size), "--rank", str(rank)], env={**environment, "LOCAL_RANK": str(rank)}
            )
            for rank in range(size)
        ]
        until = time.monotonic() + timeout_s
        try:
            while any(rank.poll() is None for rank in ranks):
                if time.monotonic() > until or any(rank.poll() for rank in ranks):
                    break
                time.sleep(0.1)
        finally:
            late = [number for number, rank in enumerate(ranks) if rank.poll() is None]
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        print(f"failed: exit codes {[rank.returncode for rank in ranks]}, ranks {late} were ended")
        return 1
    return 0


def _run_rank(rank: int, size: int, directory: Path, options: _Options) -> None:
    has_gpus = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    distributed.init_process_group(
        "nccl" if has_gpus else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
        device_id=device if has_gpus else None,
    )
    try:
        _bench(device, directory, options)
    finally:
        distributed.destroy_process_group()


def _bench(device: torch.device, directory: Path, options: _Options) -> None:
    ranks = TorchRanks.of_process_group()
    loaded = LoadedModel(split_model(random_model(options.shape, device)), None, options.shape)
    is_small = options.shape == "tiny"
    config = CacheConfig(
        cold_path=directory / "store",
        hot_bytes=_GIB // 4 if is_small else 4 * _GIB,
        warm_bytes=_GIB // 4 if is_small else 4 * _GIB,
        cold_bytes=2 * _GIB if is_small else 16 * _GIB,
        min_free_bytes=0,
    )
    say = print if ranks.rank == 0 else _say_nothing
    say("  ".join(f"{name}: {value}" for name, value in machine(device).items()), f" ranks: {ranks.size}", flush=True)
    with open_runner(loaded, config, ranks=ranks, max_step_tokens=65_536, use_graphs=options.graphs or None) as runner:
        layout = runner.cache.layout
        say(f"block of a rank: {layout.block_bytes / 2**20:.1f} MiB, {layout.layers[0].kv_heads} heads of K and V")
        say(f"one agreement: {_agreement_us(ranks):.0f} us", flush=True)
        prefix = _tokens(runner, options.tokens, seed=1)
        runner.prefill(prefix)
        runner.cache.flush()
        say(f"{options.tokens} cached tokens and {options.new_tokens} new ones, graphs {options.graphs}:")
        want: Tensor | None = None
        base = 0.0
        for name in _WAYS:
            ttft_s, found, want = _measure(runner, prefix, name, options, want)
            base = base or ttft_s
            say(
                f"{name:>18}: {ttft_s * 1e3:8.1f} ms to the first token ({base / ttft_s:.1f}x), found {found}",
                flush=True,
            )
        say(_decode_line(runner, prefix, options), flush=True)
        say(_loss_line(runner, prefix, options), flush=True)


def _agreement_us(ranks: TorchRanks) -> float:
    times: list[float] = []
    for _ in range(500):
        started = time.perf_counter()
        ranks.agree_min(1, topic=b"bench")
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def _measure(
    runner: Runner, prefix: list[int], name: str, options: _Options, want: Tensor | None
) -> tuple[float, dict[str, int], Tensor]:
    """Return the median seconds to the first token, the cached tokens of each tier, and the last logits.

    want: the logits of a computed answer to the same prompt; those found may differ from it by rounding only.
    """
    evicted, use_cache = _WAYS[name]
    times: list[float] = []
    for repeat in range(options.repeats + 2):  # the first warms up, the second may capture a graph
        suffix = _tokens(runner, options.new_tokens, seed=100 + repeat)
        for tier in evicted:
            runner.cache.evict(tier)
        distributed.barrier()
        chosen = GenerationOptions(
            max_new_tokens=1, stop_ids=frozenset(), store_partial=False, use_cache=use_cache, keep_logits=True
        )
        (answer,) = runner.generate([prefix + suffix], chosen)
        runner.cache.flush()
        times.append(answer.ttft_s)
    assert answer.logits is not None
    if want is not None:
        _assert_close(answer.logits, want)
    found = {tier.value: count for tier, count in answer.cached_tokens.items() if count}
    _assert_same(runner, str(found))
    return statistics.median(times[2:]), found, answer.logits if want is None else want


def _decode_line(runner: Runner, prefix: list[int], options: _Options) -> str:
    chosen = GenerationOptions(max_new_tokens=options.decode, stop_ids=frozenset(), store_partial=False)
    for _ in range(3):
        (answer,) = runner.generate([[*prefix, 5]], chosen)
    _assert_same(runner, str(answer.token_ids))
    return f"{'decode':>18}: {1e3 / answer.tokens_per_s:8.1f} ms a token"


def _loss_line(runner: Runner, prefix: list[int], options: _Options) -> str:
    """Remove a block in the middle of the prompt from the last rank; return a line with the tokens found after that."""
    cache = runner.cache
    size = cache.config.block_size
    at = len(prefix) // size // 2
    distributed.barrier()
    if cache.ranks.rank == cache.ranks.size - 1:
        cache.evict(Tier.HOT)
        cache.evict(Tier.WARM)
        assert cache.cold is not None
        assert cache.cold.delete(cache.match(prefix).block_hashes[at])
    distributed.barrier()
    chosen = GenerationOptions(max_new_tokens=1, stop_ids=frozenset(), store_partial=False)
    found: list[int] = []
    for _ in range(2):
        (answer,) = runner.generate([[*prefix, 7]], chosen)
        runner.cache.flush()
        found.append(sum(answer.cached_tokens.values()))
        _assert_same(runner, str(found))
    assert found == [at * size, len(prefix)], found
    cache.check()
    return f"one rank lost block {at}: {found[0]} tokens found on every rank, {found[1]} by the next request"


def _assert_same(runner: Runner, seen: str) -> None:
    """Raise AssertionError unless every rank has seen the same."""
    assert len(set(runner.cache.ranks.gather(seen.encode()))) == 1, f"ranks differ: this one saw {seen}"


def _assert_close(got: Tensor, want: Tensor) -> None:
    error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    assert error < 0.06, f"the logits of a cached prompt differ by {error:.3f}"


def _tokens(runner: Runner, count: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, runner.loaded.model.config.vocab_size, (count,), generator=generator).tolist()


def _say_nothing(*_: object, flush: bool = False) -> None:
    """Take the place of `print` on all ranks but the first."""


if __name__ == "__main__":
    main()
