"""Sparse decode: the time of a layer's decode attention against the exact one's, and how exact it is, by budget.

Times are of CUDA graphs of several layers, the median over rounds in which all ways take turns. Exact attention is
flash-attn 2's. Key bounds are there
before, as in a running sequence; what they cost a new prompt is printed apart. `--cpu` runs a small shape, to see that
this script works: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.sparse_error import ErrorRow, error_rows, random_attention, trained_attention
from benchmarks.sparse_model import decoder_attention, load_decoder, logit_rows
from benchmarks.ttft import machine
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import LayerShape, PagedQuery, attend
from tierkv.engine.generation import GenerationOptions
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import open_runner
from tierkv.engine.sparse.attention import SparseAttention
from tierkv.engine.sparse.bounds import KeyBounds
from tierkv.engine.sparse.options import SparseDecode
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

__all__ = ["SpeedRow", "main"]

_BLOCK = 256
_HEADS, _KV_HEADS, _DIM = 32, 8, 128  # Llama-3.1-8B's
_BUDGETS = (0.05, 0.1, 0.2, 0.5)
_PAGES = (16, 32, 64, 128, 256)
_AIM = 3.0  # times faster than exact: one sequence of 128k tokens, a tenth of them


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """Microseconds of one layer's decode attention."""

    sequences: int
    tokens: int
    page: int
    budget: float
    exact_us: float
    sparse_us: float

    @property
    def ratio(self) -> float:
        """How many times faster sparse attention is."""
        return self.exact_us / self.sparse_us


