"""Commands on the daemon: start, status, stop, prefetch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv.daemon.config import DaemonConfig
from tierkv.engine.prompts import read_prompts
from tierkv.errors import ConfigError
from tierkv.tools import daemon as daemon_command
from tierkv.tools import prefetch as prefetch_command
from tierkv.tools.cli_options import (
    AsJson,
    BlockSize,
    ColdSize,
    DaemonSocket,
    Device,
    Dtype,
    MinFree,
    Model,
    PromptFile,
    Salt,
    Store,
    WarmSize,
    as_path,
    engine_options,
    one_block_size,
    optional_size,
)
from tierkv.tools.options import default_socket, default_store, parse_size
from tierkv.tools.stores import require_place


def start(
    detach: Annotated[bool, typer.Option("--detach", help="Return when it serves, as a process of its own.")] = False,
    warm_size: WarmSize = "1G",
    cold: ColdSize = None,
    min_free: MinFree = None,
    store: Store = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep nothing on disk.")] = False,
    socket: DaemonSocket = None,
    metrics_port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port of 127.0.0.1."),
    ] = None,
    warm_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=as_path, metavar="FILE", help="Prompts whose blocks come up from the store."),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
) -> None:
    """Start a daemon. Model, dtype, block size and salt say whose prompts --warm-file has."""
    path = socket or default_socket(os.environ)
    config = DaemonConfig(
        socket=path.absolute(),
        store=None if no_store else (store or default_store(os.environ)).absolute(),
        warm_bytes=parse_size(warm_size),
        cold_bytes=optional_size(cold),
        min_free_bytes=optional_size(min_free),
        metrics_port=metrics_port,
    )
    if config.store:
        require_place(config.store, min_free_bytes=config.min_free_bytes)
    command: list[str] = []
    if warm_file:
        if warm_file.exists() and not warm_file.is_file():  # another process reads it again, once the daemon serves
            raise ConfigError(f"{warm_file} is not a regular file", hint="write the prompts into one")
        read_prompts(warm_file)
        command = [sys.executable, "-m", "tierkv", "daemon", "prefetch"]
        command += [str(warm_file.absolute()), "--socket", str(config.socket), "--device", "cpu", "--salt", salt]
        command += ["--block-size", str(one_block_size(block_size))]
        command += ["--model", model] if model else []
        command += ["--dtype", dtype] if dtype else []
    daemon_command.start(config, detach=detach, warm_command=command)


def status(socket: DaemonSocket = None, as_json: AsJson = False) -> None:
    """Say what the daemon holds and for whom."""
    daemon_command.status(socket or default_socket(os.environ), as_json=as_json)


def stop(socket: DaemonSocket = None) -> None:
    """End the daemon; what it has yet to store is stored first."""
    daemon_command.stop(socket or default_socket(os.environ))


def prefetch(
    file: PromptFile,
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line.")] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    socket: DaemonSocket = None,
    as_json: AsJson = False,
) -> None:
    """Have the blocks of prompts brought from the store into the warm tier."""
    path = socket or default_socket(os.environ)
    options = engine_options(model, None, device, dtype, block_size, salt, None, "256M", None, "auto", path)
    prefetch_command.prefetch(read_prompts(file, lines=lines), options, as_json=as_json)
