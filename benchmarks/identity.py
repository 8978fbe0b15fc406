"""The cost of the check that a model has not changed, beside the decode steps that it runs in.

A check covers all modules, torch's counts of writes and a sample of every tensor; on a GPU it overlaps with the pass.
`stream` checks in every step, because its caller may do anything between two tokens, `generate` once for each block.
Steps with and without a check alternate in one run, so that a drift of the machine affects both. Without arguments:
Llama-3.1-8B's shape with random weights on a GPU, a small model on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.model_identity import ModelCheck
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.weights_digest import weights_digest

__all__ = ["main"]

LIMIT = 0.002


class _NoCheck:
    """Takes the place of a ModelCheck and checks nothing."""

    def check(self) -> None:
        """Do nothing."""

    def mark(self) -> None:
        """Do nothing."""

    def start(self, after: object = None) -> Callable[[], None]:
        """Do nothing."""
        return lambda: None


def main() -> None:
    """Measure and print."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("8b", "small", "tiny"), default="8b" if has_gpu else "small")
    parser.add_argument("--batch", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--prompt-tokens", type=int, default=1024 if has_gpu else 64)
    parser.add_argument(
        "--steps", type=int, default=1200 if has_gpu else 120, help="decode steps, half of them with checks"
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if has_gpu else "cpu")
    described = machine(device)
    print("machine:", ", ".join(f"{name} {value}" for name, value in described.items()))
    model = random_model(arguments.shape, device)
    config = CacheConfig(hot_bytes=(4 << 30) if has_gpu else (256 << 20), warm_bytes=256 << 20, write_through=False)
    with open_runner(LoadedModel(model, None, arguments.shape), config) as runner:
        check = runner._commits.model_check
        rows = _parts(model, runner, check, device)
        rows |= _steps(runner, check, arguments.batch, arguments.prompt_tokens, arguments.steps)
    for name, value in rows.items():
        print(f"{name:<44}{value:>16}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": described, "rows": rows}, indent=1))


def _parts(model: Any, runner: Runner, check: ModelCheck, device: torch.device) -> dict[str, str]:
    """Time each part alone, with nothing to overlap with."""
    sums = check._checksums
    with torch.inference_mode(), runner._attention:
        times = {
            "host: modules and counts of writes": _median_s(check.check, device),
            "sample, alone, until its result is there": _median_s(lambda: check.start()(), device),
            "host: launching the sample": _median_s(check.start, device, waits=False),
            "check_model(), all bytes": _median_s(check.check_whole, device, repeats=3),
            "opening: sums of all samples": _median_s(lambda: ModelCheck(model, check._state), device, repeats=3),
            "opening: digest of the weights": _median_s(lambda: weights_digest(model), device, repeats=2),
        }
    modules = sum(1 for _ in model.modules())
    sizes = {
        "modules": f"{modules:,}",
        "bytes of tensors": f"{sums.num_bytes:,}",
        "samples in turn": f"{sums.phases:,}",
    }
    return sizes | {name: f"{seconds * 1e6:,.1f} us" for name, seconds in times.items()}


def _median_s(call: Callable[[], object], device: torch.device, *, repeats: int = 200, waits: bool = True) -> float:
    seconds = []
    for _ in range(repeats + 2):
        _synchronize(device)
        started = time.perf_counter()
        call()
        if waits:
            _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _steps(runner: Runner, check: ModelCheck, batch: int, prompt_tokens: int, num_steps: int) -> dict[str, str]:
    """Decode with and without a check in turn; each step is compared with the mean of its neighbours."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = runner.loaded.model.config.vocab_size
    prompts = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator).tolist()
    stream = runner.stream(
        prompts, GenerationOptions(max_new_tokens=num_steps + 12, stop_ids=frozenset(), store_partial=False)
    )
    for _ in range(10 * batch):  # graphs are captured, caches are filled
        next(stream)
    seconds: list[float] = []
    for step in range(num_steps):
        runner._commits.model_check = check if step % 2 else _NoCheck()  # type: ignore[assignment]
        started = time.perf_counter()
        for _ in range(batch):
            next(stream)
        seconds.append(time.perf_counter() - started)
    runner._commits.model_check = check
    stream.close()  # type: ignore[attr-defined]
    plain = statistics.median(seconds[0::2])
    extra = statistics.median(
        seconds[at] - (seconds[at - 1] + seconds[at + 1]) / 2 for at in range(1, len(seconds) - 1, 2)
    )
    in_stream = extra / plain
    in_generate = in_stream * min(1.0, batch / runner.cache.config.block_size)
    return {
        f"decode step of {batch}, no check": f"{plain * 1e6:,.1f} us",
        "the same with a check": f"{statistics.median(seconds[1::2]) * 1e6:,.1f} us",
        "a check takes": f"{extra * 1e6:,.1f} us",
        "stream: of a step": f"{in_stream:.3%}",
        "generate: of a step, a check for each block": f"{in_generate:.4%}",
        f"at most {LIMIT:.1%} of a step (generate, stream)": f"{_verdict(in_generate)}, {_verdict(in_stream)}",
    }


def _verdict(share: float) -> str:
    return "ok" if share <= LIMIT else "MORE"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
