"""`tierkv stats`, `quota`, `compact` and `verify`: how much a store holds and may hold, and whether it is sound."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from tierkv.daemon.messages import Compact, Done
from tierkv.errors import CorruptBlockError, DaemonError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_check import VerifyReport
from tierkv.storage.cold_eviction import EvictionReport
from tierkv.tools.confirm import DryRun, Yes, confirm, must_ask
from tierkv.tools.daemon_client import open_client
from tierkv.tools.options import AsJson, parse_size, spread
from tierkv.tools.stores import StoreOptions, open_existing
from tierkv.tools.terminal import fact_table, open_console, print_json, visible
from tierkv.values.units import format_bytes

__all__ = ["compact", "quota", "stats", "verify"]

_COMPACT_S = 3600.0


@spread()
def stats(where: StoreOptions, as_json: AsJson = False) -> None:
    """Print how much a store holds."""
    path = where.path
    with open_existing(path) as store:
        summary = _summary(store)
    if as_json:
        print_json(summary)
        return
    table = fact_table()
    table.add_row("store", visible(str(path)))
    for name in ("namespaces", "blocks", "tokens"):
        table.add_row(name, f"{summary[name]:,}")
    if summary["namespaces_unreadable"]:
        table.add_row("namespaces with an unreadable description", f"{summary['namespaces_unreadable']:,}")
    for name in ("bytes_raw", "bytes_stored", "bytes_file", "bytes_quota"):
        table.add_row(name.replace("_", " "), format_bytes(int(summary[name])))
    table.add_row("ratio", f"{summary['ratio']:.3f}")
    open_console().print(table)


@spread()
def quota(
    where: StoreOptions,
    size: Annotated[
        str | None, typer.Argument(help="The new quota in bytes, as 512M or 64G.", show_default="print the present one")
    ] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Evict what exceeds the new quota.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Print how large a store may become, or change that for every process that uses it.

    A quota below what the store holds is refused without --evict. With --dry-run the quota stays as it is.
    """
    path = where.path
    quota_bytes = None if size is None else parse_size(size)
    report = EvictionReport(blocks=0, freed_bytes=0)
    with open_existing(path, read_only=quota_bytes is None) as store:
        if quota_bytes is not None and (dry_run or (evict and must_ask(yes=yes))):
            report = store.evict(to_bytes=quota_bytes, dry_run=True)
            if report.blocks and not dry_run:
                confirm(f"evict {report.blocks:,} blocks, {format_bytes(report.freed_bytes)}?")
        if quota_bytes is not None and not dry_run:
            report = store.set_quota(quota_bytes, evict=evict)
            store.flush()
        sizes = store.stats()
    if as_json:
        result = {"quota_bytes": sizes.quota_bytes, "bytes_live": sizes.live_bytes, "blocks": sizes.blocks}
        result |= {"blocks_evicted": report.blocks, "bytes_freed": report.freed_bytes}
        print_json(result | ({"dry_run": True} if dry_run else {}))
        return
    if report.blocks:
        print(f"{'would evict' if dry_run else 'evicted'} {report.blocks:,} blocks, {format_bytes(report.freed_bytes)}")
    is_over = sizes.live_bytes > sizes.quota_bytes
    print(
        f"quota {format_bytes(sizes.quota_bytes)}, of which {sizes.blocks:,} blocks take "
        f"{format_bytes(sizes.live_bytes)}" + (" (pinned blocks and those before them stay)" if is_over else "")
    )


@spread()
def compact(where: StoreOptions, as_json: AsJson = False) -> None:
    """Return a store's free space to the disk. Needs room for a second copy of its blocks meanwhile."""
    path, daemon = where.path, where.find_daemon()
    with open_existing(path, read_only=daemon is not None) as store, _hint_of_room():
        before = store.stats().file_bytes
        if daemon is None:
            store.compact()
            after = store.stats().file_bytes
    if daemon is not None:  # it has its store open, so it compacts the store itself
        with open_client(daemon) as client, _hint_of_room():
            client.call(Compact(), Done, timeout_s=_COMPACT_S)
        with open_existing(path) as store:
            after = store.stats().file_bytes
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        print(f"{format_bytes(before)} before, {format_bytes(after)} now")


