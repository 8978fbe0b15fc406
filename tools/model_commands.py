"""Commands that run a model over a cache: warm, run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv.tools import report as report_command
from tierkv.tools import run as run_command
from tierkv.tools import warm as warm_command
from tierkv.tools.cli_options import (
    AsJson,
    BlockSize,
    CodecName,
    ColdSize,
    Device,
    Dtype,
    HotSize,
    MinFree,
    Model,
    PromptFile,
    ReadOnly,
    Salt,
    Socket,
    Store,
    WarmSize,
    as_path,
    engine_options,
)


def warm(
    file: PromptFile,
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict these prompts from the store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute nothing, say what would be.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = None,
    min_free: MinFree = None,
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Compute the K and V of prompts once and keep them on disk."""
    options = engine_options(
        *(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket),
        min_free=min_free,
    )
    warm_command.warm(file, options, lines=lines, pin=pin, dry_run=dry_run, as_json=as_json)


def run(
    prompt: Annotated[str, typer.Argument(help="The user's text.")],
    system: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=as_path, metavar="FILE", help="File with the system prompt, as for warm."),
    ] = None,
    nth: Annotated[int, typer.Option(help="Which prompt of a --system file that has several.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass, 0 to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Find nothing and keep nothing.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also compute from scratch, and compare.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = None,
    min_free: MinFree = None,
    read_only: ReadOnly = False,
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, reusing whatever K and V are cached."""
    options = engine_options(
        *(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket),
        min_free=min_free,
        read_only=read_only,
    )
    request = run_command.RunRequest(
        prompt=prompt,
        system=system,
        nth=nth,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        use_cache=not no_cache,
        compare=compare,
    )
    run_command.run(request, options, as_json=as_json)


def report(
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(parser=as_path, metavar="[FILE]", help="Prompts as for warm.", show_default="those stored"),
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each prompt is asked for.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most, each time.")] = 16,
    output: Annotated[
        Path, typer.Option(parser=as_path, metavar="DIRECTORY", help="Directory for what is written.")
    ] = Path("tierkv-report"),
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No PNGs; they need the extra report.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = None,
    min_free: MinFree = None,
    read_only: ReadOnly = False,
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Run prompts under the profiler: a page, a trace for Perfetto, and plots."""
    options = engine_options(
        *(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket),
        min_free=min_free,
        read_only=read_only,
    )
    request = report_command.ReportRequest(
        file=file, lines=lines, rounds=rounds, max_new_tokens=max_new_tokens, output=output, plots=not no_plots
    )
    report_command.report(request, options, as_json=as_json)
