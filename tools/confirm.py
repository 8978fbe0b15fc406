"""What asks before a command removes something."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tierkv.tools.terminal import note, visible

__all__ = ["DryRun", "Yes", "confirm", "must_ask"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Remove nothing, print what would be removed.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


def must_ask(*, yes: bool) -> bool:
    """Return whether to ask: at a terminal, without --yes. A script that has no terminal is not asked."""
    return not yes and sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str) -> None:
    """Ask on standard error. Raises typer.Exit with code 1 unless the answer is y or yes."""
    print(visible(f"tierkv: {question} [y/N] "), end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("nothing was removed")
        raise typer.Exit(1)
