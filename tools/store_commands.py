"""Commands on a store, or on whoever has it open: stats, inspect, save, load, evict, compact, verify, top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv.tools import compact as compact_command
from tierkv.tools import evict as evict_command
from tierkv.tools import inspect_store as inspect_command
from tierkv.tools import quota as quota_command
from tierkv.tools import state as state_command
from tierkv.tools import stats as stats_command
from tierkv.tools import top as top_command
from tierkv.tools import verify as verify_command
from tierkv.tools.cli_options import (
    AsJson,
    BlockSize,
    ColdSize,
    DaemonSocket,
    Device,
    Dtype,
    MinFree,
    Model,
    Salt,
    Socket,
    StateFile,
    Store,
    as_path,
    chosen_daemon,
    chosen_store,
    engine_options,
    optional_size,
)
from tierkv.tools.evict_prompt import prompt_blocks
from tierkv.tools.options import default_socket, default_store


def stats(store: Store = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Say how much a store holds."""
    stats_command.stats(chosen_store(store, socket), as_json=as_json)


def inspect(
    namespace: Annotated[Optional[str], typer.Option(help="Only this namespace: leading hex digits.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="Show texts with this model's tokenizer.")] = None,  # noqa: UP045
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """List what is stored: namespaces and how they differ, prompt prefixes, sizes, ages."""
    inspect_command.inspect(chosen_store(store, socket), namespace=namespace, model=model, as_json=as_json)


def save(
    file: StateFile,
    namespace: Annotated[Optional[str], typer.Option(help="Leading hex digits, where there are several.")] = None,  # noqa: UP045
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Write a store's blocks of one namespace into one file."""
    state_command.save(file, chosen_store(store, socket), namespace=namespace, as_json=as_json)


def load(
    file: StateFile,
    store: Store = None,
    socket: Socket = None,
    cold: ColdSize = None,
    min_free: MinFree = None,
    as_json: AsJson = False,
) -> None:
    """Put the blocks of a state file into a store."""
    state_command.load(
        file,
        chosen_store(store, socket),
        cold_bytes=optional_size(cold),
        min_free_bytes=optional_size(min_free),
        as_json=as_json,
    )


def evict(
    to: Annotated[Optional[str], typer.Option(help="Until at most so much is live, as 512M or 0.")] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], typer.Option(help="Only this namespace: leading hex digits.")] = None,  # noqa: UP045
    older_than: Annotated[Optional[str], typer.Option(help="Only what was not used for 90s, 12h or 7d.")] = None,  # noqa: UP045
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only what begins with these prompts: a file as `tierkv warm` takes it, or a text."),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    salt: Salt = "",
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Remove blocks from a store, a daemon's memory, and engines that use the daemon; pinned ones stay, and so does
    the quota.

    Model, device, dtype, block size and salt say whose prompt --prompt is.
    """
    daemon = chosen_daemon(store, socket)
    path = None if daemon else store or default_store(os.environ)
    daemon = daemon or (evict_command.daemon_for(path) if path else None)
    prompts = None
    if prompt is not None:
        options = engine_options(model, store, device, dtype, block_size, salt, None, "256M", None, "auto", daemon)
        prompts = prompt_blocks(prompt, options)
    evict_command.evict(
        path, socket=daemon, to=to, namespace=namespace, older_than=older_than, prompts=prompts, as_json=as_json
    )


def quota(
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="The new quota, as 512M or 64G.", show_default="show it"),
    ] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Push out what is beyond the new quota.")] = False,
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Say how large a store may become, or change that for all who use it."""
    quota_command.quota(chosen_store(store, socket), size=size, evict=evict, as_json=as_json)


def compact(store: Store = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Give a store's free space back to the disk."""
    compact_command.compact(chosen_store(store, socket), daemon=chosen_daemon(store, socket), as_json=as_json)


def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged.")] = False,
    store: Store = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Read every block of a store and say which are damaged; exit code 1 if any is left."""
    if not verify_command.verify(chosen_store(store, socket), repair=repair, as_json=as_json):
        raise typer.Exit(1)


def top(
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where a process serves its metrics, as http://localhost:9400."),
    ] = None,
    socket: DaemonSocket = None,
    store: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=as_path, metavar="DIRECTORY", help="Look at a store on disk."),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    prefixes: Annotated[int, typer.Option(min=0, help="How many of the largest prefixes to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Watch a running cache: tiers, hits, bandwidth, misses, largest prefixes."""
    if url is None and socket is None and store is None:
        socket = default_socket(os.environ)
    source = top_command.Source(url=url, socket=socket, store=store)
    top_command.top(source, interval_s=interval, once=once, prefixes=prefixes, as_json=as_json)
