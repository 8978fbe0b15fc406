"""The gain of reading a shared prefix once for all sequences of a decode batch.

One layer of Llama-3.1-8B's shape; every figure is the time of CUDA graph replays. Beside each case the limit: the bytes
that must be read, over the memory's bandwidth in the same run. With --model, whole decode steps of such a model too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.ttft import machine, random_model
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch, forward
from tierkv.engine.attention_cascade import attend_cascade, own_pass, shared_pass
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import PagedQuery, attend
from tierkv.engine.cascade import CascadeCost, SharedPrefix, plan_cascade
from tierkv.engine.graphs import GraphedModel
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

__all__ = ["compare", "main"]

_HEADS, _KV_HEADS, _DIM, _BLOCK = 32, 8, 128, 256
_LAYERS = 8  # so many that no layer's K and V stay in the L2 cache until the next replay
_TOKEN_BYTES = 2 * _KV_HEADS * _DIM * 2
_COST = CascadeCost.of_gpu(heads=_HEADS, kv_heads=_KV_HEADS, head_dim=_DIM, token_bytes=_TOKEN_BYTES)


@dataclass(slots=True)
class _Case:
    """One batch, its layers' attention, and the microseconds per layer of each way to compute it."""

    batch: int
    shared: int
    own: int
    layers: list[PagedQuery]
    step: AttentionBatch
    plan: tuple[SharedPrefix, ...]
    times_us: dict[str, float] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)


def main() -> None:
    """Run the benchmark on one GPU and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 64, 128])
    parser.add_argument("--shared", type=int, nargs="+", default=[1024, 8192, 32_768], help="tokens, in whole blocks")
    parser.add_argument("--own", type=int, default=200, help="tokens that each sequence has for itself")
    parser.add_argument("--model", action="store_true", help="also time whole decode steps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.cascade needs a GPU with flash-attn: there is no CUDA device here")
        return
    device = torch.device("cuda")
    import flash_attn
    import triton

    versions = {**machine(device), "triton": triton.__version__, "flash-attn": flash_attn.__version__}
    print("  ".join(f"{name}: {value}" for name, value in versions.items()))
    read = _bandwidth(device)
    print(f"memory: {read / 1e12:.2f} TB/s reading\n")
    cases: list[_Case] = []
    for shared in arguments.shared:
        for batch in arguments.batch:
            try:
                cases.append(_measure(batch, shared, arguments.own, device))
            except Exception as exc:  # noqa: BLE001 - a failed case must not lose the others
                print(f"batch {batch}, {shared} shared: {type(exc).__name__}: {exc}")
            else:
                _print_case(cases[-1], read)
    _print_fit(cases)
    if arguments.model:
        _bench_model(device)


def compare(batch: int, shared: int, *, own: int = 200) -> tuple[float, float]:
    """Return the microseconds of a layer's decode attention, plain and as a cascade."""
    case = _make_case(batch, shared, own, torch.device("cuda"))
    cascade = case.step.cascade
    assert cascade is not None
    ways: list[Callable[[PagedQuery], object]] = [
        partial(attend, batch=case.step),
        partial(attend_cascade, cascade=cascade, side=torch.cuda.Stream()),  # as in a runner's graphs
    ]
    plain, together = (_replay_us(partial(_all_layers, case.layers, way)) / _LAYERS for way in ways)
    case.layers.clear()
    return plain, together


