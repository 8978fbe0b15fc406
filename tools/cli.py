"""The command `tierkv`. Each command's work is in the module of its name; here are only its options.

Standard output carries the result (a table, or one JSON object with `--json`), standard error everything
else. What the user can mend ends in one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv import __version__
from tierkv.daemon.server import DaemonConfig
from tierkv.engine.prompts import read_prompts
from tierkv.errors import ConfigError, TierKVError
from tierkv.tools import compact as compact_command
from tierkv.tools import daemon as daemon_command
from tierkv.tools import evict as evict_command
from tierkv.tools import inspect_store as inspect_command
from tierkv.tools import prefetch as prefetch_command
from tierkv.tools import replay as replay_command
from tierkv.tools import report as report_command
from tierkv.tools import run as run_command
from tierkv.tools import state as state_command
from tierkv.tools import stats as stats_command
from tierkv.tools import top as top_command
from tierkv.tools import train_policy as train_policy_command
from tierkv.tools import verify as verify_command
from tierkv.tools import warm as warm_command
from tierkv.tools.options import EngineOptions, default_socket, default_store, named_socket, parse_size

__all__ = ["app", "main"]

app = typer.Typer(
    name="tierkv",
    help="A persistent, tiered cache of attention keys and values.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Typer has click inside or beside itself, by its version: the root of click's errors is found through one of them.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

Model = Annotated[Optional[str], typer.Option(help="Directory or hub name; without it the embedded model.")]  # noqa: UP045
Store = Annotated[Optional[Path], typer.Option(help="Directory of the cold store.", show_default="user cache")]  # noqa: UP045
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there")]  # noqa: UP045
Dtype = Annotated[Optional[str], typer.Option(help="bfloat16, float16, float32.", show_default="the model's")]  # noqa: UP045
BlockSize = Annotated[Optional[list[int]], typer.Option(help="Tokens of a block.", show_default="256")]  # noqa: UP045
Salt = Annotated[str, typer.Option(help="Keeps tenants apart: blocks of another salt are never used.")]
ColdSize = Annotated[str, typer.Option("--cold", help="Quota of the store, as 512M or 64G.")]
WarmSize = Annotated[str, typer.Option("--warm", help="Size of the page-locked pool, as 512M or 8G.")]
HotSize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--hot", help="Size of the paged pool.", show_default="half the free GPU memory, or 1G on a CPU"),
]
CodecName = Annotated[
    str, typer.Option("--codec", help="lossy-int8 or lossy-fp8-e4m3 halve the bytes on disk, and change them.")
]
Socket = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Use the warm and cold tier of the daemon that listens here.", show_default="TIERKV_SOCKET"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _options(
    model: str | None,
    store: Path | None,
    device: str | None,
    dtype: str | None,
    block_size: list[int] | None,
    salt: str,
    cold: str,
    warm: str,
    hot: str | None,
    codec: str,
    socket: Path | None,
) -> EngineOptions:
    if block_size and len(set(block_size)) > 1:
        raise ConfigError(f"one command has one block size, got {' and '.join(map(str, block_size))}")
    return EngineOptions(
        model=model,
        store=store or default_store(os.environ),
        device=device,
        dtype=dtype,
        block_size=block_size[0] if block_size else 256,
        salt=salt,
        cold_bytes=parse_size(cold),
        warm_bytes=parse_size(warm),
        hot_bytes=parse_size(hot) if hot else None,
        codec=codec,
        socket=socket or named_socket(os.environ),
    )


def _store(store: Path | None, socket: Path | None) -> Path:
    """Return the store that was named, directly or as that of a daemon."""
    if store and socket:
        raise ConfigError("name a store or a daemon's socket, not both")
    daemon = socket or (None if store else named_socket(os.environ))
    return daemon_command.store_of(daemon) if daemon else store or default_store(os.environ)


@app.command()
def warm(
    file: Annotated[Path, typer.Argument(help="Prompts: text separated by lines of ---, or .jsonl.")],
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict these prompts from the store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute nothing, say what would be.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = "64G",
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Compute the K and V of prompts once and keep them on disk."""
    options = _options(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket)
    warm_command.warm(file, options, lines=lines, pin=pin, dry_run=dry_run, as_json=as_json)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="The user's text.")],
    system: Annotated[Optional[Path], typer.Option(help="File with the system prompt.")] = None,  # noqa: UP045
    nth: Annotated[int, typer.Option(help="Which prompt of a --system file that has several.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Find nothing and keep nothing.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also compute from scratch, and compare.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = "64G",
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, reusing whatever K and V are cached."""
    options = _options(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket)
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


@app.command()
def report(
    file: Annotated[Optional[Path], typer.Argument(help="Prompts as for warm.", show_default="those stored")] = None,  # noqa: UP045
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each prompt is asked for.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most, each time.")] = 16,
    output: Annotated[Path, typer.Option(help="Directory for what is written.")] = Path("tierkv-report"),
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No PNG, which need matplotlib.")] = False,
    model: Model = None,
    store: Store = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    cold: ColdSize = "64G",
    warm_size: WarmSize = "256M",
    hot: HotSize = None,
    codec: CodecName = "auto",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Run prompts under the profiler: a page, a trace for Perfetto, and plots."""
    options = _options(model, store, device, dtype, block_size, salt, cold, warm_size, hot, codec, socket)
    request = report_command.ReportRequest(
        file=file, lines=lines, rounds=rounds, max_new_tokens=max_new_tokens, output=output, plots=not no_plots
    )
    report_command.report(request, options, as_json=as_json)


@app.command()
def stats(store: Store = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Say how much a store holds."""
    stats_command.stats(_store(store, socket), as_json=as_json)


@app.command()
def inspect(
    namespace: Annotated[Optional[str], typer.Option(help="Only this namespace: leading hex digits.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="Show texts with this model's tokenizer.")] = None,  # noqa: UP045
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """List what is stored: namespaces and how they differ, prompt prefixes, sizes, ages."""
    inspect_command.inspect(_store(store, socket), namespace=namespace, model=model, as_json=as_json)


@app.command()
def save(
    file: Annotated[Path, typer.Argument(help="State file to write.")],
    namespace: Annotated[Optional[str], typer.Option(help="Leading hex digits, where there are several.")] = None,  # noqa: UP045
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Write a store's blocks of one namespace into one file."""
    state_command.save(file, _store(store, socket), namespace=namespace, as_json=as_json)


@app.command()
def load(
    file: Annotated[Path, typer.Argument(help="State file to read.")],
    store: Store = None,
    socket: Socket = None,
    cold: ColdSize = "64G",
    as_json: AsJson = False,
) -> None:
    """Put the blocks of a state file into a store."""
    state_command.load(file, _store(store, socket), cold_bytes=parse_size(cold), as_json=as_json)


@app.command()
def evict(
    to: Annotated[Optional[str], typer.Option(help="Until at most so much is live, as 512M or 0.")] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], typer.Option(help="Only this namespace: leading hex digits.")] = None,  # noqa: UP045
    older_than: Annotated[Optional[str], typer.Option(help="Only what was not used for 90s, 12h or 7d.")] = None,  # noqa: UP045
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Remove blocks from a store; pinned ones stay."""
    path = _store(store, socket)
    evict_command.evict(path, to=to, namespace=namespace, older_than=older_than, as_json=as_json)


@app.command()
def compact(store: Store = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Give a store's free space back to the disk."""
    path = _store(store, socket)
    daemon = socket or (None if store else named_socket(os.environ))
    compact_command.compact(path, daemon=daemon, as_json=as_json)


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged.")] = False,
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Read every block of a store and say which are damaged; exit code 1 if any is left."""
    if not verify_command.verify(_store(store, socket), repair=repair, as_json=as_json):
        sys.exit(1)


@app.command()
def top(
    url: Annotated[Optional[str], typer.Option(help="Where a process serves its metrics.")] = None,  # noqa: UP045
    socket: Annotated[Optional[Path], typer.Option(help="Look at the daemon that listens here.")] = None,  # noqa: UP045
    store: Annotated[Optional[Path], typer.Option(help="Look at a store on disk.")] = None,  # noqa: UP045
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    prefixes: Annotated[int, typer.Option(help="How many of the largest prefixes to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Watch a running cache: tiers, hits, bandwidth, misses, largest prefixes."""
    if url is None and socket is None and store is None:
        socket = named_socket(os.environ)
    source = top_command.Source(url=url, socket=socket, store=store)
    top_command.top(source, interval_s=interval, once=once, prefixes=prefixes, as_json=as_json)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help='Requests, one a line: {"timestamp": ms, "hash_ids": [...]}.')],
    policy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Names with commas between; learned:FILE for a trained one.", show_default="all"),
    ] = None,
    capacity: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Blocks, or a percentage of the unique ones; several with commas.", show_default="10%"),
    ] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw hit rate over capacity into this PNG.")] = None,  # noqa: UP045
    prefill: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measured prefills, tokens:seconds with commas.", show_default="an 8B model on an H200"),
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of the trace.", min=2)] = 512,
    as_json: AsJson = False,
) -> None:
    """Compare eviction policies on a request trace, beside the best that was possible."""
    replay_command.replay(
        trace,
        policies=policy or [],
        capacities=capacity or [],
        plot=plot,
        prefill=prefill,
        block_size=block_tokens,
        as_json=as_json,
    )


