"""A model split over several GPUs, with a process and a cache for each, beside one GPU with half of the weights.

Starts the processes itself: one for each rank, then one for the other model. A Llama of the shape chosen, with random
weights, is split by its own tensor-parallel plan. Printed: the time of one agreement and of one sum, the time to first
token by where the prompt's cached part lies, the time of a decode step on the ranks and on one GPU with as many weights
as a rank has, and what happens when one rank loses a block. Then the same as a table of goals, with yes or NO. Without
GPUs the same runs on the CPU, for the shape "tiny".
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from benchmarks.rank_passes import passes_line
from benchmarks.ttft import SHAPES, drop_page_cache, machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel, split_model
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.ranks import rank_sums
from tierkv.ranks.group import RankGroup, agree_min
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.values.block import Tier

__all__ = ["main"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """What is evicted before each request, and the options of the request. unmeasured: requests before the times."""

    evicted: tuple[Tier, ...] = ()
    use_cache: bool = True
    compute_or_load: bool = True
    from_disk: bool = False
    unmeasured: int = 2  # the first warms up, the second may capture a graph


_BELOW = (Tier.HOT, Tier.WARM)
_WAYS: dict[str, _Way] = {
    "recompute": _Way(use_cache=False),
    "hot": _Way(),
    "warm": _Way(evicted=(Tier.HOT,)),
    "cold, page cache, all loaded": _Way(evicted=_BELOW, compute_or_load=False),
    "cold, page cache": _Way(evicted=_BELOW, unmeasured=4),  # until it has measured loading, and both side by side
    "cold, disk, all loaded": _Way(evicted=_BELOW, compute_or_load=False, from_disk=True),
    "cold, disk": _Way(evicted=_BELOW, from_disk=True, unmeasured=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    shape: str
    tokens: int
    new_tokens: int
    repeats: int
    decode: int
    graphs: bool | None
    fuse: str


def main() -> None:
    """Start the ranks, then the one GPU; print the goals. End with 1 if a process failed or took too long."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=gpus if gpus > 1 else 2)
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b" if gpus > 1 else "tiny")
    parser.add_argument("--tokens", type=int, default=8192 if gpus > 1 else 1024, help="cached tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the prompt that are not cached")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", type=int, default=128, help="tokens to decode, for the time of one")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", default=None, help="launch every kernel")
    parser.add_argument("--fuse", choices=["auto", "on", "off"], default="auto", help="fused kernels or modules' own")
    parser.add_argument("--nccl", action="store_true", help="sum by NCCL alone, not by reading other GPUs' memory")
    parser.add_argument("--timeout-s", type=float, default=330, help="after which every process is killed")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = _Options(**{name: getattr(arguments, name) for name in _Options.__slots__})
    if arguments.rank is None:
        sys.exit(_start(arguments.ranks, arguments.timeout_s))
    if arguments.timeout_s > 60:
        faulthandler.dump_traceback_later(arguments.timeout_s - 30, exit=False)
    if arguments.nccl:
        rank_sums.ONE_SHOT_BYTES.clear()
    if arguments.rank < 0:
        _run_alone(arguments.ranks, arguments.directory, options)
    else:
        _run_rank(arguments.rank, arguments.ranks, arguments.directory, options)


def _start(size: int, timeout_s: float) -> int:
    """Run this command once for each rank, then for one GPU, with the same options."""
    environment = {
        **os.environ,
        "NCCL_NVLS_ENABLE": "0",  # a GPU may be shared
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "OMP_NUM_THREADS": "1",
    }
    if torch.cuda.device_count() < size:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Transformers splits over the GPUs that it sees
    until = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], "--directory", directory]
        for numbers in (range(size), [-1]):
            code = _run_together([*command, "--ranks", str(size)], numbers, environment, until)
            if code:
                return code
        _print_goals(Path(directory))
    return 0


def _run_together(command: list[str], numbers: Iterable[int], environment: dict[str, str], until: float) -> int:
    """Run a command once for each rank's number. Return 1 if one failed; then all are ended."""
    ranks = [
        subprocess.Popen([*command, "--rank", str(number)], env={**environment, "LOCAL_RANK": str(max(0, number))})
        for number in numbers
    ]
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
    except Exception:  # noqa: BLE001 - destroying the group would wait for the graphs that the traceback keeps
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    distributed.destroy_process_group()


def _bench(device: torch.device, directory: Path, options: _Options) -> None:
    ranks = TorchRanks.of_process_group()
    loaded = LoadedModel(split_model(random_model(options.shape, device)), None, options.shape)
    say = print if ranks.rank == 0 else _say_nothing
    say("  ".join(f"{name}: {value}" for name, value in machine(device).items()), f" ranks: {ranks.size}", flush=True)
    with _opened(loaded, directory / "store", options, ranks=ranks) as runner:
        layout = runner.cache.layout
        say(f"block of a rank: {layout.block_bytes / 2**20:.1f} MiB, {layout.layers[0].kv_heads} heads of K and V")
        say(f"one agreement: {_agreement_us(ranks):.0f} us")
        say(passes_line(runner), flush=True)
        prefix = _tokens(runner, options.tokens, seed=1)
        runner.prefill(prefix)
        runner.cache.flush()
        say(f"{options.tokens} cached tokens and {options.new_tokens} new ones:")
        want: Tensor | None = None
        times_s: dict[str, float] = {}
        for name in _WAYS:
            times_s[name], spread, found, want = _measure(runner, prefix, name, options, want)
            gain = times_s["recompute"] / times_s[name]
            say(
                f"{name:>30}: {times_s[name] * 1e3:8.1f} ms to the first token ({gain:.1f}x), {spread}, {found}",
                flush=True,
            )
        decode_s = _decode_s(runner, prefix, options)
        say(f"{'decode':>30}: {decode_s * 1e3:8.2f} ms a token", flush=True)
        say(_loss_line(runner, prefix, options), flush=True)
        if ranks.rank == 0:
            (directory / "ranks.json").write_text(json.dumps({**times_s, "decode": decode_s}))


