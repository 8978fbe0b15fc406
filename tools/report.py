"""`tierkv report`: run requests under the profiler, and write a page, a trace and plots."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress
from rich.table import Table

from tierkv.engine.prompts import read_prompts, render_tokens
from tierkv.engine.runner import GenerationOptions, Runner
from tierkv.errors import ConfigError, StoreError
from tierkv.profiling.memory_report import MemoryReport, MemoryVisualizer
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.storage.cold import ColdStore
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.engines import open_engine
from tierkv.tools.options import AsJson, Lines, as_path, spread
from tierkv.tools.stores import iter_chains
from tierkv.tools.terminal import fact_table, open_console, print_json, visible
from tierkv.values.block import BlockHash
from tierkv.values.units import format_bytes, format_seconds

__all__ = ["ReportRequest", "report"]

_MAX_ROUNDS = 10_000
_QUESTIONS = ("Where do I begin?", "What should I check first?", "Where can I read more?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """What to run, and where to write what was recorded."""

    file: Annotated[
        Path | None,
        typer.Argument(parser=as_path, metavar="[FILE]", help="Prompts as for warm.", show_default="those stored"),
    ] = None
    lines: Lines = False
    rounds: Annotated[int, typer.Option(help="How often each prompt is asked for.")] = 2
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most, each time.")] = 16
    output: Annotated[
        Path, typer.Option(parser=as_path, metavar="DIRECTORY", help="Directory for what is written.")
    ] = Path("tierkv-report")
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No PNGs; they need the extra report.")] = False


@dataclass(frozen=True, slots=True)
class _Prompt:
    name: str
    token_ids: list[int]


@spread()
def report(request: ReportRequest, options: EngineOptions, as_json: AsJson = False) -> None:
    """Run prompts under the profiler, and write a page, a trace for Perfetto, and plots."""
    config = options.config()
    if not 1 <= request.rounds <= _MAX_ROUNDS:
        raise ConfigError(f"--rounds must be positive and at most {_MAX_ROUNDS:,}, got {request.rounds}")
    with _writing_to(request.output):
        request.output.mkdir(parents=True, exist_ok=True)  # before anything is computed
    with open_engine(options, config) as runner:
        rounds = _rounds(request, runner, options.day)
        with MemoryProfiler(runner.cache, snapshot_every_s=0.0, sample_every=1) as profiler:
            _run(runner, profiler, rounds, request.max_new_tokens)
            profiler.close()
            made = profiler.generate_report(title="tierkv memory profile", about=_about(request, options.model, runner))
    written = _write(made, request)
    if as_json:
        print_json(_summary(made, written))
    else:
        open_console().print(_table(made, written))


def _rounds(request: ReportRequest, runner: Runner, day: date | None) -> list[list[_Prompt]]:
    """Return the prompts of each round; those of a file get another question in each."""
    if request.file is None:
        stored = list(_stored_prompts(runner))
        if not stored:
            raise StoreError("the store holds no prompt of this model", hint="name a file, or run tierkv warm first")
        return [stored] * request.rounds
    prompts = read_prompts(request.file, lines=request.lines)
    tokenizer = runner.loaded.tokenizer
    return [
        [
            _Prompt(f"prompt {number}", render_tokens(tokenizer, prompt, _QUESTIONS[at % len(_QUESTIONS)], day=day))
            for number, prompt in enumerate(prompts, start=1)
        ]
        for at in range(request.rounds)
    ]


def _stored_prompts(runner: Runner) -> Iterator[_Prompt]:
    """Yield the tokens of every chain of blocks that the store holds for this model, root to leaf."""
    store = runner.cache.cold
    if store is None:
        raise ConfigError("a daemon keeps the store", hint="name a file of prompts, or the store with --store")
    root = runner.cache.namespace.digest
    entries = dict(store.iter_entries(root))
    for chain in iter_chains(entries):
        token_ids = _tokens_of(store, chain) if entries[chain[0]].parent == root else None
        if token_ids:
            yield _Prompt(chain[-1].hex()[:8], token_ids)


def _tokens_of(store: ColdStore, chain: Sequence[BlockHash]) -> list[int] | None:
    """Return the tokens of a chain; None if a block was evicted meanwhile."""
    pieces = [store.read_tokens(block_hash) for block_hash in chain]
    if any(piece is None for piece in pieces):
        return None
    token_ids: list[int] = np.frombuffer(b"".join(piece or b"" for piece in pieces), dtype="<u4").tolist()
    return token_ids


def _run(runner: Runner, profiler: MemoryProfiler, rounds: list[list[_Prompt]], max_new_tokens: int) -> None:
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    with Progress(console=open_console(stderr=True)) as progress:
        task = progress.add_task("running", total=sum(map(len, rounds)))
        for number, prompts in enumerate(rounds, start=1):
            for prompt in prompts:
                name = f"{prompt.name}, round {number}" if len(rounds) > 1 else prompt.name
                with profiler.iteration(name):
                    (done,) = runner.generate([prompt.token_ids], options)
                profiler.record_first_token(
                    prompt_tokens=done.prompt_tokens,
                    cached_tokens=sum(done.cached_tokens.values()),
                    seconds=done.ttft_s,
                )
                progress.advance(task)
        runner.cache.flush()


def _about(request: ReportRequest, model: str | None, runner: Runner) -> dict[str, str]:
    layout = runner.cache.layout
    return {
        "model": model or "the embedded one (random weights)",
        "device": str(runner.loaded.model.device),
        "block": f"{layout.block_size} tokens, {format_bytes(layout.block_bytes)}, {layout.dtype}",
        "requests": f"{request.file or 'the prompts in the store'}, {request.rounds} rounds, one at a time, up to "
        f"{request.max_new_tokens} new tokens",
        "store": str(runner.cache.config.cold_path),
    }


@contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(
            f"cannot write to {exc.filename or output}: {exc.strerror}", hint="choose another directory with --output"
        ) from exc


def _write(made: MemoryReport, request: ReportRequest) -> list[Path]:
    with _writing_to(request.output):
        written = [
            made.save_html(request.output / "memory_profile.html"),
            made.export_trace(request.output / "trace.json"),
        ]
        plots = None if request.no_plots else _plots(made)
        if plots:
            written += [
                plots.plot_allocation_timeline(request.output / "allocation_timeline.png"),
                plots.plot_memory_heatmap(request.output / "memory_heatmap.png"),
                plots.plot_fragmentation(request.output / "fragmentation.png"),
            ]
    return written


def _plots(made: MemoryReport) -> MemoryVisualizer | None:
    """Return the visualizer; without matplotlib print so and return None: the page has no charts then."""
    try:
        return MemoryVisualizer(made)
    except ConfigError as exc:
        print(f"no plots: {exc}", file=sys.stderr)
        return None


def _summary(made: MemoryReport, written: list[Path]) -> dict[str, Any]:
    measured, first = made.run.measured, made.run.first_tokens
    return {
        "seconds_saved": first.saved_s,
        "first_token_s": first.median_s,
        "first_token_computed_s": first.computed_median_s,
        "requests": measured.requests,
        "prompt_tokens": measured.prompt_tokens,
        "hit_tokens": {tier.value: tokens for tier, tokens in measured.tokens.items()},
        "evictions": {tier.value: summary.count for tier, summary in made.eviction_analysis.items()},
        "evicted_and_asked_again": {
            tier.value: summary.asked_again for tier, summary in made.eviction_analysis.items()
        },
        "premature_evictions": {tier.value: summary.premature for tier, summary in made.eviction_analysis.items()},
        "suggestions": [
            {"setting": each.setting, "now": each.now, "proposed": each.proposed, "effect": each.effect}
            for each in made.optimization_suggestions
        ],
        "seconds": round(made.run.seconds, 6),
        "files": [str(path) for path in written],
    }


def _table(made: MemoryReport, written: list[Path]) -> Table:
    measured = made.run.measured
    first = made.run.first_tokens
    table = fact_table(made.run.title)
    if first.saved_s is not None:
        table.add_row("seconds saved", format_seconds(first.saved_s))
    if first.median_s is not None:
        table.add_row("time to first token", format_seconds(first.median_s))
    if first.computed_median_s is not None:
        table.add_row("  nothing cached", format_seconds(first.computed_median_s))
    table.add_row("requests", f"{measured.requests:,}")
    table.add_row("prompt tokens", f"{measured.prompt_tokens:,}")
    for tier, tokens in measured.tokens.items():
        table.add_row(f"  found {tier.value}", f"{tokens:,}")
    for tier, summary in made.eviction_analysis.items():
        table.add_row(f"evicted from {tier.value}", f"{summary.count:,}, {summary.asked_again:,} asked for again")
    for each in made.optimization_suggestions:
        table.add_row(f"try {each.setting}", f"{each.proposed}: {each.effect}")
    table.add_row("written", "\n".join(visible(str(path)) for path in written))
    return table
