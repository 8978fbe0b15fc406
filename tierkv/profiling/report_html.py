"""A profiled run as one page: HTML, style sheet and charts in one file, no network and no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tierkv.profiling.advice import LEAST_REQUESTS
from tierkv.profiling.charts import (
    Chart,
    eviction_chart,
    fragmentation_chart,
    heat_chart,
    hit_curve_chart,
    memory_chart,
    token_chart,
)
from tierkv.profiling.drawing import can_draw, svg_of
from tierkv.profiling.first_tokens import FirstTokens
from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.values.block import Tier
from tierkv.values.units import format_bytes, format_seconds

__all__ = ["render_page"]


def render_page(run: ProfiledRun) -> str:
    """Return the page as text."""
    title = escape(run.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{title}</h1>{_summary(run)}{_tiles(run)}"
        f"{_section('What to change', _advice(run))}"
        f"{_charts(run)}"
        f'<div class="stack">{"".join(_tables(run))}</div>'
        "</main></body></html>\n"
    )


def _summary(run: ProfiledRun) -> str:
    measured = run.measured
    if not measured.requests:
        return "<p>No request was made while the cache was observed.</p>"
    found = ", ".join(f"{count:,} in the {tier.value} tier" for tier, count in measured.tokens.items() if count)
    computed = measured.prompt_tokens - measured.hit_tokens
    text = (
        f"In {format_seconds(run.seconds)} the cache served {_count(measured.requests, 'request')} with "
        f"{_count(measured.prompt_tokens, 'prompt token')}. "
        + (f"It found {found}; {computed:,} had to be computed." if found else "It found none of them.")
    )
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.about.items())
    return f"<p>{text}</p><dl>{about}</dl>"


def _tiles(run: ProfiledRun) -> str:
    measured = run.measured
    hot = measured.eviction_summary(Tier.HOT)
    warm = measured.eviction_summary(Tier.WARM)
    last = run.snapshots[-1]
    tiles = [
        *_time_tiles(run.first_tokens),
        (_percent(measured.hit_tokens, measured.prompt_tokens), "of the prompt tokens needed no prefill"),
        (_percent(sum(measured.hits.values()), measured.asked), f"of {measured.asked:,} blocks asked for were cached"),
        (f"{hot.count:,} / {warm.count:,}", "blocks evicted from the hot / the warm tier"),
        (f"{hot.asked_again:,} / {warm.asked_again:,}", "of these evicted blocks were asked for again later"),
        (f"{last.fragmentation_ratio:.0%}", "of the free hot blocks lie outside the longest free run"),
        (format_bytes(run.allocations["peak_allocated"]), "held at most: pools and registered tensors"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b>{escape(text)}</div>' for value, text in tiles)
        + "</div>"
    )


def _time_tiles(first: FirstTokens) -> Iterator[tuple[str, str]]:
    """Yield what a reader wants to know first. Nothing where the caller recorded no times."""
    if first.saved_s is not None:
        yield (
            format_seconds(first.saved_s),
            "saved, compared with computing the cached tokens",
        )
    if first.median_s is not None:
        computed = first.computed_median_s
        beside = f"; {format_seconds(computed)} where nothing was cached" if computed is not None else ""
        yield format_seconds(first.median_s), f"to the first token, median{beside}"


def _charts(run: ProfiledRun) -> str:
    """Return the charts that show something, and below them, folded, why the others do not."""
    charts = {
        "Where prompt tokens came from": token_chart(run),
        "Memory in use": memory_chart(run),
        "Uses of hot blocks": heat_chart(run),
        "Hits over size": hit_curve_chart(run),
        "Fragmentation of the hot pool": fragmentation_chart(run),
        "Evictions": eviction_chart(run),
    }
    drawn = "".join(_figure(title, chart) for title, chart in charts.items() if chart.draw)
    empty = {title: chart.caption for title, chart in charts.items() if not chart.draw}
    return f'<div class="grid2">{drawn}</div>' + (_folded("Charts without anything to show", empty) if empty else "")


def _folded(title: str, texts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
    return f"<details><summary>{escape(title)}: {escape(', '.join(texts))}</summary><dl>{rows}</dl></details>"


def _figure(title: str, chart: Chart) -> str:
    drawn = svg_of(chart) if can_draw() else "<p class='soft'>Charts need matplotlib: tierkv[report].</p>"
    caption = f"<figcaption>{escape(chart.caption)}</figcaption>"
    return f"<section><h2>{escape(title)}</h2><figure>{drawn}{caption}</figure></section>"


def _tables(run: ProfiledRun) -> Iterator[str]:
    yield _section("Tiers", _tier_table(run))
    if run.measured.evictions:
        yield _section("Evictions", _eviction_table(run))
    if run.spans:
        yield _section("Where the cache spent time", _span_table(run))
    if run.prefixes:
        yield _section("Largest prefixes in memory", _prefix_table(run))
    if pools := _pool_rows(run):
        yield _section("Memory held", _table(["what", "bytes", "shape", "device", "address"], pools))
    if run.notes:
        yield _section(
            "Limits of this record", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in run.notes) + "</ul>"
        )


def _advice(run: ProfiledRun) -> str:
    requests = run.measured.requests
    if requests < LEAST_REQUESTS:
        return f"<p>Advice needs {LEAST_REQUESTS} requests; this run had {requests:,}.</p>"
    if not run.suggestions:
        return f"<p>These {requests:,} requests give no reason to change a setting.</p>"
    return "".join(
        f'<div class="advice"><p><code>{escape(each.setting)}</code>: {escape(each.now)} → '
        f"<b>{escape(each.proposed)}</b></p><p>{escape(each.effect[0].upper() + each.effect[1:])}.</p>"
        f'<p class="soft">Because {escape(each.evidence)}.</p></div>'
        for each in run.suggestions
    )


def _tier_table(run: ProfiledRun) -> str:
    before, after = run.measured.before, run.measured.after
    rows = []
    for tier, now in after.tiers.items():
        then = before.of(tier)
        rows.append(
            [
                tier.value,
                f"{now.blocks:,}",
                format_bytes(now.stored_bytes),
                format_bytes(run.measured.room_bytes(tier)),
                f"{now.hits - then.hits:,}",
                f"{now.hit_tokens - then.hit_tokens:,}",
                format_bytes(now.bytes_in - then.bytes_in) if tier is not Tier.HOT else "",
                format_bytes(now.bytes_out - then.bytes_out) if tier is not Tier.HOT else "",
                f"{now.evictions - then.evictions:,}",
            ]
        )
    head = ["tier", "blocks", "holds", "of", "block hits", "tokens", "written", "read", "evicted"]
    misses = ", ".join(f"{count:,} {escape(reason)}" for reason, (count, _) in run.measured.misses.items())
    return _table(head, rows) + (
        f"<p class='soft'>Blocks that no tier had: {misses or 'none'}. What comes from the cold tier passes through a "
        "warm slot and counts as read from both.</p>"
    )


def _eviction_table(run: ProfiledRun) -> str:
    rows = []
    for tier in (Tier.HOT, Tier.WARM):
        each = run.measured.eviction_summary(tier)
        rows.append(
            [
                tier.value,
                f"{each.count:,}",
                f"{each.never_hit:,}",
                f"{each.asked_again:,}",
                f"{each.premature:,}",
                f"{each.lost:,}",
                format_seconds(each.median_age_s) if each.count else "",
                format_seconds(each.median_idle_s) if each.count else "",
                f"{each.room_missed:,}" if each.premature else "",
            ]
        )
    head = [
        "tier",
        "evicted",
        "never reused",
        "asked again",
        "too early",
        "computed again",
        "median age",
        "idle",
        "room missed",
    ]
    return _table(head, rows) + (
        "<p class='soft'>Never reused: no later request found it there. Too early: asked for again within as many "
        "further evictions as the tier has blocks. Room missed: blocks more that would have kept nine in ten of those."
        "</p>"
    )


def _span_table(run: ProfiledRun) -> str:
    totals: dict[str, tuple[int, float, int]] = {}
    for span in run.spans:
        count, seconds, blocks = totals.get(span.name, (0, 0.0, 0))
        moved = span.detail.get("blocks", 0)
        totals[span.name] = count + 1, seconds + span.seconds, blocks + (moved if isinstance(moved, int) else 0)
    rows = [
        [
            escape(name),
            f"{count:,}",
            format_seconds(seconds),
            format_seconds(seconds / count),
            f"{blocks:,}" if blocks else "",
            format_seconds(seconds / blocks) if blocks else "",
        ]
        for name, (count, seconds, blocks) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]
    return _table(["work", "times", "total", "mean", "blocks", "a block"], rows) + (
        "<p class='soft'>promote and read cold are inside acquire; load in the background, demote and store cold run "
        "on threads of their own. On a GPU promote is only the time to queue the copies.</p>"
    )


def _prefix_table(run: ProfiledRun) -> str:
    rows = [
        [
            f"<code>{each.block_hash.hex()[:12]}</code>",
            f"{each.first_token:,} to {each.first_token + each.num_tokens:,}",
            f"{each.blocks[Tier.HOT]:,}",
            f"{each.blocks[Tier.WARM]:,}",
            format_bytes(each.num_bytes),
            f"{each.hits:,}",
        ]
        for each in run.prefixes
    ]
    return _table(["last block", "tokens", "hot blocks", "warm blocks", "bytes", "hits"], rows) + (
        "<p class='soft'>A row is a run of blocks without a branch: a prefix that prompts share until they "
        "differ, or the rest of one prompt.</p>"
    )


def _pool_rows(run: ProfiledRun) -> list[list[str]]:
    rows = [
        [
            escape(each.purpose + (f" (in {each.part_of})" if each.part_of else "")),
            format_bytes(each.size_bytes),
            escape(" x ".join(map(str, each.shape)) + f" {each.dtype}"),
            escape(each.device),
            f"<code>0x{each.tensor_ptr:x}</code>",
        ]
        for each in run.pools
    ]
    by_purpose = run.allocations["by_purpose"]
    for purpose in ("hot block", "warm block"):
        if purpose in by_purpose:
            blocks = by_purpose[purpose]
            size = f"{format_bytes(blocks['bytes'])}, at most {format_bytes(blocks['peak_bytes'])}"
            rows.append([f"{blocks['count']:,} {purpose}s (in their pool)", size, "", "", ""])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the cells are HTML."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# For a desk and a phone, light and dark.
_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #5f6872; --rule: #dfe2e6;
  --hot: #c8501e; --warm: #d99a00; --cold: #1f6fb2; --computed: #a3a9b0; --good: #2d7d46; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --card: #1d2126; --ink: #e9ebee; --soft: #a2abb5; --rule: #343a42;
    --hot: #ff8552; --warm: #f2bd42; --cold: #62b0ee; --computed: #737b85; --good: #6fcf8d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.1rem; margin: 0 0 4px; }
p { margin: 0 0 10px; max-width: 72ch; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin: 18px 0; }
.tile, section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; line-height: 1.25; }
.grid2 { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
section { margin: 0; min-width: 0; } section + .grid2, .stack > section { margin-top: 16px; }
.grid2 > section:last-child:nth-child(odd) { grid-column: 1 / -1; }
svg { display: block; width: 100%; max-width: 500px; height: auto; } figure { margin: 0; }
svg text { font-family: system-ui, sans-serif !important; fill: var(--soft); }
details { margin-top: 16px; color: var(--soft); font-size: .9rem; } summary { cursor: pointer; }
.tile:first-child { border-color: var(--good); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.advice { border-left: 4px solid var(--good); padding-left: 12px; margin: 10px 0; } code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 8px 0 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 720px) { .grid2 { grid-template-columns: minmax(0, 1fr); } main { padding: 14px 12px 32px; }
  .tile, section { padding: 12px; } td:first-child { white-space: normal; min-width: 7em; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""