@app.command("train-policy")
def train_policy(
    trace: Annotated[Path, typer.Argument(help="Requests, as for replay.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; the policy is then learned:FILE.")],
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of the trace.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Draws the conversations that measure the fit.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the learned eviction policy to a request trace."""
    train_policy_command.train_policy(trace, out, block_size=block_tokens, seed=seed, as_json=as_json)


daemon_app = typer.Typer(help="One warm cache for every process on the machine.", no_args_is_help=True)
app.add_typer(daemon_app, name="daemon")


@daemon_app.command("start")
def daemon_start(
    detach: Annotated[bool, typer.Option("--detach", help="Return when it serves, as a process of its own.")] = False,
    warm_size: WarmSize = "1G",
    cold: ColdSize = "64G",
    store: Store = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep nothing on disk.")] = False,
    socket: Socket = None,
    metrics_port: Annotated[Optional[int], typer.Option(help="Serve Prometheus metrics here, locally.")] = None,  # noqa: UP045
    warm_file: Annotated[Optional[Path], typer.Option(help="Prompts whose blocks come up from the store.")] = None,  # noqa: UP045
    model: Model = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
) -> None:
    """Start a daemon. Model, dtype, block size and salt say whose prompts --warm-file has."""
    path = socket or default_socket(os.environ)
    config = DaemonConfig(
        socket=path.expanduser().absolute(),
        store=None if no_store else (store or default_store(os.environ)).expanduser().absolute(),
        warm_bytes=parse_size(warm_size),
        cold_bytes=parse_size(cold),
        metrics_port=metrics_port,
    )
    command: list[str] = []
    if warm_file:
        read_prompts(warm_file)
        command = [sys.executable, "-c", "from tierkv.tools.cli import main; main()", "daemon", "prefetch"]
        command += [str(warm_file.absolute()), "--socket", str(config.socket), "--device", "cpu", "--salt", salt]
        command += ["--block-size", str((block_size or [256])[0])]
        command += ["--model", model] if model else []
        command += ["--dtype", dtype] if dtype else []
    daemon_command.start(config, detach=detach, warm_command=command)


@daemon_app.command("status")
def daemon_status(socket: Socket = None, as_json: AsJson = False) -> None:
    """Say what the daemon holds and for whom."""
    daemon_command.status(socket or default_socket(os.environ), as_json=as_json)


@daemon_app.command("stop")
def daemon_stop(socket: Socket = None) -> None:
    """End the daemon; what it has yet to store is stored first."""
    daemon_command.stop(socket or default_socket(os.environ))


@daemon_app.command("prefetch")
def daemon_prefetch(
    file: Annotated[Path, typer.Argument(help="Prompts: text separated by lines of ---, or .jsonl.")],
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Have the blocks of prompts brought from the store into the warm tier."""
    path = socket or default_socket(os.environ)
    options = _options(model, None, device, dtype, block_size, salt, "64G", "256M", None, "auto", path)
    prefetch_command.prefetch(read_prompts(file, lines=lines), options, as_json=as_json)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; never returns."""
    try:
        app(standalone_mode=False)
    except TierKVError as exc:
        _fail(str(exc))
    except _UsageError as exc:
        _fail(exc.format_message())  # type: ignore[attr-defined]
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(0)


def _fail(message: str) -> None:
    line = "tierkv: " + " ".join(message.split())
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # a path need not be UTF-8
    sys.exit(2)