def _bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large sum reads."""
    values = torch.ones(1 << 30, device=device)
    return values.numel() * 4 / (_replay_us(values.sum) / 1e6)


def _replay_us(work: Callable[[], object], *, repeats: int = 30) -> float:
    """Return the median microseconds of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate before capturing
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times: list[float] = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def _make_case(batch: int, shared: int, own: int, device: torch.device) -> _Case:
    """Return random queries, K and V; the blocks of each sequence are scattered in a block-major pool."""
    num_shared, num_own = shared // _BLOCK, -(-(own + 1) // _BLOCK)
    layout = BlockLayout.uniform(
        num_layers=_LAYERS, block_size=_BLOCK, kv_heads=_KV_HEADS, head_dim=_DIM, dtype="bfloat16"
    )
    pool = HotPool(layout, num_shared + batch * num_own, device)
    pool.blocks.normal_()
    free = torch.randperm(pool.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    prefix = [free.pop() for _ in range(num_shared)]
    tables = [prefix + [free.pop() for _ in range(num_own)] for _ in range(batch)]
    past = shared + own - 1
    steps = [SequenceStep(block_table=table, num_past=past, num_new=1) for table in tables]
    plan = (SharedPrefix(tuple(range(batch)), num_shared),)
    step = build_batch(pool, steps, block_size=_BLOCK, device=device, plan=plan)
    layers = [
        PagedQuery(
            query=torch.randn(batch, _HEADS, _DIM, device=device, dtype=torch.bfloat16),
            new_keys=torch.randn(batch, _KV_HEADS, _DIM, device=device, dtype=torch.bfloat16),
            new_values=torch.randn(batch, _KV_HEADS, _DIM, device=device, dtype=torch.bfloat16),
            keys=pool.key_cache(layer),
            values=pool.value_cache(layer),
            scale=_DIM**-0.5,
        )
        for layer in range(_LAYERS)
    ]
    chosen = plan_cascade(tables, [past] * batch, block_size=_BLOCK, cost=_COST)
    return _Case(batch, shared, own, layers, step, chosen)


def _measure(batch: int, shared: int, own: int, device: torch.device) -> _Case:
    """Time the plain path, the cascade and its parts."""
    case = _make_case(batch, shared, own, device)
    cascade = case.step.cascade
    assert cascade is not None
    side = torch.cuda.Stream(device)
    ways: dict[str, Callable[[PagedQuery], object]] = {
        "plain": partial(attend, batch=case.step),
        "cascade": partial(attend_cascade, cascade=cascade, side=side),  # as in a runner's graphs
        "  shared pass": lambda paged: shared_pass(paged, paged.query, cascade),
        "  plain with its writes": partial(_write_and_attend, step=case.step),
        "  own pass": lambda paged: own_pass(paged, paged.query, cascade),
        "  one stream": partial(attend_cascade, cascade=cascade),
    }
    for name, way in ways.items():
        _time(case, name, way)
    first = case.layers[0]
    outs = [_write_and_attend(first, case.step), attend_cascade(first, cascade)]
    exact = _exact(first, case.step)
    case.errors = [_difference(out, exact) for out in outs]
    case.layers.clear()  # frees the pool
    return case


def _time(case: _Case, name: str, way: Callable[[PagedQuery], object]) -> None:
    try:
        case.times_us[name] = _replay_us(partial(_all_layers, case.layers, way)) / _LAYERS
    except Exception as exc:  # noqa: BLE001 - a failed way must not lose the others
        print(f"batch {case.batch}, {case.shared} shared, {name.strip()}: {type(exc).__name__}: {exc}")


def _write_and_attend(paged: PagedQuery, step: AttentionBatch) -> Tensor:
    """Write and attend as the plain path does; the cascade's own pass writes too."""
    paged.keys[step.block_ids, step.offsets] = paged.new_keys
    paged.values[step.block_ids, step.offsets] = paged.new_values
    return attend(paged, step)


def _all_layers(layers: Sequence[PagedQuery], way: Callable[[PagedQuery], object]) -> None:
    for paged in layers:
        way(paged)


def _exact(paged: PagedQuery, step: AttentionBatch) -> Tensor:
    """Return the attention of every sequence in float32."""
    outs: list[Tensor] = []
    for row, length in enumerate(step.kv_lengths):
        blocks = step.block_table[row].long()
        keys, values = (pages[blocks].flatten(0, 1)[:length].float() for pages in (paged.keys, paged.values))
        query = paged.query[row].float().view(_KV_HEADS, -1, _DIM)
        weights = (torch.einsum("kgd,lkd->kgl", query, keys) * paged.scale).softmax(-1)
        outs.append(torch.einsum("kgl,lkd->kgd", weights, values).flatten(0, 1))
    return torch.stack(outs)


def _difference(got: Tensor, want: Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `want`."""
    return float((got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt())


def _print_case(case: _Case, read: float) -> None:
    times = case.times_us
    plain, cascade = times.get("plain", float("nan")), times.get("cascade", float("nan"))
    limit = (case.shared + case.batch * case.own) * _TOKEN_BYTES / read * 1e6
    plain_limit = case.batch * (case.shared + case.own) * _TOKEN_BYTES / read * 1e6
    verdict = "cascade" if case.plan else "plain"
    print(
        f"batch {case.batch}, {case.shared} shared, {case.own} own: plain {plain:.1f} us (limit {plain_limit:.1f}), "
        f"cascade {cascade:.1f} us (limit {limit:.1f}), ratio {plain / cascade:.2f}; the plan says {verdict}; "
        f"errors against float32 {', '.join(f'{error:.1e}' for error in case.errors)}"
    )
    for name, value in times.items():
        if name.startswith("  "):
            print(f"  {name}: {value:.1f} us")


def _print_fit(cases: Sequence[_Case]) -> None:
    """Print the measured speeds for `CascadeCost.of_gpu`."""
    whole = [case for case in cases if {"plain", "cascade", "  shared pass", "  own pass"} <= set(case.times_us)]
    if not whole:
        return
    plain = [c.batch * (c.shared + c.own) * _TOKEN_BYTES / c.times_us["plain"] / 1e6 for c in whole]
    flops = [4 * _COST.padded_queries(c.batch) * _DIM * c.shared / c.times_us["  shared pass"] / 1e6 for c in whole]
    added = [
        c.times_us["cascade"] - _COST.plain_s(c.batch, c.own) * 1e6 - _COST.shared_s(c.batch, c.shared) * 1e6
        for c in whole
    ]
    print("\nfor CascadeCost.of_gpu, least / median / most of all cases:")
    for name, values in (("bytes_per_s, 1e12", plain), ("flops_per_s, 1e12", flops), ("overhead_s, 1e-6", added)):
        print(f"  {name}: {min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}")
    wrong = [c for c in whole if bool(c.plan) != (c.times_us["cascade"] < c.times_us["plain"])]
    for case in wrong:
        print(f"  the plan is wrong at batch {case.batch}, {case.shared} shared")


def _bench_model(device: torch.device, *, batch: int = 64, shared: int = 8192) -> None:
    """Time decode steps of a whole model, alone and through the runner, with and without cascade."""
    loaded = LoadedModel(random_model("8b", device), None, "8b")
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(0, 100_000, (shared,), generator=generator).tolist()
    prompts = [prefix + torch.randint(0, 100_000, (64,), generator=generator).tolist() for _ in range(batch)]
    options = GenerationOptions(max_new_tokens=100, stop_ids=frozenset(), store_partial=False)
    config = CacheConfig(hot_bytes=16 << 30, warm_bytes=1 << 30, write_through=False)
    for choice in ("off", "auto"):
        with open_runner(loaded, config, cascade=choice) as runner:
            runner.prefill(prefix)
            runner.generate(prompts, options)  # captures
            before = runner.cascade_steps
            speed = sum(result.tokens_per_s for result in runner.generate(prompts, options))
            print(
                f"cascade {choice}: a decode step of {batch} sequences with {shared} shared tokens takes "
                f"{_step_ms(runner, prompts, choice):.2f} ms; {speed:.0f} tokens/s through the runner, "
                f"{runner.cascade_steps - before} steps as cascade"
            )


def _step_ms(runner: Runner, prompts: Sequence[list[int]], choice: str) -> float:
    """Return the milliseconds of a captured decode step, its inputs written anew each time."""
    sequences = [runner.cache.acquire(prompt) for prompt in prompts]
    steps = [SequenceStep(block_table=s.block_table, num_past=s.num_tokens - 1, num_new=1) for s in sequences]
    tables, past = [s.block_table for s in sequences], [s.num_tokens - 1 for s in sequences]
    plan = plan_cascade(tables, past, block_size=_BLOCK, cost=_COST) if choice == "auto" else ()
    attention = make_attention("auto", runner.cache.device)
    graphs = GraphedModel(runner.loaded.model, runner.cache, attention=attention)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.inference_mode():
        for number in range(53):
            if number == 3:
                start.record()
            if graphs.run(steps, [1] * len(steps), plan) is None:
                batch = build_batch(runner.cache.hot, steps, block_size=_BLOCK, device=runner.cache.device, plan=plan)
                ids = torch.ones(len(steps), dtype=torch.int64, device=runner.cache.device)
                forward(runner.loaded.model, ids, batch)
        end.record()
        end.synchronize()
    for sequence in sequences:
        runner.cache.release(sequence)
    return float(start.elapsed_time(end)) / 50


if __name__ == "__main__":
    main()
