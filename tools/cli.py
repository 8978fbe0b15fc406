"""The command `tierkv`: its commands, and how errors end one.

Standard output has the result (a table, or one JSON object with `--json`), standard error everything else. An error
that the user can fix ends in one line and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from tierkv import __version__
from tierkv.errors import ConfigError, TierKVError
from tierkv.tools.help_examples import add_examples
from tierkv.tools.terminal import OutputError, set_verbosity, standard_streams, visible

__all__ = ["COMMANDS", "app", "load_command", "main"]


class _Place(NamedTuple):
    """Where a command is: module and function, or module and a group of commands. summary: how its help begins.

    A module is imported when its command runs: most load torch, which takes seconds.
    """

    module: str
    name: str
    summary: str


COMMANDS: dict[str, _Place] = {
    "warm": _Place("warm", "warm", "Compute the K and V of prompts once and keep them on disk."),
    "run": _Place("run", "run", "Answer prompts, reusing whatever K and V are cached."),
    "serve": _Place("serve", "serve", "Serve a model by OpenAI's API, with a page at / that shows the cache."),
    "explain": _Place(
        "explain",
        "explain",
        "Show how far prompts are stored, the texts where they part, or which field of the namespace differs.",
    ),
    "report": _Place(
        "report", "report", "Run prompts under the profiler, and write a page, a trace for Perfetto, and plots."
    ),
    "stats": _Place("store_commands", "stats", "Print how much a store holds."),
    "inspect": _Place(
        "inspect_store", "inspect", "List what is stored: namespaces and how they differ, prompt prefixes, sizes, ages."
    ),
    "save": _Place(
        "state",
        "save",
        "Write a store's blocks into one file, atomically: of one namespace, or with --all of the whole store.",
    ),
    "load": _Place(
        "state", "load", "Put the sound blocks of a file of tierkv save into a store, which is made if need be."
    ),
    "evict": _Place(
        "evict",
        "evict",
        "Remove blocks from a store, a daemon's memory, and engines that use the daemon.",
    ),
    "quota": _Place(
        "store_commands", "quota", "Print how large a store may become, or change that for every process that uses it."
    ),
    "tenant": _Place("tenants", "group", "Name the tenants of a store; their shares and limits."),
    "move": _Place("move", "move", "Move a store to another directory or disk."),
    "compact": _Place(
        "store_commands",
        "compact",
        "Return a store's free space to the disk.",
    ),
    "verify": _Place(
        "store_commands",
        "verify",
        "Read every block of a store and print which are damaged; exit code 1 if a damaged block remains.",
    ),
    "top": _Place("top", "top", "Show a running cache live: tiers, hits, bandwidth, misses, largest prefixes."),
    "replay": _Place(
        "replay", "replay", "Compare eviction policies on a request trace, beside the best that is possible."
    ),
    "train-policy": _Place(
        "replay", "train_policy", "Fit the learned eviction policy to a request trace, and print its weights."
    ),
    "metrics": _Place("metrics_list", "metrics", "List every metric for Prometheus: name, type, labels, meaning."),
    "examples": _Place("example_files", "examples", "List, print or write the files that come with tierkv."),
    "remote": _Place("remote", "group", "Blocks shared between machines."),
    "daemon": _Place("daemon", "group", "One warm cache for every process on the machine."),
}


class _LateCommands(TyperGroup):
    """Lists the commands by their summaries, and loads the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the name of the called command, the command, and its arguments."""
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except _UsageError as exc:
            places = [group for group in _GROUPS if args and args[0] in load_command(group).commands]
            if not places:
                raise
            raise ConfigError(f"there is no command {args[0]}, but there is tierkv {places[0]} {args[0]}") from exc
        return name, load_command(name) if name in COMMANDS else command, rest


def load_command(name: str) -> Any:
    """Import a command or a group of commands; return it as Typer's own object."""
    place = COMMANDS[name]
    with _one_blas_thread() if name not in _COMPUTING else nullcontext():
        found = getattr(importlib.import_module(f"tierkv.tools.{place.module}"), place.name)
    if isinstance(found, typer.Typer):
        return add_examples(typer.main.get_command(found), name)
    alone = typer.Typer(**_SETTINGS)
    alone.command(name)(found)
    return add_examples(typer.main.get_command(alone), name)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Let numpy, if it is imported now, start no threads: they take a quarter of the time in which a command starts."""
    before = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    try:
        yield
    finally:  # another process that this one starts may compute
        if before is None:
            del os.environ[_BLAS_THREADS]


_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app: typer.Typer = typer.Typer(
    name="tierkv",
    help="A persistent, tiered cache of attention keys and values.",
    cls=_LateCommands,
    **_SETTINGS | {"add_completion": True},
)

# Some versions of Typer contain click, others import it: its root of usage errors is found through a subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_TRACEBACK = "TIERKV_TRACEBACK"
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_GROUPS = ("daemon", "tenant", "remote")
_COMPUTING = {"warm", "run", "serve", "report", "replay", "train-policy"}

# Names of the library's settings in its messages, and the options that set them.
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
    **{name: f"--{name.replace('_', '-')}" for name in ("max_prompt_tokens", "max_choices", "max_requests")},
    **{name: f"--{name.replace('_', '-')}" for name in ("max_connections", "max_running", "max_waiting")},
    "max_body_bytes": "--max-body",
    "max_seconds": "--max-seconds",
    "stop_s": "--stop-seconds",
}

for _name, _place in COMMANDS.items():
    app.command(_name, help=_place.summary)(lambda: None)


@app.callback(invoke_without_command=True)
def _start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log what happens; -vv in detail.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    set_verbosity(-1 if quiet else verbose)
    if version:
        print(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


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
    except RuntimeError as exc:
        if "home directory" not in str(exc):  # Typer asks Python for it to install completion
            return _unexpected(exc)
        return _fail("this user has no home directory (set HOME)")
    except OSError as exc:
        return _fail(f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc))
    except Exception as exc:  # noqa: BLE001 - a bug: one line, and the traceback on request
        return _unexpected(exc)
    return code if isinstance(code, int) else 0


def _unexpected(exc: Exception) -> int:
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(exc)
    return _fail(f"unexpected {type(exc).__name__}: {exc} ({_TRACEBACK}=1 shows where)")


def _as_options(message: str) -> str:
    """Return a message of the library with its settings' names replaced by the command line's options."""
    return re.sub(r"(?<![\w./-])[a-z_]+(?![\w/])", lambda word: _OPTIONS.get(word[0], word[0]), message)


def _fail(message: str) -> int:
    """Print in one line why a command failed; return its exit code."""
    with suppress(OutputError):
        sys.stdout.flush()
    print(visible("tierkv: " + " ".join(message.split())), file=sys.stderr)
    return 2
