"""The input of the commands: options as Typer reads them, sizes, and places that the environment names."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tierkv.engine.prompts import TEMPLATE_DAY
from tierkv.errors import ConfigError
from tierkv.remote_tiers.urls import RemoteUrl, remote_urls
from tierkv.values.files import home_directory, user_path
from tierkv.values.units import format_bytes

__all__ = [
    "DEFAULT_DAY",
    "STANDARD_INPUT",
    "AsJson",
    "Attention",
    "BlockSize",
    "BlockTokens",
    "CodecName",
    "ColdSize",
    "DaemonSocket",
    "Device",
    "Dtype",
    "HotSize",
    "Lines",
    "MinFree",
    "Mla",
    "Model",
    "NoDaemon",
    "PromptFile",
    "ReadOnly",
    "Remote",
    "Salt",
    "Socket",
    "SparseShare",
    "StatePath",
    "Store",
    "TemplateDay",
    "TraceFile",
    "WarmSize",
    "as_path",
    "as_prompt_path",
    "cache_directory",
    "default_socket",
    "default_store",
    "named_attention",
    "named_remotes",
    "named_socket",
    "parse_day",
    "parse_optional_size",
    "parse_size",
    "spread",
]

DEFAULT_DAY = TEMPLATE_DAY.isoformat()

_MAX_BYTES = 1 << 62
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def as_path(text: str | Path) -> Path:
    """Return the path of an option or an argument, ~ expanded. A text that is no path is a usage error."""
    try:
        return user_path(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc


STANDARD_INPUT = Path("/dev/stdin")
"""What the name - stands for, where a command takes a file of prompts."""


def as_prompt_path(text: str | Path) -> Path:
    """Return the path of a file of prompts, as `as_path`; - is standard input."""
    return STANDARD_INPUT if str(text) == "-" else as_path(text)


Model = Annotated[str | None, typer.Option(help="Directory or hub name; without it the embedded model.")]
Store = Annotated[
    Path | None,
    typer.Option(
        parser=as_path,
        metavar="DIRECTORY",
        help="Directory of the cold store.",
        show_default="TIERKV_STORE, else ~/.cache/tierkv/store",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there is a GPU")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention backend: torch, flash-attn, flashinfer-fa2, flashinfer-fa3, or auto for the fastest known.",
        show_default="TIERKV_ATTENTION, else auto",
    ),
]
SparseShare = Annotated[
    float | None,
    typer.Option(
        "--sparse-decode",
        help="Read only this share of a long sequence for each new token, such as 0.1: approximate, and not cached.",
        show_default="exact",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32.", show_default="the model's")]
Mla = Annotated[
    str,
    typer.Option(
        help="auto, latent or expanded: what blocks hold of models with multi-latent attention (DeepSeek-V2, V3)."
    ),
]
BlockSize = Annotated[
    list[int] | None,
    typer.Option(
        "--block-size",
        help="Tokens of a block; flash-attn takes multiples of 256.",
        metavar="<int>",
        show_default="256",
    ),
]
Salt = Annotated[str, typer.Option(help="Keeps tenants apart: blocks of another salt are never used.")]
TemplateDay = Annotated[
    str,
    typer.Option(
        "--date",
        metavar="YYYY-MM-DD",
        help="What chat templates write as today's date; today is the real one, and changes those prompts daily.",
    ),
]
ColdSize = Annotated[
    str | None,
    typer.Option(
        "--cold",
        help="Quota of a new store in bytes, as 512M or 64G; tierkv quota changes that of an existing one.",
        show_default="the store's own, 64G for a new one",
    ),
]
MinFree = Annotated[
    str | None,
    typer.Option(
        "--min-free",
        help="Bytes of the store's volume that stay free, as 512M or 0.",
        show_default="1G, or a 20th of a smaller volume",
    ),
]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="Use what is stored, store nothing.")]
WarmSize = Annotated[str, typer.Option("--warm", help="Bytes of the page-locked pool in CPU memory, as 512M or 8G.")]
HotSize = Annotated[
    str | None,
    typer.Option(
        "--hot",
        help="Bytes of the paged pool beside the model, as 512M or 8G.",
        show_default="half the free GPU memory, or 1G on a CPU",
    ),
]
CodecName = Annotated[
    str,
    typer.Option("--codec", help="auto is lossless; lossy-int8 halves the bytes and changes them."),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        parser=as_path,
        metavar="PATH",
        help="Use the warm and cold tier of the daemon that listens here.",
        show_default="TIERKV_SOCKET, else your daemon if one answers at the default place",
    ),
]
Remote = Annotated[
    list[str] | None,
    typer.Option(
        "--remote",
        metavar="URL",
        help="Share blocks with other machines, as redis://host; may be repeated. ${NAME} stands for a password.",
        show_default="TIERKV_REMOTE, else none",
    ),
]
NoDaemon = Annotated[bool, typer.Option("--no-daemon", help="Use no daemon, not even one that answers.")]
DaemonSocket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        parser=as_path,
        metavar="PATH",
        help="Where the daemon listens.",
        show_default="TIERKV_SOCKET, else tierkv/daemon.sock in XDG_RUNTIME_DIR or ~/.cache",
    ),
]
StatePath = Annotated[Path, typer.Argument(parser=as_path, metavar="FILE", help="State file.")]
PromptFile = Annotated[
    Path,
    typer.Argument(
        parser=as_prompt_path,
        metavar="FILE",
        help="Prompts: text separated by lines of ---, or JSON (.json, .jsonl, .ndjson). - is standard input.",
    ),
]
Lines = Annotated[bool, typer.Option("--lines", help="One prompt per line.")]
TraceFile = Annotated[
    Path,
    typer.Argument(
        parser=as_path, metavar="FILE", help='Requests, one per line: {"timestamp": ms, "hash_ids": [...]}.'
    ),
]
BlockTokens = Annotated[int, typer.Option(help="Tokens of a block of the trace.", min=2, max=1 << 20)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def spread(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show Typer each field of a command's dataclass parameters as an option of its own.

    The command gets the dataclasses, made of the options. without: fields that keep their defaults and are no options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        del hints["return"]
        bundles: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, kind in bundles.items():
                given[name] = kind(**{each.name: given.pop(each.name) for each in fields(kind) if each.name in given})
            command(**given)

        parameters = list(_spread_parameters(command, hints, without))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _spread_parameters(
    command: Callable[..., None], hints: Mapping[str, Any], without: Collection[str]
) -> Iterator[inspect.Parameter]:
    for name, kind in hints.items():
        if not is_dataclass(kind):
            default = inspect.signature(command).parameters[name].default
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            continue
        field_hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            if field.name not in without:
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                annotation = field_hints[field.name]
                yield inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
                )


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 512M, 8G, 1.5GiB or 4096. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match and Decimal(match[1]) >= _MAX_BYTES // _UNITS[match[2]]:
        raise ConfigError(f"{text[:40]!r} is too large a size: the largest is {format_bytes(_MAX_BYTES)}")
    size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ConfigError(f"{text[:40]!r} is not a size: say 512M, 8G or 4096")
    return size


def parse_optional_size(text: str | None) -> int | None:
    """Return the bytes of a size, which may be 0; None where none is given. Raises ConfigError."""
    if text is None:
        return None
    return 0 if text.strip() == "0" else parse_size(text)


def parse_day(text: str) -> date | None:
    """Return the day of --date; None for the real one. Raises ConfigError."""
    if text == "today":
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(f"{text[:40]!r} is not a date such as {TEMPLATE_DAY.isoformat()}, and not today") from exc


def named_socket(environment: Mapping[str, str]) -> Path | None:
    """Return the daemon's socket that TIERKV_SOCKET names, if any."""
    return _named(environment, "TIERKV_SOCKET")


