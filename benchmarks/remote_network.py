"""The first token of a prompt that another machine has computed, over networks of several delays and speeds.

    python -m benchmarks.remote_network [--shape small] [--tokens 1024 4096]

One cache computes prompts, writes them to a redis-server, and is closed. A second one, which has no store, reads them
through a proxy that delays and limits the bytes. Each prompt is computed without a cache too: its first token must be
the same. Needs redis-server. Medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.remote import running_redis
from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.values.block import Tier

__all__ = ["main"]

_NETWORKS = ((1.0, 125e6), (10.0, 125e6), (10.0, 2.5e6))
"""Delay of one way in ms, and bytes a second. In the last one computing takes less time than loading."""
_WAYS = {"load": False, "compute or load": True}
_NUM_NEW = 32
_TRIALS = 4
"""Prompts of each way before those that are measured: the choice has measured loading, both at once and computing."""


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # the other cores are the server's and the network's
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = LoadedModel(random_model(arguments.shape, device), None, arguments.shape)
    described = {**machine(device), "cores": str(os.cpu_count()), "load": f"{os.getloadavg()[0]:.1f}"}
    print("  ".join(f"{name}: {value}" for name, value in described.items()))
    for num_tokens in arguments.tokens:
        with running_redis() as (port, _):
            prompts = _prompts(num_tokens, loaded.model.config.vocab_size, arguments.repeats)
            _compute_and_write(loaded, f"redis://127.0.0.1:{port}", prompts)
            for delay_ms, bytes_per_s in _NETWORKS:
                with _proxy(port, delay_ms, bytes_per_s) as url:
                    _measure(
                        loaded, url, prompts, f"{num_tokens} tokens, {delay_ms:g} ms, {bytes_per_s * 8e-9:g} Gbit/s"
                    )


def _prompts(num_tokens: int, vocabulary: int, repeats: int) -> dict[str, list[list[int]]]:
    """Return other prompts for each way: what one way has asked for is known to the next one for some seconds."""
    generator = torch.Generator().manual_seed(num_tokens)
    return {
        way: torch.randint(0, vocabulary, (repeats + _TRIALS, num_tokens + _NUM_NEW), generator=generator).tolist()
        for way in _WAYS
    }


def _compute_and_write(loaded: LoadedModel, url: str, prompts: dict[str, list[list[int]]]) -> None:
    with open_runner(loaded, _config(url), max_step_tokens=65_536) as runner:
        for prompt in (each for way in prompts.values() for each in way):
            runner.prefill(prompt[:-_NUM_NEW])
            runner.cache.flush()
            _wait_until_written(runner)
        (remote,) = runner.cache.stats().remotes
        assert not any(name.startswith("dropped") for name in remote.counters), remote.counters


def _wait_until_written(runner: Runner) -> None:
    """Wait until the remote tier has got no record for a moment."""
    before = -1
    while (now := runner.cache.stats().remotes[0].counters.get("written", 0)) != before:
        before = now
        time.sleep(0.2)


def _measure(loaded: LoadedModel, url: str, prompts: dict[str, list[list[int]]], title: str) -> None:
    """Print the median first token of each way, and of the same prompts computed."""
    print(title, flush=True)
    for way, compute_or_load in _WAYS.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        cached: list[int] = []
        with open_runner(loaded, _config(url), max_step_tokens=65_536) as runner:
            runner.compute_or_load = compute_or_load
            time.sleep(0.5)  # it connects
            short = GenerationOptions(max_new_tokens=1, stop_ids=frozenset(), use_cache=False)
            runner.generate([prompts[way][0][-_NUM_NEW:]], short)  # what a pass over the last tokens alone takes
            for number, prompt in enumerate(prompts[way]):
                tokens = []
                for use_cache in (False, True):
                    options = GenerationOptions(max_new_tokens=1, stop_ids=frozenset(), use_cache=use_cache)
                    (result,) = runner.generate([prompt], options)
                    tokens.append(result.token_ids)
                    if number >= _TRIALS:
                        times[use_cache].append(result.ttft_s)
                assert tokens[0] == tokens[1], "another first token"
                if number >= _TRIALS:
                    cached.append(sum(result.cached_tokens.values()))
                runner.cache.flush()
                for tier in (Tier.HOT, Tier.WARM):
                    runner.cache.evict(tier)
        computed, loaded_s = (1e3 * statistics.median(times[use_cache]) for use_cache in (False, True))
        print(
            f"  {way:<18} first token {loaded_s:8.1f} ms, computed {computed:8.1f} ms, {computed / loaded_s:5.2f} "
            f"times as fast; {int(statistics.median(cached))} tokens from the remote tier",
            flush=True,
        )


def _config(url: str) -> CacheConfig:
    on_gpu = torch.cuda.is_available()
    return CacheConfig(
        cold_path=None,
        hot_bytes=(12 << 30) if on_gpu else (1 << 30),
        warm_bytes=(4 << 30) if on_gpu else (1 << 30),
        remote=f"{url}?base_s=2&mb_per_s=0.5",
    )


@contextlib.contextmanager
def _proxy(port: int, delay_ms: float, bytes_per_s: float) -> Iterator[str]:
    """Run a proxy as a process of its own; yield its URL."""
    command = [sys.executable, "-m", "benchmarks.slow_proxy", str(port), str(delay_ms / 1e3), str(bytes_per_s)]
    process = subprocess.Popen(
        [*command, "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        assert process.stdout is not None
        yield f"redis://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