class _Bench:
    """A pool of random K and V, and ways to attend over it."""

    def __init__(self, device: torch.device, *, num_blocks: int, layers: int) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layers = layers
        layout = BlockLayout.uniform(
            num_layers=layers,
            block_size=_BLOCK,
            kv_heads=_KV_HEADS,
            head_dim=_DIM,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        self.pool = HotPool(layout, num_blocks, device)
        for block in self.pool.blocks:
            block.normal_()
        self.dense: AttentionChoice = make_attention("auto", device)  # without FlashInfer, which would be compiled
        self.shape = LayerShape(device.type, self.dtype, _HEADS, _KV_HEADS, _DIM, _DIM, _BLOCK, _DIM**-0.5)

    def steps(self, sequences: int, tokens: int) -> list[SequenceStep]:
        width = -(-tokens // _BLOCK)
        blocks = random.Random(0).sample(range(self.pool.num_blocks), sequences * width)
        tables = [blocks[row * width : (row + 1) * width] for row in range(sequences)]
        return [SequenceStep(block_table=table, num_past=tokens - 1, num_new=1) for table in tables]

    def way(self, steps: list[SequenceStep], planner: Any) -> Callable[[], list[torch.Tensor]]:
        """Return what attends in all layers."""
        queries, batch = self.queries(steps, planner)
        return lambda: [attend(paged, batch) for paged in queries]

    def queries(self, steps: list[SequenceStep], planner: Any) -> tuple[list[PagedQuery], AttentionBatch]:
        """Return each layer's attention, and the batch of all."""
        batch: AttentionBatch = build_batch(
            self.pool, steps, block_size=_BLOCK, device=self.device, attention=self.dense, decode_attention=planner
        )
        torch.manual_seed(1)
        query = torch.randn(len(steps), _HEADS, _DIM, dtype=self.dtype, device=self.device)
        places = (batch.block_ids, batch.offsets)
        found = [
            PagedQuery(
                query=query,
                new_keys=self.pool.key_cache(layer)[places],
                new_values=self.pool.value_cache(layer)[places],
                keys=self.pool.key_cache(layer),
                values=self.pool.value_cache(layer),
                scale=_DIM**-0.5,
                layer=layer,
            )
            for layer in range(self.layers)
        ]
        return found, batch

    def bounds(self, options: SparseDecode, steps: list[SequenceStep]) -> tuple[SparseAttention, float]:
        """Return sparse attention over sequences, and the microseconds that their key bounds took in all layers."""
        counts = options.counts(_BLOCK)
        bounds = KeyBounds(self.pool, counts)
        bounds.update([(_Private(), step) for step in steps])  # kernels are compiled here
        _wait(self.device)
        started = time.perf_counter()
        bounds.update([(_Private(), step) for step in steps])
        _wait(self.device)
        return SparseAttention(counts, bounds, self.dense), (time.perf_counter() - started) * 1e6

    def replay(self, way: Callable[[], Any]) -> Callable[[], float]:
        """Return what measures one round: the microseconds of one layer."""
        if self.device.type != "cuda":
            return lambda: _wall_us(way) / self.layers
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                way()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            way()

        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / 2 / self.layers

        return measure


class _Private:
    """A sequence without registered blocks."""

    chain: tuple[bytes, ...] = ()

    def wait_all(self) -> None:
        """Do nothing: its K and V are there."""


def main() -> None:
    """Run the benchmark and print its tables; `--json FILE` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on a CPU, with a small shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--pages",
        type=int,
        nargs="+",
        help="page sizes whose speed is measured; all but the first only where the aim is",
    )
    parser.add_argument("--model", type=Path, help="a trained decoder: what sparse decode does to it; no speed")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that the model reads")
    parser.add_argument("--decoded", type=int, default=64, help="of them, decoded one by one")
    parser.add_argument("--without-error", action="store_true", help="speed only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    is_cpu = options.cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if is_cpu else "cuda")
    described = machine(device)
    print("  ".join(f"{name}: {value}" for name, value in described.items()), flush=True)
    if options.model:
        _decoder(options.model, device, options.tokens, options.decoded, options.pages or [32])
        return
    pages = options.pages or ([32] if is_cpu else [32, 16, 64])
    with torch.inference_mode():
        speed = _speed(device, pages, options.rounds, is_cpu=is_cpu)
        errors = [] if options.without_error else _errors(device, is_cpu=is_cpu)
    if not options.without_error:
        print(_model_logits(device, tokens=600 if is_cpu else 8192))
    if options.json:
        found = {
            "machine": described,
            "speed": [asdict(row) for row in speed],
            "error": [asdict(row) for row in errors],
        }
        options.json.write_text(json.dumps(found, indent=1))


def _decoder(path: Path, device: torch.device, tokens: int, decoded: int, pages: list[int]) -> None:
    """Measure and print what sparse decode does to a trained decoder."""
    model, ids = load_decoder(path, tokens, device)
    print(f"{'attention of':<24}{'tokens':>7} {'page':>5} {'budget':>7}  recall (worst 1 %, best possible) error")
    layers = decoder_attention(model, ids, num_queries=6, num_layers=6)
    with torch.inference_mode():
        for row in error_rows(layers, pages=_PAGES, budgets=_BUDGETS):
            _print_error(row)
    print(
        f"\n{decoded} tokens decoded after {tokens - decoded}: page, budget, logits' error, KL, same best, perplexity"
    )
    for found in logit_rows(model, ids, decoded=decoded, budgets=_BUDGETS, pages=pages):
        print(
            f"{found.page:>5} {found.budget:>7.0%} {found.error:>8.4f} {found.kl:>8.4f} {found.same_best:>7.3f} "
            f"{found.perplexity:>8.3f}",
            flush=True,
        )


def _speed(device: torch.device, pages: list[int], rounds: int, *, is_cpu: bool) -> list[SpeedRow]:
    """Measure and print the times: the aim first, in case that the time is short."""
    lengths = (4096, 2048) if is_cpu else (131_072, 32_768, 8192)
    counts = (1,) if is_cpu else (1, 16, 4)
    bench = _Bench(device, num_blocks=max(counts) * (max(lengths) // _BLOCK), layers=2 if is_cpu else 4)
    print(f"decode attention of one layer, {_HEADS} heads, {_KV_HEADS} of K and V, of {_DIM}, {bench.dtype}, us")
    print(f"{'sequences':>9} {'tokens':>7} {'page':>5} {'exact':>9}  " + "".join(f"{b:>16.0%}" for b in _BUDGETS))
    rows: list[SpeedRow] = []
    for sequences in counts:
        for tokens in lengths:
            steps = bench.steps(sequences, tokens)
            for page in pages if (sequences, tokens) == (1, max(lengths)) else pages[:1]:
                rows += _speed_rows(bench, steps, page, rounds)
    aimed = [row for row in rows if row.tokens == 131_072 and row.budget == 0.1 and row.sequences == 1]
    for row in aimed:
        text = "met" if row.ratio >= _AIM else "MISSED"
        print(f"aim: 131072 tokens, a tenth read, pages of {row.page}: {row.ratio:.2f}, >= {_AIM:g} {text}")
    return rows


def _print_stages(bench: _Bench, steps: list[SequenceStep], planner: SparseAttention, rounds: int) -> None:
    """Print how long each part of sparse attention takes."""
    queries, batch = bench.queries(steps, planner)
    plan: Any = planner.plan(bench.shape, batch)
    stages: dict[str, Callable[[], Any]] = {
        "scores": lambda: [plan.score(paged) for paged in queries],
        "choice": lambda: [plan.choose() for _ in queries],
        "attention": lambda: [plan.attend(paged) for paged in queries],
    }
    parts: list[str] = []
    for name, stage in stages.items():
        measure = bench.replay(stage)
        parts.append(f"{name} {statistics.median(measure() for _ in range(rounds)):.1f}")
    print(f"          of a budget of {_BUDGETS[1]:.0%}: {', '.join(parts)}", flush=True)


def _speed_rows(bench: _Bench, steps: list[SequenceStep], page: int, rounds: int) -> list[SpeedRow]:
    """Measure and print one line."""
    exact = bench.way(steps, None)
    sparse, bounds_us = bench.bounds(_options(1.0, page), steps)
    whole = _difference(bench.way(steps, sparse)(), exact())
    assert whole < 2e-2, f"a budget of 1 differs from exact attention by {whole}"
    ways = {0.0: bench.replay(exact)}
    for budget in _BUDGETS:
        planner = SparseAttention(_options(budget, page).counts(_BLOCK), sparse.bounds, bench.dense)
        ways[budget] = bench.replay(bench.way(steps, planner))
    times: dict[float, list[float]] = {budget: [] for budget in ways}
    for _ in range(rounds):
        for budget, measure in ways.items():
            times[budget].append(measure())
    us = {budget: statistics.median(each) for budget, each in times.items()}
    tokens = steps[0].num_past + 1
    line = "".join(f"{us[budget]:>9.1f} {us[0.0] / us[budget]:>5.2f}x" for budget in _BUDGETS)
    print(
        f"{len(steps):>9} {tokens:>7} {page:>5} {us[0.0]:>9.1f}  {line}   key bounds once: "
        f"{bounds_us / bench.layers:.0f} a layer; budget 1 differs by {whole:.1e}",
        flush=True,
    )
    if bench.device.type == "cuda":
        tenth = SparseAttention(_options(_BUDGETS[1], page).counts(_BLOCK), sparse.bounds, bench.dense)
        _print_stages(bench, steps, tenth, rounds)
    return [
        SpeedRow(sequences=len(steps), tokens=tokens, page=page, budget=budget, exact_us=us[0.0], sparse_us=us[budget])
        for budget in _BUDGETS
    ]


def _options(budget: float, page: int) -> SparseDecode:
    return SparseDecode(budget=budget, min_tokens=1, page_tokens=page)


def _errors(device: torch.device, *, is_cpu: bool) -> list[ErrorRow]:
    """Measure and print how exact attention is, on trained and on random K and V."""
    lengths = (2048,) if is_cpu else (8192, 32_768)
    num_queries = 8 if is_cpu else 32
    print(
        f"\n{'K, V and queries of':<24}{'tokens':>7} {'page':>5} {'budget':>7}  recall (worst 1 %, best possible) error"
    )
    rows: list[ErrorRow] = []
    for tokens in lengths:
        trained = trained_attention(tokens, num_queries=num_queries, device=device)
        for layers in (trained, [random_attention(tokens, num_queries=num_queries, device=device)]):
            for row in error_rows(layers, pages=_PAGES, budgets=_BUDGETS):
                rows.append(row)
                _print_error(row)
    return rows


def _print_error(row: ErrorRow) -> None:
    print(
        f"{row.name:<24}{row.tokens:>7} {row.page:>5} {row.budget:>7.0%}  {row.recall:>6.3f} "
        f"({row.worst_recall:.3f}, {row.best_recall:.3f}) {row.error:>20.3f} (worst {row.worst_error:.3f})",
        flush=True,
    )


def _model_logits(device: torch.device, *, tokens: int) -> str:
    """Return in words how far the logits of a model of random weights are off, through a runner."""
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=16_384,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.Qwen3ForCausalLM(config).to(
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    model = model.eval()
    block_bytes = probe_layout(model, block_size=_BLOCK).block_bytes
    cache = CacheConfig(block_size=_BLOCK, hot_bytes=(tokens // _BLOCK + 4) * block_bytes, warm_bytes=8 * block_bytes)
    prompt = torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = GenerationOptions(max_new_tokens=16, stop_ids=frozenset(), keep_logits=True, use_cache=False)
    logits: list[torch.Tensor] = []
    for sparse in (None, SparseDecode(budget=0.1, min_tokens=1)):
        with open_runner(LoadedModel(model, None, "random"), cache, sparse=sparse) as runner:
            (answer,) = runner.generate([prompt], wanted)
            assert answer.logits is not None
            assert runner.sparse_tokens == (15 if sparse else 0)
            logits.append(answer.logits[1].double())  # of the first sparse step: later ones follow other tokens
    difference = (logits[1] - logits[0]).norm() / logits[0].norm()
    return (
        f"logits of a model of random weights, {tokens} tokens, 10 % read: relative difference {float(difference):.3f}"
    )


def _difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))


def _wall_us(way: Callable[[], Any]) -> float:
    started = time.perf_counter()
    way()
    return (time.perf_counter() - started) * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