def named_attention(given: str | None, environment: Mapping[str, str]) -> str:
    """Return the attention backend that an option names, or else TIERKV_ATTENTION, or else "auto"."""
    return given or environment.get("TIERKV_ATTENTION") or "auto"


def named_remotes(given: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[RemoteUrl, ...]:
    """Return the remote tiers that options name, or else TIERKV_REMOTE. Raises ConfigError, without the URL."""
    return remote_urls(given if given is not None else environment.get("TIERKV_REMOTE"))


def default_socket(environment: Mapping[str, str]) -> Path:
    """Return where a daemon listens by default: TIERKV_SOCKET, or in the user's runtime directory."""
    if socket := named_socket(environment):
        return socket
    runtime = _named(environment, "XDG_RUNTIME_DIR", must_be_absolute=True)
    if runtime:
        return runtime / "tierkv/daemon.sock"
    hint = "set HOME or XDG_CACHE_HOME, or name the socket with --socket or TIERKV_SOCKET"
    return _in_cache_directory(environment, "daemon.sock", hint=hint)


def default_store(environment: Mapping[str, str]) -> Path:
    """Return where the cold store lies by default: TIERKV_STORE, or under the user's cache directory."""
    hint = "set HOME or XDG_CACHE_HOME, or name the store with --store or TIERKV_STORE"
    return _named(environment, "TIERKV_STORE") or _in_cache_directory(environment, "store", hint=hint)


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Return the user's cache directory for tierkv, by the XDG convention. Raises ConfigError without a home."""
    return _in_cache_directory(environment, "", hint="set HOME or XDG_CACHE_HOME")


def _in_cache_directory(environment: Mapping[str, str], name: str, *, hint: str) -> Path:
    """Return a path in the user's cache directory. hint: what helps a user without a home."""
    root = _named(environment, "XDG_CACHE_HOME", must_be_absolute=True)
    if root is None:
        home = home_directory(environment)
        if home is None:
            raise ConfigError("this user has no home directory", hint=hint)
        root = home / ".cache"
    return root / "tierkv" / name


def _named(environment: Mapping[str, str], name: str, *, must_be_absolute: bool = False) -> Path | None:
    """Return the path in an environment variable; None where it is unset or empty.

    must_be_absolute: ignore a relative path, as the XDG convention says.
    """
    text = environment.get(name)
    if not text:
        return None
    try:
        path = user_path(text, environment)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    return path if path.is_absolute() or not must_be_absolute else None
