"""`tierkv top`: a live view of a running cache, of a daemon, or of a store on disk."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierkv.daemon.messages import Status, StatusReport
from tierkv.errors import ConfigError, DaemonGoneError, TierKVError
from tierkv.profiling.prefixes import PrefixTable
from tierkv.storage.cold import ColdStore
from tierkv.tools.daemon_client import open_client
from tierkv.tools.keys import Keys, single_keys
from tierkv.tools.options import AsJson, DaemonSocket, as_path, default_socket, spread
from tierkv.tools.stores import open_existing
from tierkv.tools.tenants import TenantNames
from tierkv.tools.terminal import open_console, print_json, visible
from tierkv.values.block import Tier
from tierkv.values.events import BlockEvent, EventKind
from tierkv.values.units import format_bytes

__all__ = ["top"]

_TIMEOUT_S = 5.0
_MAX_INTERVAL_S = 86_400.0
_MAX_TENANTS = 10
_LIMIT_BYTES = 16 << 20  # of a process's answer
_Status = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _View:
    """One look: the status, and how far the counters rose in the `span_s` seconds since the look before.

    span_s: 0 at the first look.
    """

    source: str
    status: _Status
    span_s: float = 0.0
    changes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def show(self, tier: str, name: str, form: Callable[[float], str]) -> str:
        """Return a counter's change a second; at the first look the counter; nothing where it is not counted."""
        value = self.status["tiers"][tier].get(name)
        if value is None:
            return ""
        if not self.span_s:
            return form(value).removesuffix(".0")
        return form(self.changes.get(tier, {}).get(name, 0) / self.span_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What to look at: a process that serves its metrics, a daemon's socket, or the directory of a store."""

    url: Annotated[str | None, typer.Option(help="Where a process serves its metrics, as http://localhost:9400.")] = (
        None
    )
    socket: DaemonSocket = None
    store: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="DIRECTORY", help="Directory of a store on disk.")
    ] = None

    def __str__(self) -> str:
        return self.url or str(self.socket or self.store)


