"""The command `tierkv`. Its options are in `*_commands`, its work is in the module of its name.

Standard output carries the result (a table, or one JSON object with `--json`), standard error everything
else. What the user can mend ends in one line and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import Annotated

import typer

from tierkv import __version__
from tierkv.errors import TierKVError
from tierkv.tools import daemon_commands, model_commands, store_commands, trace_commands

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

# What the library calls something, and how it is said here.
_OPTIONS = {
    "hot_bytes": "--hot",
    "warm_bytes": "--warm",
    "cold_bytes": "--cold",
    "cold_path": "--store",
    "min_free_bytes": "--min-free",
    "read_only": "--read-only",
    "block_size": "--block-size",
    "max_new_tokens": "--max-new-tokens",
    "top_p": "--top-p",
}

for _command in (
    model_commands.warm,
    model_commands.run,
    model_commands.report,
    store_commands.stats,
    store_commands.inspect,
    store_commands.save,
    store_commands.load,
    store_commands.evict,
    store_commands.quota,
    store_commands.compact,
    store_commands.verify,
    store_commands.top,
    trace_commands.replay,
    trace_commands.train_policy,
):
    app.command()(_command)

_daemon = typer.Typer(help="One warm cache for every process on the machine.", no_args_is_help=True)
app.add_typer(_daemon, name="daemon")
for _action in (daemon_commands.start, daemon_commands.status, daemon_commands.stop, daemon_commands.prefetch):
    _daemon.command()(_action)


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
        code = app(standalone_mode=False)  # a number where a command ended by one, as at Ctrl-C
        sys.stdout.flush()
    except TierKVError as exc:
        _fail(_as_options(str(exc)))
    except _UsageError as exc:
        _fail(exc.format_message())  # type: ignore[attr-defined]
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:
        _leave_output()
        sys.exit(141)
    except OSError as exc:  # of standard output; every other one is translated where it arises
        _leave_output()
        _fail(f"the output cannot be written: {exc.strerror or exc}")
    sys.exit(code if isinstance(code, int) else 0)


def _as_options(message: str) -> str:
    """Return a message of the library in the words of the command line."""
    return re.sub(r"(?<![\w./-])[a-z_]+(?![\w/])", lambda word: _OPTIONS.get(word[0], word[0]), message)


def _leave_output() -> None:
    """Let what standard output still holds go nowhere, instead of failing once more when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> None:
    line = "tierkv: " + " ".join(message.split())
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # a path need not be UTF-8
    sys.exit(2)
