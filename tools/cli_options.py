"""The options that several commands share, as Typer reads them, and the values that they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv.errors import ConfigError
from tierkv.tools import daemon as daemon_command
from tierkv.tools.options import EngineOptions, default_store, named_socket, parse_size
from tierkv.values.files import user_path


def as_path(text: str | Path) -> Path:
    """Return the path of an option or an argument, ~ expanded. What is no path is a usage error."""
    try:
        return user_path(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc


Model = Annotated[Optional[str], typer.Option(help="Directory or hub name; without it the embedded model.")]  # noqa: UP045
Store = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        parser=as_path,
        metavar="DIRECTORY",
        help="Directory of the cold store.",
        show_default="TIERKV_STORE, else ~/.cache/tierkv/store",
    ),
]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there")]  # noqa: UP045
Dtype = Annotated[Optional[str], typer.Option(help="bfloat16, float16, float32.", show_default="the model's")]  # noqa: UP045
BlockSize = Annotated[
    Optional[list[int]],  # noqa: UP045
    typer.Option(help="Tokens of a block; flash-attn takes multiples of 256.", metavar="<int>", show_default="256"),
]
Salt = Annotated[str, typer.Option(help="Keeps tenants apart: blocks of another salt are never used.")]
ColdSize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--cold",
        help="Quota of a new store in bytes, as 512M or 64G; tierkv quota changes that of another.",
        show_default="the store's own, 64G for a new one",
    ),
]
MinFree = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--min-free",
        help="So much of the store's volume stays free, as 512M or 0.",
        show_default="1G, or a 20th of a smaller volume",
    ),
]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="Use what is stored, store nothing.")]
WarmSize = Annotated[str, typer.Option("--warm", help="Bytes of the page-locked pool in CPU memory, as 512M or 8G.")]
HotSize = Annotated[
    Optional[str],  # noqa: UP045
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
    Optional[Path],  # noqa: UP045
    typer.Option(
        parser=as_path,
        metavar="PATH",
        help="Use the warm and cold tier of the daemon that listens here.",
        show_default="TIERKV_SOCKET, else no daemon",
    ),
]
DaemonSocket = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--socket",
        parser=as_path,
        metavar="PATH",
        help="Where the daemon listens.",
        show_default="TIERKV_SOCKET, else tierkv/daemon.sock in XDG_RUNTIME_DIR or ~/.cache",
    ),
]
StateFile = Annotated[Path, typer.Argument(parser=as_path, metavar="FILE", help="State file.")]
PromptFile = Annotated[
    Path,
    typer.Argument(
        parser=as_path,
        metavar="FILE",
        help="Prompts: text separated by lines of ---, or JSON (.json, .jsonl, .ndjson).",
    ),
]
TraceFile = Annotated[
    Path,
    typer.Argument(parser=as_path, metavar="FILE", help='Requests, one a line: {"timestamp": ms, "hash_ids": [...]}.'),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def engine_options(
    model: str | None,
    store: Path | None,
    device: str | None,
    dtype: str | None,
    block_size: list[int] | None,
    salt: str,
    cold: str | None,
    warm: str,
    hot: str | None,
    codec: str,
    socket: Path | None,
    *,
    min_free: str | None = None,
    read_only: bool = False,
) -> EngineOptions:
    """Return what a command with a model works with. Raises ConfigError for values that do not fit."""
    return EngineOptions(
        model=model,
        store=store or default_store(os.environ),
        device=device,
        dtype=dtype,
        block_size=one_block_size(block_size),
        salt=salt,
        cold_bytes=optional_size(cold),
        min_free_bytes=optional_size(min_free),
        read_only=read_only,
        warm_bytes=parse_size(warm),
        hot_bytes=parse_size(hot) if hot else None,
        codec=codec,
        socket=socket or (None if read_only else named_socket(os.environ)),
    )


def optional_size(text: str | None) -> int | None:
    """Return the bytes of a size, which may be 0, or None where none is given. Raises ConfigError."""
    return None if text is None else 0 if text.strip() == "0" else parse_size(text)


def one_block_size(block_size: list[int] | None) -> int:
    """Return the tokens of a block. Raises ConfigError where several sizes were named."""
    if block_size and len(set(block_size)) > 1:
        raise ConfigError(f"one command has one block size, got {' and '.join(map(str, block_size))}")
    return block_size[0] if block_size else 256


def chosen_daemon(store: Path | None, socket: Path | None) -> Path | None:
    """Return the socket of the daemon whose store is meant; None where none is named."""
    if store and socket:
        raise ConfigError("name a store or a daemon's socket, not both")
    return socket or (None if store else named_socket(os.environ))


def chosen_store(store: Path | None, socket: Path | None) -> Path:
    """Return the store that was named, directly or as that of a daemon."""
    daemon = chosen_daemon(store, socket)
    return daemon_command.store_of(daemon) if daemon else store or default_store(os.environ)
