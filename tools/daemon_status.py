"""How `tierkv daemon status` shows what a daemon reports."""

from __future__ import annotations

from rich.table import Table

from tierkv.daemon.messages import StatusReport
from tierkv.tools.tenants import tier_row, tier_table
from tierkv.tools.terminal import close_table, fact_table, format_age, open_console, visible
from tierkv.values.units import format_bytes

__all__ = ["print_status"]


def print_status(report: StatusReport) -> None:
    """Print the daemon's figures, its namespaces, its tenants, and what clients hold of everything bounded."""
    console = open_console()
    console.print(_facts(report))
    if report.tenants:
        console.print(_namespaces(report))
    if report.shares:
        console.print(_shares(report))
    console.print(_limits(report))


def _facts(report: StatusReport) -> Table:
    table = fact_table("tierkv daemon")
    used = report.warm_bytes - report.warm_free_bytes
    table.add_row(
        "process", f"{report.pid}, up {format_age(report.uptime_s)}, {format_bytes(report.rss_bytes)} of its own"
    )
    table.add_row("socket", visible(report.socket))
    table.add_row("store", visible(report.store or "none"))
    table.add_row("warm tier", f"{format_bytes(used)} of {format_bytes(report.warm_bytes)}")
    if report.cold:
        live, quota = format_bytes(report.cold["live_bytes"]), format_bytes(report.cold["quota_bytes"])
        table.add_row("cold tier", f"{live} of {quota}, {report.cold['blocks']:,} blocks")
    table.add_row("clients", f"{report.clients - 1:,}")  # without this command
    table.add_row("slots leased to read, to write", f"{report.leased_slots:,}, {report.reserved_slots:,}")
    table.add_row("blocks promised, being stored", f"{report.claims:,}, {report.pending_writes:,}")
    table.add_row("socket, in and out", f"{format_bytes(report.bytes_received)}, {format_bytes(report.bytes_sent)}")
    for name, count in sorted(report.counters.items()):
        table.add_row(name.replace("_", " "), f"{count:,}")
    return table


def _namespaces(report: StatusReport) -> Table:
    columns = ("namespace", "model", "tenant", "clients", "warm", "pinned")
    table = close_table(*columns, folded=("model", "tenant"))
    names = {each.owner: each.name for each in report.shares}
    for tenant in report.tenants:
        table.add_row(
            tenant.namespace[:8],
            visible(tenant.name or "unnamed"),
            visible(names.get(tenant.owner, tenant.owner[:8])),
            f"{tenant.clients:,}",
            format_bytes(tenant.warm_blocks * tenant.block_bytes),
            format_bytes(tenant.pinned_bytes),
        )
    return table


def _shares(report: StatusReport) -> Table:
    """Return what each tenant has of the tiers, and may have."""
    table = tier_table()
    for each in report.shares:
        for tier, used, share, limit in (
            ("warm", each.warm_bytes, each.warm_share, each.warm_limit),
            ("cold", each.cold_bytes, each.cold_share, each.cold_limit),
        ):
            table.add_row(
                *tier_row(each.name if tier == "warm" else "", tier, used, share, None if limit < 0 else limit)
            )
    return table


def _limits(report: StatusReport) -> Table:
    """Return what clients hold of everything that is bounded."""
    table = close_table("held by clients", "now", "at most", "largest", "one at most", folded=("held by clients",))
    for each in report.limits:
        show = format_bytes if each.name.endswith("_bytes") else "{:,}".format
        one = (show(each.largest), show(each.limit_of_one)) if each.limit_of_one else ("", "")
        table.add_row(each.name.removesuffix("_bytes").replace("_", " "), show(each.used), show(each.limit), *one)
    return table
