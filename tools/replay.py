"""`tierkv replay`: what eviction policies would have made of a request trace, beside the best that was possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tierkv.errors import ConfigError
from tierkv.policies import make_policy, policy_names
from tierkv.tools.plots import print_curves, save_curves
from tierkv.tools.render import open_console, print_json, visible
from tierkv.tools.replay_index import Outcome, replay_trace
from tierkv.tools.traces import Trace, belady_hits, read_trace
from tierkv.values.files import user_path
from tierkv.values.prefill import MEASURED_PREFILL, PrefillModel

__all__ = ["replay"]

_CURVE = ("1%", "2%", "5%", "10%", "20%")


@dataclass(frozen=True, slots=True)
class _Point:
    """What all policies made of one capacity."""

    capacity: str
    blocks: int
    outcomes: dict[str, Outcome]
    belady: float


def replay(
    path: Path,
    *,
    policies: Sequence[str],
    capacities: Sequence[str],
    plot: Path | None,
    prefill: str | None,
    block_size: int,
    as_json: bool,
) -> None:
    """Replay a trace and print the results. Raises ConfigError for what the user can mend.

    policies, capacities: each item may be several, with commas between; no policy means all of them, no capacity
    10%, or the points of a curve where a plot is asked for.
    """
    model = _parse_prefill(prefill) if prefill else MEASURED_PREFILL
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"{plot} is not the name of a PNG file")
    names = [_with_whole_path(name) for name in _items(policies)] or policy_names()
    for name in names:
        make_policy(name)  # says what is wrong before anything takes time
    trace = read_trace(path, block_size=block_size)
    wanted = _items(capacities) or list(_CURVE if plot else ("10%",))
    sizes = {text: trace.capacity(text) for text in wanted}
    points = _replay_all(trace, names, sizes, model)
    if as_json:
        print_json(_as_json(trace, points))
    else:
        _print_tables(trace, points)
    curves = {name: [point.outcomes[name].hit_rate for point in points] for name in names}
    curves["Belady, may bypass"] = [point.belady for point in points]
    shares = [100 * point.blocks / trace.num_unique for point in points]
    is_saved = plot is not None and save_curves(plot, shares, curves, title=f"{trace.name}: block hit rate")
    if not is_saved and (plot or len(points) > 1):
        print_curves(open_console(stderr=as_json), shares, curves)


def _replay_all(trace: Trace, names: list[str], sizes: dict[str, int], model: PrefillModel) -> list[_Point]:
    points = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=open_console(stderr=True), transient=True) as progress:
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
        table.add_column("policy")
        for header in ("hit rate", "of Belady's", "prefill saved"):
            table.add_column(header, justify="right")
        ranked = sorted(point.outcomes.items(), key=lambda item: -item[1].hit_rate)
        for name, outcome in ranked:
            share = f"{outcome.hit_rate / point.belady:.1%}" if point.belady else "-"
            table.add_row(visible(name), f"{outcome.hit_rate:.4f}", share, f"{outcome.seconds_saved:,.1f} s")
        table.add_row("Belady, may bypass", f"{point.belady:.4f}", "", "", style="dim")
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
