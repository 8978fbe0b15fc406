"""`tierkv replay` and `tierkv train-policy`: eviction policies on a request trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tierkv.errors import ConfigError
from tierkv.policies import make_policy, policy_names
from tierkv.policies.learned import FEATURES
from tierkv.policies.replay import Outcome, replay_trace
from tierkv.policies.traces import Trace, belady_hits, read_trace
from tierkv.policies.training import fit_model
from tierkv.profiling.charts import Chart
from tierkv.profiling.drawing import can_draw, save_png
from tierkv.tools.options import AsJson, BlockTokens, TraceFile, as_path
from tierkv.tools.terminal import open_console, print_json, visible
from tierkv.values.files import user_path
from tierkv.values.prefill import MEASURED_PREFILL, PrefillModel

__all__ = ["replay", "train_policy"]

_BELADY = "Belady, may bypass"
_CURVE = ("1%", "2%", "5%", "10%", "20%")
_MARKS = "ox+*#@%&sv^"
_HEIGHT = 16


@dataclass(frozen=True, slots=True)
class _Point:
    """The outcome of every policy at one capacity. belady: the best possible hit rate."""

    capacity: str
    blocks: int
    outcomes: dict[str, Outcome]
    belady: float


def replay(
    trace: TraceFile,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Names with commas between; learned:FILE for a trained one.", show_default="all"),
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option(help="Blocks, or a percentage of the unique ones; several with commas.", show_default="10%"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="FILE", help="Draw hit rate over capacity into this PNG."),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(help="Measured prefills, tokens:seconds with commas.", show_default="an 8B model on an H200"),
    ] = None,
    block_tokens: BlockTokens = 512,
    as_json: AsJson = False,
) -> None:
    """Compare eviction policies on a request trace, beside the best that is possible."""
    model = _parse_prefill(prefill) if prefill else MEASURED_PREFILL
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"{plot} is not the name of a PNG file")
    names = [_with_whole_path(name) for name in _items(policy or [])] or policy_names()
    for name in names:
        make_policy(name)  # an unknown policy is refused before anything takes time
    requests = read_trace(trace, block_size=block_tokens)
    sizes = {text: requests.capacity(text) for text in _items(capacity or []) or (_CURVE if plot else ("10%",))}
    points = _replay_all(requests, names, sizes, model)
    if as_json:
        print_json(_as_json(requests, points))
    else:
        _print_tables(requests, points)
    curves = {name: [point.outcomes[name].hit_rate for point in points] for name in names}
    curves[_BELADY] = [point.belady for point in points]
    shares = [100 * point.blocks / requests.num_unique for point in points]
    if plot and can_draw():
        save_png(plot, f"{requests.name}: block hit rate", [_chart(shares, curves)])
    elif plot or len(points) > 1:
        _print_curves(open_console(stderr=as_json), shares, curves)


def train_policy(
    trace: TraceFile,
    out: Annotated[
        Path,
        typer.Option(parser=as_path, metavar="FILE", help="JSON file to write; the policy is then learned:FILE."),
    ],
    block_tokens: BlockTokens = 512,
    seed: Annotated[int, typer.Option(help="Draws the conversations that measure the fit.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the learned eviction policy to a request trace, and print its weights."""
    requests = read_trace(trace, block_size=block_tokens)
    model, summary = fit_model(requests, seed=seed)
    model.save(out)
    if as_json:
        print_json({"out": str(out), **summary, "weights": dict(zip(FEATURES, model.weights, strict=True))})
        return
    title = f"{visible(requests.name)}, {summary['uses']:,.0f} uses; written to {visible(str(out))}"
    table = Table(title=title, show_header=False)
    for name, weight in zip(FEATURES, model.weights, strict=True):
        table.add_row(name, f"{weight:+.3f}")
    table.add_row("horizon", f"{summary['horizon_s']:.0f} s")
    table.add_row("log loss, held out", f"{summary['log_loss']:.4f}")
    table.add_row("of a constant guess", f"{summary['log_loss_constant']:.4f}")
    open_console().print(table)


def _replay_all(trace: Trace, names: list[str], sizes: dict[str, int], model: PrefillModel) -> list[_Point]:
    points = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("replaying", total=len(sizes) * len(names))
        for text, blocks in sizes.items():
            outcomes = {}
            for name in names:
                progress.update(task, description=f"replaying {name} at {text}")
                outcomes[name] = replay_trace(trace, make_policy(name), blocks, model)
                progress.advance(task)
            points.append(_Point(text, blocks, outcomes, belady_hits(trace.requests, blocks) / trace.num_blocks))
    return points