@contextlib.contextmanager
def _hint_of_room() -> Iterator[None]:
    """Say in an error of a full disk that there is another way to another disk."""
    try:
        yield
    except (StoreError, DaemonError) as exc:
        if os.strerror(errno.ENOSPC) not in exc.args[0]:
            raise
        hint = "the copy needs room on the same disk; tierkv move takes the store to another one"
        raise StoreError(exc.args[0], hint=hint) from exc


@spread()
def verify(
    where: StoreOptions,
    repair: Annotated[bool, typer.Option("--repair", help="Remove damaged blocks.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Read every block of a store and print which are damaged; exit code 1 if a damaged block remains.

    With --repair, a data file that cannot be opened is replaced by what can be saved of it.
    """
    path = where.path
    if repair and must_ask(yes=yes):
        confirm(f"remove the damaged blocks of {path}, and those that follow them? (without --repair they are listed)")
    try:
        with open_existing(path, read_only=not repair) as store:
            report = _verify_with_progress(store, repair=repair)
            set_aside = str(store.damaged) if store.damaged else None
    except CorruptBlockError as exc:
        if as_json:
            print_json({"sound": False, "problem": str(exc)})
        else:
            print(visible(str(exc)))
        raise typer.Exit(1) from exc
    if as_json:
        print_json(
            {
                "sound": report.is_sound,
                "blocks": report.blocks,
                "bytes_stored": report.stored_bytes,
                "damaged": {block_hash.hex(): reason for block_hash, reason in report.damaged.items()},
                "other_formats": {block_hash.hex(): reason for block_hash, reason in report.other_formats.items()},
                "problem": report.problem,
                "repaired": repair,
                "blocks_removed": report.removed,
                "set_aside": set_aside,
            }
        )
    else:
        _print_report(report, set_aside, repair=repair)
    if not report.is_sound and not repair:
        raise typer.Exit(1)


def _summary(store: ColdStore) -> dict[str, int | float]:
    sizes = store.stats()
    namespaces = store.namespaces()
    return {
        "namespaces": len(namespaces),
        "namespaces_unreadable": sum(each.problem is not None for each in namespaces),
        "blocks": sizes.blocks,
        "tokens": sum(entry.num_tokens for _, entry in store.iter_entries()),
        "bytes_raw": sizes.raw_bytes,
        "bytes_stored": sizes.stored_bytes,
        "bytes_file": sizes.file_bytes,
        "bytes_quota": sizes.quota_bytes,
        "ratio": sizes.raw_bytes / sizes.stored_bytes if sizes.stored_bytes else 1.0,
    }


def _verify_with_progress(store: ColdStore, *, repair: bool) -> VerifyReport:
    console = open_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        return store.verify(
            repair=repair, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )


def _print_report(report: VerifyReport, set_aside: str | None, *, repair: bool) -> None:
    console = open_console()
    if report.damaged:
        table = Table(title="damaged blocks")
        table.add_column("block", no_wrap=True)
        table.add_column("what is wrong", overflow="fold")
        for block_hash, reason in report.damaged.items():
            table.add_row(block_hash.hex(), reason)
        console.print(table)
    if report.problem:
        console.print(visible(report.problem))
    if set_aside:
        console.print(f"the data file was damaged: what could be saved was, the rest is {set_aside}")
    console.print(f"{report.blocks} blocks, {format_bytes(report.stored_bytes)} sound, {len(report.damaged)} damaged")
    if report.other_formats:
        console.print(
            f"{len(report.other_formats)} blocks were written by another version of tierkv, and stay as they are"
        )
    if repair and not report.is_sound:
        console.print(f"repaired: {report.removed} blocks removed, those that followed a damaged one among them")
