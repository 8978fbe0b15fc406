"""The command `tierkv`: its commands, and how errors end one.

Standard output has the result (a table, or one JSON object with `--json`), standard error everything else. An error
that the user can fix ends in one line and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from tierkv import __version__
from tierkv.errors import TierKVError
from tierkv.tools import daemon, remote, store_commands
from tierkv.tools.evict import evict
from tierkv.tools.inspect_store import inspect
from tierkv.tools.replay import replay, train_policy
from tierkv.tools.report import report
from tierkv.tools.run import run
from tierkv.tools.state import load, save
from tierkv.tools.terminal import OutputError, standard_streams, visible
from tierkv.tools.top import top
from tierkv.tools.warm import warm

__all__ = ["app", "main"]

app: typer.Typer = typer.Typer(
    name="tierkv",
    help="A persistent, tiered cache of attention keys and values.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Some versions of Typer contain click, others import it: its root of usage errors is found through a subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_TRACEBACK = "TIERKV_TRACEBACK"

# Names of the library's settings in its messages, and the options that set them.
_OPTIONS = {
    "hot_bytes": "--hot",
    "warm_bytes": "--warm",
    "cold_bytes": "--cold",
    "cold_path": "--store",
    "min_free_bytes": "--min-free",
    "read_only": "--read-only",
    "remote": "--remote",
    "block_size": "--block-size",
    "max_new_tokens": "--max-new-tokens",
    "top_p": "--top-p",
}

for _command in (
    *(warm, run, report),
    *(store_commands.stats, inspect, save, load, evict),
    *(store_commands.quota, store_commands.compact, store_commands.verify, top),
    *(replay, train_policy),
):
    app.command()(_command)

_daemon = typer.Typer(help="One warm cache for every process on the machine.", no_args_is_help=True)
app.add_typer(_daemon, name="daemon")
for _action in (daemon.start, daemon.status, daemon.stop, daemon.prefetch):
    _daemon.command()(_action)

_remote = typer.Typer(help="Blocks shared between machines.", no_args_is_help=True)
app.add_typer(_remote, name="remote")
_remote.callback()(lambda: None)  # else Typer makes the only command the group itself
_remote.command()(remote.check)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; never returns."""
    with standard_streams():
        sys.exit(_run())


def _run() -> int:
    """Run one command and return the exit code. An error that the user can fix is one line on standard error."""
    try:
        code = app(standalone_mode=False)  # a number where a command ended by one, as at Ctrl-C
        sys.stdout.flush()
    except OutputError as exc:
        return 141 if exc.is_reader_gone else _fail(str(exc))
    except TierKVError as exc:
        return _fail(_as_options(str(exc)))
    except _UsageError as exc:
        message = exc.format_message()  # type: ignore[attr-defined]
        return _fail(message) if message.strip() else 2  # without a command, Typer has printed the help
    except typer.Abort:
        return 130
    except MemoryError:
        return _fail("there is not enough memory")
    except OSError as exc:
        return _fail(f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc))
    except Exception as exc:  # noqa: BLE001 - a bug: one line, and the traceback on request
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        return _fail(f"unexpected {type(exc).__name__}: {exc} ({_TRACEBACK}=1 shows where)")
    return code if isinstance(code, int) else 0


def _as_options(message: str) -> str:
    """Return a message of the library with its settings' names replaced by the command line's options."""
    return re.sub(r"(?<![\w./-])[a-z_]+(?![\w/])", lambda word: _OPTIONS.get(word[0], word[0]), message)


def _fail(message: str) -> int:
    """Print in one line why a command failed; return its exit code."""
    with suppress(OutputError):
        sys.stdout.flush()
    print(visible("tierkv: " + " ".join(message.split())), file=sys.stderr)
    return 2
