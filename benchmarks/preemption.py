"""What it takes to resume a preempted request: from the warm tier, beside computing its tokens again.

One request generates; between two of its tokens it is preempted and its hot blocks are evicted. The time to its next
token is taken: from the warm tier, whose copy is bounded by the bus, and after all of its blocks were dropped. The
tokens of all ways are compared with those of an uninterrupted request.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.values.block import Tier

__all__ = ["main", "measure"]

_WAYS = ("no preemption", "resumed from warm", "computed again")
_POOL_BYTES = {"8b": 12 << 30, "small": 4 << 30, "tiny": 1 << 30}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=sorted(_POOL_BYTES), default="8b" if is_cuda else "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32_768])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if is_cuda else "cpu")
    print("  ".join(f"{name}: {value}" for name, value in machine(device).items()), f" shape: {arguments.shape}")
    pool_bytes = _POOL_BYTES[arguments.shape]
    config = CacheConfig(hot_bytes=pool_bytes, warm_bytes=pool_bytes)
    loaded = LoadedModel(random_model(arguments.shape, device), None, arguments.shape)
    print(f"{'tokens':>10}" + "".join(f"{way:>20}" for way in _WAYS) + f"{'again / warm':>15}{'warm GB/s':>12}")
    with open_runner(loaded, config) as runner:
        for tokens in arguments.tokens:
            times = measure(runner, tokens, arguments.repeats)
            gigabytes = tokens * runner.cache.layout.token_bytes / 1e9
            plain, warm, again = (times[way] for way in _WAYS)
            shown = "".join(f"{1e3 * each:>17.1f} ms" for each in (plain, warm, again))
            print(f"{tokens:>10,}{shown}{again / warm:>15.2f}{gigabytes / (warm - plain):>12.1f}")


def measure(runner: Runner, tokens: int, repeats: int) -> dict[str, float]:
    """Return the median seconds to the next token of a request with so many tokens, by way. One more round warms up."""
    vocabulary = runner.loaded.model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for repeat in range(repeats + 1):
        answers = []
        for way in _WAYS:
            seconds, answer = _next_token_s(runner, prompt, way)
            answers.append(answer)
            if repeat:
                times[way].append(seconds)
        others = [way for way, answer in zip(_WAYS, answers, strict=True) if answer != answers[0]]
        if others:
            print(f"{tokens} tokens: another answer after {', '.join(others)}: other passes may round in another way")
    return {way: statistics.median(each) for way, each in times.items()}


def _next_token_s(runner: Runner, prompt: Sequence[int], way: str) -> tuple[float, list[int]]:
    """Let a request generate 16 tokens, the eighth after a preemption. Return the seconds for that one, and all."""
    cache, scheduler = runner.cache, runner.step_loop.scheduler
    sampling = SamplingOptions(temperature=0.8, seed=5)
    stream = runner.stream([prompt], GenerationOptions(max_new_tokens=16, stop_ids=frozenset(), sampling=sampling))
    answer = [next(stream).token_id for _ in range(7)]
    if way != _WAYS[0]:
        for request in list(scheduler.running):
            scheduler.preempt(request)
        cache.flush()
        if way == _WAYS[1]:
            cache.evict(Tier.HOT)
        else:
            cache.evict_everywhere()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    answer.append(next(stream).token_id)
    seconds = time.perf_counter() - started
    return seconds, [*answer, *(event.token_id for event in stream)]


if __name__ == "__main__":
    main()
