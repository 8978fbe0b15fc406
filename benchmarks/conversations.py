"""What keeping the partial block at the end of each answer costs, and what the next turn of a conversation gains.

Conversations of several turns run through `Runner.generate`, some at the same time. Each turn sends all that was said
before, and a new text. The first process keeps whole blocks only, the second the partial block too; both begin with
empty tiers, and take turns, so that both have the same noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.values.block import Tier
from tierkv.values.units import format_bytes

__all__ = ["Measured", "main", "measure"]

_POOL_BYTES = {"8b": 12 << 30, "small": 4 << 30, "tiny": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of all turns of all conversations of one run.

    turn_s: seconds of a turn, from the call to its last token. first_token_s: median, of the turns behind the first.
    computed_tokens: of the prompts of these turns. flush_s: mean time after a turn until all was on disk.
    written_bytes: that left the hot pool. stored_bytes: on disk at the end.
    """

    turn_s: float
    first_token_s: float
    computed_tokens: int
    flush_s: float
    stored_bytes: int
    written_bytes: int


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on a CPU, with a tiny model unless --shape says else")
    parser.add_argument("--shape", choices=sorted(_POOL_BYTES))
    parser.add_argument("--conversations", type=int, nargs="+", default=[1, 16], help="at the same time")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system", type=int, default=2000, help="tokens of the system prompt that all share")
    parser.add_argument("--user", type=int, default=60, help="tokens of each new text")
    parser.add_argument("--answer", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda")
    shape = arguments.shape or ("8b" if device.type == "cuda" else "tiny")
    print("  ".join(f"{name}: {value}" for name, value in {**machine(device), "shape": shape}.items()), flush=True)
    print(
        f"{arguments.turns} turns, a system prompt of {arguments.system} tokens, texts of {arguments.user}, answers of "
        f"{arguments.answer}; blocks of 256 tokens; medians of {arguments.repeats}"
    )
    loaded = LoadedModel(random_model(shape, device), None, shape)
    for count in arguments.conversations:
        found: dict[bool, list[Measured]] = {False: [], True: []}
        for repeat in range(arguments.repeats + 1):
            for store_partial in (False, True):
                measured = measure(loaded, count, arguments, pool_bytes=_POOL_BYTES[shape], store_partial=store_partial)
                if repeat:  # the first round warms up the device
                    found[store_partial].append(measured)
        _print_table(count, found)


def measure(
    loaded: LoadedModel, count: int, arguments: argparse.Namespace, *, pool_bytes: int, store_partial: bool
) -> Measured:
    """Run all conversations on empty tiers."""
    with tempfile.TemporaryDirectory() as folder:
        config = CacheConfig(
            cold_path=Path(folder), cold_bytes=64 << 30, hot_bytes=pool_bytes, warm_bytes=pool_bytes // 2
        )
        with open_runner(loaded, config) as runner:
            return _converse(runner, count, arguments, store_partial=store_partial)


def _converse(runner: Runner, count: int, arguments: argparse.Namespace, *, store_partial: bool) -> Measured:
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    options = GenerationOptions(max_new_tokens=arguments.answer, stop_ids=frozenset(), store_partial=store_partial)
    system = text(arguments.system)
    said = [list(system) for _ in range(count)]
    runner.generate([system], GenerationOptions(max_new_tokens=1, stop_ids=frozenset(), store_partial=False))
    turn_s: list[float] = []
    first_token_s: list[float] = []
    flush_s: list[float] = []
    computed = 0
    for turn in range(arguments.turns):
        for each in said:
            each += text(arguments.user)
        started = time.perf_counter()
        answers = runner.generate(said, options)
        turn_s.append(time.perf_counter() - started)
        for each, answer in zip(said, answers, strict=True):
            if turn:
                first_token_s.append(answer.ttft_s)
                computed += answer.prompt_tokens - sum(answer.cached_tokens.values())
            each += answer.token_ids
        started = time.perf_counter()
        runner.cache.flush()  # users read the answer meanwhile
        flush_s.append(time.perf_counter() - started)
    stats = runner.cache.stats()
    return Measured(
        turn_s=statistics.mean(turn_s),
        first_token_s=statistics.median(first_token_s),
        computed_tokens=computed,
        flush_s=statistics.mean(flush_s),
        stored_bytes=stats.of(Tier.COLD).stored_bytes,
        written_bytes=stats.of(Tier.WARM).bytes_in,
    )


def _print_table(count: int, found: dict[bool, list[Measured]]) -> None:
    print(f"\n{count} conversations at the same time")
    print(f"{'':<28}{'whole blocks only':>20}{'partial blocks too':>20}")
    for name, show in (
        ("turn_s", "{:.3f} s".format),
        ("first_token_s", "{:.4f} s".format),
        ("computed_tokens", "{:,.0f}".format),
        ("flush_s", "{:.3f} s".format),
        ("written_bytes", format_bytes),
        ("stored_bytes", format_bytes),
    ):
        values = [statistics.median(getattr(each, name) for each in found[way]) for way in (False, True)]
        print(f"{name.replace('_', ' '):<28}" + "".join(f"{show(value):>20}" for value in values))


if __name__ == "__main__":
    main()