@spread()
def top(
    source: _Source,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    prefixes: Annotated[int, typer.Option(min=0, help="How many of the largest prefixes to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show a running cache live: tiers, hits, bandwidth, misses, largest prefixes."""
    named = [each for each in (source.url, source.socket, source.store) if each is not None]
    if len(named) > 1:
        raise ConfigError("say what to look at: --url of a process that serves metrics, --socket, or --store")
    if not named:
        source = _Source(socket=default_socket(os.environ))
    if not 0 < interval <= _MAX_INTERVAL_S:
        raise ConfigError(f"--interval must be positive and at most {_MAX_INTERVAL_S:.0f}, got {interval:g}")
    look = _looker(source, prefixes)
    try:
        first = look()
    except DaemonGoneError as exc:
        if named:
            raise
        raise DaemonGoneError(f"{exc}; --store looks at a store, --url at a process that serves metrics") from exc
    if as_json:
        print_json(first)
        return
    picture = _picture(source, first)
    if once:
        open_console().print(picture)
        return
    with (
        suppress(KeyboardInterrupt),
        single_keys() as keys,
        Live(_with_keys(picture, keys), console=open_console(), screen=True, auto_refresh=False) as live,
    ):
        before, seen_at = first, time.monotonic()
        while "q" not in keys.wait(interval).lower():
            try:
                status, now = look(), time.monotonic()
                picture = _picture(source, status, before, now - seen_at)
            except TierKVError as exc:  # the process may be restarting: keep the last picture beside the error
                live.update(Group(_with_keys(picture, keys), Text(visible(str(exc)), style="red")), refresh=True)
                continue
            before, seen_at = status, now
            live.update(_with_keys(picture, keys), refresh=True)


def _with_keys(picture: RenderableType, keys: Keys) -> RenderableType:
    """Return a picture with a line that names the keys, on top: a screen that is too low shows it all the same."""
    line = "q ends, any other key looks at once" if keys.descriptor is not None else "Ctrl-C ends"
    return Group(Text(line, style="dim"), picture)


def _picture(source: _Source, status: _Status, before: _Status | None = None, span_s: float = 0.0) -> RenderableType:
    """Return what is shown of a status. Raises ConfigError for a status that is not of a tierkv cache."""
    try:
        changes = _changes(before, status) if before else {}
        return _render(_View(str(source), status, span_s, changes))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise ConfigError(f"what {source} says is not the status of a tierkv cache") from exc


def _looker(source: _Source, prefixes: int) -> Callable[[], _Status]:
    socket, store = source.socket, source.store
    if source.url is not None:
        address = _status_address(source.url)
        return lambda: _cut(_fetch(address), prefixes)
    if socket is not None:
        return lambda: _look_at_daemon(socket, prefixes)
    assert store is not None
    return lambda: _look_at_store(store, prefixes)


def _status_address(url: str) -> str:
    """Return the address of /status; the user may give the server's, or that of /metrics. Raises ConfigError."""
    address = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        address.encode("ascii")
    except ValueError:  # a port beyond 65535, a bracket that is not closed, a sign that no address has
        is_address = False
    if not is_address:
        raise ConfigError(f"{url!a} is not an address such as http://localhost:9400")
    return address.rstrip("/").removesuffix("/metrics").removesuffix("/status") + "/status"


def _fetch(address: str) -> _Status:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:  # http(s) only, checked above
            status: Any = json.loads(answer.read(_LIMIT_BYTES))
    except (urllib.error.URLError, OSError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise ConfigError(
            f"nothing answers at {address}: {reason}",
            hint="a process answers with tierkv.profiling.metrics.serve_metrics(cache, port)",
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"what answers at {address} is not tierkv: {exc}") from exc
    if not isinstance(status, dict) or not isinstance(status.get("tiers"), dict):
        raise ConfigError(f"what answers at {address} is not tierkv")
    found: _Status = status
    return found


def _cut(status: _Status, prefixes: int) -> _Status:
    found = status.get("prefixes")
    return {**status, "prefixes": found[:prefixes] if isinstance(found, list) else []}


def _look_at_daemon(socket: Path, prefixes: int) -> _Status:
    """Return a daemon's account of its warm tier, and the sizes of its store's files."""
    with open_client(socket) as client:
        report = client.call(Status(), StatusReport)
    counters = dict(report.counters)
    used = report.warm_bytes - report.warm_free_bytes
    warm = {
        "blocks": sum(tenant.warm_blocks for tenant in report.tenants),
        "used_bytes": used,
        "stored_bytes": used,
        "capacity_bytes": report.warm_bytes,
        "evictions": counters.pop("evicted_blocks", 0),
    }
    stored = _look_at_store(Path(report.store), prefixes) if report.store else {"tiers": {}, "prefixes": []}
    return {
        "model": ", ".join(sorted({tenant.name or tenant.namespace[:8] for tenant in report.tenants})),
        "clients": report.clients - 1,  # without this one
        "counters": counters,
        "tenants": [
            {"name": each.name, "warm_bytes": each.warm_bytes, "cold_bytes": each.cold_bytes} for each in report.shares
        ],
        "tiers": {"warm": warm, **stored["tiers"]},
        "prefixes": stored["prefixes"],
    }


def _look_at_store(path: Path, prefixes: int) -> _Status:
    """Return sizes and the most used prefixes, by the files of a store."""
    with open_existing(path) as store:
        sizes = store.stats()
        names = TenantNames.of(store)
        return {
            "tenants": [
                {"name": names.name_of(tenant), "cold_bytes": size} for tenant, size in store.tenant_bytes().items()
            ],
            "model": ", ".join(str(n.description.get("name") or n.digest.hex()[:8]) for n in store.namespaces()),
            "tiers": {
                "cold": {
                    "blocks": sizes.blocks,
                    "used_bytes": sizes.raw_bytes,
                    "stored_bytes": sizes.live_bytes,
                }
            },
            "bytes_file": sizes.file_bytes,
            "prefixes": _stored_prefixes(store, prefixes),
        }


def _stored_prefixes(store: ColdStore, count: int) -> list[dict[str, Any]]:
    """Return the largest runs of stored blocks; their hits are all uses that the store has recorded."""
    table = PrefixTable([Tier.COLD])
    for block_hash, entry in sorted(store.iter_entries(), key=lambda item: item[1].depth):  # parents first
        event = BlockEvent(EventKind.REGISTER, Tier.COLD, block_hash, entry.parent, entry.num_tokens, entry.value_bytes)
        table.on_block(event)
        table.count_hits(block_hash, entry.access_count)
    return [use.to_dict() for use in table.largest(count)]


def _changes(before: _Status, after: _Status) -> dict[str, dict[str, int]]:
    """Return how far each tier's numbers rose; 0 where they fell, because the process was restarted."""
    return {
        tier: {name: max(0, value - before["tiers"].get(tier, {}).get(name, 0)) for name, value in numbers.items()}
        for tier, numbers in after["tiers"].items()
    }


def _render(view: _View) -> RenderableType:
    status = view.status
    parts: list[RenderableType] = [_headline(view), _tier_table(view)]
    misses = {reason: count for reason, count in status.get("miss_reasons", {}).items() if count}
    if "misses" in status:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(misses.items(), key=lambda item: -item[1]))
        parts.append(Text(f"misses: {why or 'none'}"))
    if status.get("skipped_writes"):
        parts.append(Text(f"writes that were dropped: {status['skipped_writes']:,}", style="yellow"))
    if len(status.get("tenants", ())) > 1:
        parts.append(_tenant_table(status["tenants"]))
    parts.append(_prefix_table(status))
    return Group(*parts)


def _headline(view: _View) -> Text:
    status = view.status
    name = f"tierkv top  {view.source}"
    if status.get("model"):
        name += f"  {status['model']}"
    lines = [name]
    if "requests" in status:
        lines.append(
            f"{status['requests']:,} requests, {status['token_hit_rate']:.1%} of {status['prompt_tokens']:,} prompt "
            f"tokens and {status['hit_rate']:.1%} of {status['hits'] + status['misses']:,} blocks found, "
            f"fragmentation {status['fragmentation_ratio']:.0%}"
        )
    elif "clients" in status:
        counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(status["counters"].items()))
        lines.append(f"a daemon with {status['clients']:,} clients: {counted or 'nothing asked yet'}")
    else:
        lines.append(f"a store on disk, {format_bytes(status['bytes_file'])} of files")
    return Text(visible("\n".join(lines)))


def _tier_table(view: _View) -> Table:
    """Return a row for each tier. Rates need two looks: at the first there are totals."""
    unit = "/s" if view.span_s else ""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("tier", no_wrap=True)
    table.add_column("full")  # the only one that gives way on a narrow terminal
    for column in ("blocks", "holds", f"hits{unit}", f"read{unit}", f"written{unit}", f"evicted{unit}"):
        table.add_column(column, justify="right", no_wrap=True)
    for tier, numbers in view.status["tiers"].items():
        capacity = numbers.get("capacity_bytes", 0)
        filled = numbers["stored_bytes" if tier == "cold" else "used_bytes"]  # in a pool, uncompressed as its capacity
        # A store on disk counts no writes: its growth stands for them.
        written = "bytes_in" if "bytes_in" in numbers else "stored_bytes" if view.span_s else ""
        table.add_row(
            tier,
            ProgressBar(total=capacity, completed=filled, width=8) if capacity else "",
            f"{numbers['blocks']:,}",
            format_bytes(numbers["stored_bytes"]),
            view.show(tier, "hits", "{:,.1f}".format),
            view.show(tier, "bytes_out", format_bytes),
            view.show(tier, written, format_bytes),
            view.show(tier, "evictions", "{:,.1f}".format),
        )
    return table


def _tenant_table(tenants: list[dict[str, Any]]) -> Table:
    """Return what each tenant has in the tiers, the largest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tenant")
    for column in ("warm", "cold"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = sorted(tenants, key=lambda each: -(each.get("warm_bytes", 0) + each["cold_bytes"]))
    for each in rows[:_MAX_TENANTS]:
        warm = format_bytes(each["warm_bytes"]) if "warm_bytes" in each else ""
        table.add_row(visible(each["name"]), warm, format_bytes(each["cold_bytes"]))
    if len(rows) > _MAX_TENANTS:
        table.add_row(f"and {len(rows) - _MAX_TENANTS} more", "", "")
    return table


def _prefix_table(status: _Status) -> Table:
    table = Table(title="largest prefixes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("block")
    for column in ("tokens", "from", "blocks", "bytes", "hits"):
        table.add_column(column, justify="right", no_wrap=True)
    for prefix in status["prefixes"]:
        table.add_row(
            prefix["block"][:12],
            f"{prefix['tokens']:,}",
            f"{prefix['first_token']:,}",
            ", ".join(f"{count:,} {tier}" for tier, count in prefix["blocks"].items() if count),
            format_bytes(prefix["bytes"]),
            f"{prefix['hits']:,}",
        )
    return table