def _run_alone(size: int, directory: Path, options: _Options) -> None:
    """Measure a decode step on one device, of a model that has as many weights and heads as one of `size` ranks."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    shape = dict(SHAPES[options.shape])
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        shape[name] //= size
    loaded = LoadedModel(random_model(shape, device), None, options.shape)
    with _opened(loaded, directory / "store of one", options) as runner:
        prefix = _tokens(runner, options.tokens, seed=1)
        runner.prefill(prefix)
        decode_s = _decode_s(runner, prefix, options)
        weights = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e9
    print(
        f"one device, 1/{size} of the heads, the MLPs and the vocabulary ({weights:.2f} billion weights): "
        f"{decode_s * 1e3:.2f} ms a token",
        flush=True,
    )
    (directory / "alone.json").write_text(json.dumps(decode_s))


def _opened(
    loaded: LoadedModel, store: Path, options: _Options, *, ranks: RankGroup | None = None
) -> AbstractContextManager[Runner]:
    is_small = options.shape == "tiny"
    config = CacheConfig(
        cold_path=store,
        hot_bytes=_GIB // 4 if is_small else 4 * _GIB,
        warm_bytes=_GIB // 4 if is_small else 4 * _GIB,
        cold_bytes=2 * _GIB if is_small else 16 * _GIB,
        min_free_bytes=0,
    )
    return open_runner(
        loaded, config, ranks=ranks, max_step_tokens=65_536, use_graphs=options.graphs, fuse=options.fuse
    )


def _print_goals(directory: Path) -> None:
    """Print what is to be reached on two H200, for the 8B shape and 8,192 cached tokens, and what was measured."""
    ranks, alone_s = (
        json.loads((directory / "ranks.json").read_text()),
        json.loads((directory / "alone.json").read_text()),
    )
    computing = ranks["recompute"]
    goals = [
        ("decode step, times one device's with as many weights", ranks["decode"] / alone_s, "at most", 1.15),
        ("hot, ms to the first token", ranks["hot"] * 1e3, "at most", 14.0),
        ("warm, times faster than computing", computing / ranks["warm"], "at least", 10.0),
        (
            "cold from the page cache, times faster than computing",
            computing / ranks["cold, page cache"],
            "at least",
            1.5,
        ),
        ("cold from the disk, times faster than computing", computing / ranks["cold, disk"], "at least", 1.0),
    ]
    print("goal")
    for what, got, side, bound in goals:
        is_met = got <= bound if side == "at most" else got >= bound
        print(f"  {what:<56}{got:8.2f}   {side} {bound:<6g} {'yes' if is_met else 'NO'}")


def _agreement_us(ranks: TorchRanks) -> float:
    times: list[float] = []
    for _ in range(500):
        started = time.perf_counter()
        agree_min(ranks, 1, topic=b"bench")
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def _measure(
    runner: Runner, prefix: list[int], name: str, options: _Options, want: Tensor | None
) -> tuple[float, str, str, Tensor]:
    """Return the median seconds to the first token, their spread, what was found, and the last logits.

    want: the logits of a computed answer to the same prompt; those found may differ from it by rounding only.
    """
    way, cache = _WAYS[name], runner.cache
    times: list[float] = []
    runner.compute_or_load = way.compute_or_load
    for repeat in range(way.unmeasured + options.repeats):
        suffix = _tokens(runner, options.new_tokens, seed=100 + way.unmeasured + options.repeats - repeat)
        cache.flush()  # the previous request's background writes must not slow this one
        for tier in way.evicted:
            cache.evict(tier)
        distributed.barrier()
        if way.from_disk and cache.ranks.rank == 0:
            drop_page_cache()
        distributed.barrier()
        chosen = GenerationOptions(
            max_new_tokens=1, stop_ids=frozenset(), store_partial=False, use_cache=way.use_cache, keep_logits=True
        )
        (answer,) = runner.generate([prefix + suffix], chosen)
        times.append(answer.ttft_s)
    assert answer.logits is not None
    if want is not None:
        _assert_close(answer.logits, want)
    found = " ".join(f"{count} {tier.value}" for tier, count in answer.cached_tokens.items() if count) or "nothing"
    _assert_same(runner, found)
    slowest = max(cache.ranks.gather(str(statistics.median(times[way.unmeasured :])).encode()), key=float)
    measured = sorted(times[way.unmeasured :])
    spread = f"{measured[0] * 1e3:.1f} to {measured[-1] * 1e3:.1f}"
    return float(slowest), spread, f"found {found}", answer.logits if want is None else want


def _decode_s(runner: Runner, prefix: list[int], options: _Options) -> float:
    """Return the median seconds of a decode step of one sequence, over the last of four answers."""
    chosen = GenerationOptions(max_new_tokens=options.decode, stop_ids=frozenset(), store_partial=False)
    steps: list[float] = []
    token_ids: list[int] = []
    for _ in range(4):
        steps, token_ids, last = [], [], time.perf_counter()
        for event in runner.stream([[*prefix, 5]], chosen):
            token_ids.append(event.token_id)
            steps.append(time.perf_counter() - last)
            last = time.perf_counter()
    _assert_same(runner, str(token_ids))
    return statistics.median(steps[1:])


def _loss_line(runner: Runner, prefix: list[int], options: _Options) -> str:
    """Remove a block in the middle of the prompt from the last rank; return a line with the tokens found after that."""
    cache = runner.cache
    runner.compute_or_load = False  # else a slow store is not asked at all
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
