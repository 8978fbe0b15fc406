"""`tierkv verify`: read every block of a store, say which are damaged, and remove those if asked to."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from tierkv.errors import CorruptBlockError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_check import VerifyReport
from tierkv.tools.render import format_bytes, open_console, print_json, visible
from tierkv.tools.stores import open_existing

__all__ = ["verify"]


def verify(store_path: Path, *, repair: bool, as_json: bool) -> bool:
    """Print what is damaged; return whether nothing is, or nothing any more. Raises StoreError if there is no store.

    A data file that cannot be used at all is replaced by what can be saved of it when it is opened for a repair.
    """
    try:
        with open_existing(store_path, read_only=not repair) as store:
            report = _with_progress(store, repair=repair)
            set_aside = str(store.damaged) if store.damaged else None
    except CorruptBlockError as exc:
        if as_json:
            print_json({"sound": False, "problem": str(exc)})
        else:
            print(visible(str(exc)))
        return False
    summary = {
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
    if as_json:
        print_json(summary)
    else:
        _print(report, set_aside, repair=repair)
    return report.is_sound or repair


def _with_progress(store: ColdStore, *, repair: bool) -> VerifyReport:
    with Progress(console=open_console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=None)
        return store.verify(
            repair=repair, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )


def _print(report: VerifyReport, set_aside: str | None, *, repair: bool) -> None:
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