def _as_json(trace: Trace, points: list[_Point]) -> dict[str, object]:
    """Describe the first capacity at the top level, and all of them as a curve."""
    curve = [
        {
            "capacity": point.capacity,
            "capacity_blocks": point.blocks,
            "policies": {
                name: {"hit_rate": outcome.hit_rate, "seconds_saved": outcome.seconds_saved, "hits": outcome.hits}
                for name, outcome in point.outcomes.items()
            },
            "belady_hit_rate": point.belady,
        }
        for point in points
    ]
    return {
        "trace": trace.name,
        "requests": len(trace.requests),
        "blocks": trace.num_blocks,
        "unique_blocks": trace.num_unique,
        **curve[0],
        "curve": curve,
    }


def _print_tables(trace: Trace, points: list[_Point]) -> None:
    console = open_console()
    console.print(
        f"{visible(trace.name)}: {len(trace.requests):,} requests, {trace.num_blocks:,} blocks, "
        f"{trace.num_unique:,} unique"
    )
    for point in points:
        table = Table(title=f"{point.blocks:,} blocks ({100 * point.blocks / trace.num_unique:.3g} % of the unique)")
        table.add_column("policy", overflow="fold")
        for header in ("hit rate", "of Belady's", "prefill saved"):
            table.add_column(header, justify="right")
        ranked = sorted(point.outcomes.items(), key=lambda item: -item[1].hit_rate)
        for name, outcome in ranked:
            share = f"{outcome.hit_rate / point.belady:.1%}" if point.belady else "-"
            table.add_row(visible(name), f"{outcome.hit_rate:.4f}", share, f"{outcome.seconds_saved:,.1f} s")
        table.add_row(_BELADY, f"{point.belady:.4f}", "", "", style="dim")
        console.print(table)


def _with_whole_path(policy: str) -> str:
    kind, colon, path = policy.partition(":")
    return f"{kind}:{user_path(path)}" if colon and path else policy


def _items(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(item.strip() for value in values for item in value.split(",") if item.strip()))


def _parse_prefill(text: str) -> PrefillModel:
    """Return the model of measurements such as 1024:0.035,8192:0.278."""
    try:
        pairs = [item.split(":") for item in _items([text])]
        return PrefillModel.fit([int(length) for length, _ in pairs], [float(seconds) for _, seconds in pairs])
    except ConfigError:
        raise
    except ValueError as exc:
        raise ConfigError(f"{text!r} is no list of tokens:seconds such as 1024:0.035,8192:0.278") from exc


def _chart(shares: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Chart:
    """Return hit rates over capacity in percent."""

    def draw(axes: Any) -> None:
        for name, rates in curves.items():
            style = {"color": "0.4", "linestyle": "--"} if name == _BELADY else {"marker": "o", "markersize": 4}
            axes.plot(shares, rates, label=name, **style)
        axes.set_xscale("log")
        axes.set_xticks(list(shares), labels=[f"{share:g}" for share in shares], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("capacity, % of the trace's unique blocks")
        axes.set_ylabel("block hit rate")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")

    return Chart("Block hit rate over capacity", "", draw)


def _print_curves(console: Console, shares: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Draw hit rates over capacity as text, a letter for each curve; of curves in one place the last is visible."""
    top = max((max(rates) for rates in curves.values()), default=0.0) or 1.0
    column = max(7, min(14, (console.width - 8) // max(len(shares), 1)))
    rows = [[" "] * (column * len(shares)) for _ in range(_HEIGHT)]
    for mark, rates in zip(_MARKS * len(curves), curves.values(), strict=False):
        for at, rate in enumerate(rates):
            rows[_HEIGHT - 1 - round(rate / top * (_HEIGHT - 1))][at * column + column // 2] = mark
    for at, row in enumerate(rows):
        label = f"{top * (_HEIGHT - 1 - at) / (_HEIGHT - 1):.3f}" if at % 5 == 0 else ""
        console.print(Text(f"{label:>6} |{''.join(row).rstrip()}"))
    console.print(Text(" " * 8 + "".join(f"{f'{share:.3g} %':^{column}}" for share in shares).rstrip()))
    console.print(Text("  ".join(f"{mark} {name}" for mark, name in zip(_MARKS * len(curves), curves, strict=False))))
