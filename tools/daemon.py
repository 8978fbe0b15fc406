"""`tierkv daemon start | status | stop | prefetch | unit`: one warm cache for every process on the machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket as socket_module
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.host import NOT_WRITTEN, check_folder, peer_of, read_lock_file
from tierkv.daemon.log_file import open_log
from tierkv.daemon.messages import Count, Done, Hello, Prefetch, Status, StatusReport, Stop
from tierkv.daemon.service_manager import ServiceManager
from tierkv.engine.prompts import prefix_tokens, read_prompts
from tierkv.errors import ConfigError, DaemonError, DaemonGoneError
from tierkv.tools.daemon_client import open_client
from tierkv.tools.daemon_status import print_status
from tierkv.tools.engine_options import ModelOptions
from tierkv.tools.logs import FormatOption, LogFormat
from tierkv.tools.options import (
    AsJson,
    ColdSize,
    DaemonSocket,
    Lines,
    MinFree,
    PromptFile,
    Remote,
    Store,
    as_path,
    default_socket,
    default_store,
    named_remotes,
    parse_optional_size,
    spread,
)
from tierkv.tools.service import size_of_slab, unit
from tierkv.tools.stores import find_store_of, require_place
from tierkv.tools.terminal import print_json, visible
from tierkv.values.block import as_token_array, iter_chain
from tierkv.values.users import group_id, user_name

__all__ = ["group"]

_START_S = 120.0  # the daemon touches every page of its slab first
_STOP_S = 60.0
_POLL_S = 0.05
_ANSWER_S = 5.0
_MAX_LOG_BYTES = 64 << 10  # that are read for the reason why a daemon did not start


@spread(without=["device"])
def start(
    model: ModelOptions,
    detach: Annotated[bool, typer.Option("--detach", help="Return once a process of its own serves.")] = False,
    warm: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the shared memory, as 8G, or a share of the memory that is left, as 50%.",
            show_default="1G, or half of what is left if that is less",
        ),
    ] = None,
    cold: ColdSize = None,
    min_free: MinFree = None,
    store: Store = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep nothing on disk.")] = False,
    socket: DaemonSocket = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port of 127.0.0.1.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Let this group connect and read: its name or number. Its members write nothing."),
    ] = None,
    remote: Remote = None,
    warm_file: Annotated[
        Path | None,
        typer.Option(
            parser=as_path, metavar="FILE", help="Prompts whose blocks are read from the store into the warm tier."
        ),
    ] = None,
    log_format: FormatOption = LogFormat.TEXT,
) -> None:
    """Start a daemon. Model, dtype, block size and salt identify the blocks of the prompts in --warm-file."""
    path = socket or default_socket(os.environ)
    config = DaemonConfig(
        socket=path.absolute(),
        store=None if no_store else (store or default_store(os.environ)).absolute(),
        warm_bytes=size_of_slab(warm),
        cold_bytes=parse_optional_size(cold),
        min_free_bytes=parse_optional_size(min_free),
        metrics_port=metrics_port,
        group=None if group is None else group_id(group),
        remote=named_remotes(remote, os.environ),
    )
    try:
        config.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise DaemonError(
            f"no socket can be made at {config.socket}: {exc.filename}: {exc.strerror}",
            hint="name another place with --socket or TIERKV_SOCKET",
        ) from exc
    if config.store:
        require_place(config.store, min_free_bytes=config.min_free_bytes)
    warm_command = _warm_command(warm_file, config.socket, model) if warm_file else []
    if detach:
        _start_detached(config, warm_command, log_format)
    else:
        from tierkv.tools.daemon_process import serve_and_warm  # the server, which the other commands do without

        # A service reloads at SIGHUP; in a terminal, which sends it when it closes, the signal ends the daemon.
        serve_and_warm(
            config,
            warm_command,
            log_to=logging.StreamHandler(sys.stderr),
            log_format=log_format,
            reload=None if sys.stderr.isatty() else (lambda: None),
            manager=ServiceManager.of_environment(os.environ),
        )


def status(socket: DaemonSocket = None, as_json: AsJson = False) -> None:
    """Print what the daemon holds, and for which models and clients."""
    with open_client(socket or default_socket(os.environ)) as client:
        report = client.call(Status(), StatusReport)
    if as_json:
        print_json(msgspec.to_builtins({name: getattr(report, name) for name in report.__struct_fields__}))
        return
    print_status(report)


def stop(socket: DaemonSocket = None) -> None:
    """End the daemon, which first stores the blocks that it has yet to store; print how many it could not.

    A daemon that does not answer gets SIGTERM.
    """
    path = socket or default_socket(os.environ)
    pid = _listener_of(path)
    try:
        with open_client(path, timeout_s=_ANSWER_S) as client:
            client.call(Stop(), Done)
    except DaemonGoneError as exc:
        if not _is_running(pid):
            raise
        print(f"tierkv: {exc}; sending SIGTERM to process {pid}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        if not _is_running(pid) or not path.exists():
            print(f"tierkv daemon {pid} has ended{_what_was_lost(path, pid)}")
            return
        time.sleep(_POLL_S)
    raise DaemonError(
        f"the daemon, process {pid}, has not ended after {_STOP_S:.0f} s",
        hint=f"kill -KILL {pid} ends it; what it has not written is computed again",
    )


@spread()
def prefetch(
    file: PromptFile,
    model: ModelOptions,
    lines: Lines = False,
    socket: DaemonSocket = None,
    as_json: AsJson = False,
) -> None:
    """Have the daemon read the blocks of prompts from its store into the warm tier.

    The model is loaded for its tokenizer and its identity; it computes nothing.
    """
    path = socket or default_socket(os.environ)
    requests = read_prompts(file, lines=lines)
    from tierkv.tools.engines import identify  # loads torch

    loaded, namespace = identify(model, find_store_of(path))
    hello = Hello(
        namespace=namespace.digest,
        description=namespace.describe(),
        block_bytes=namespace.layout.block_bytes,
        client=f"prefetch, process {os.getpid()}",
    )
    blocks = 0
    with open_client(path, hello) as client:
        for request in requests:
            tokens = as_token_array(prefix_tokens(loaded.tokenizer, request, day=model.day)).tobytes()
            chain = iter_chain(namespace.digest, tokens, model.block_size)
            message = Prefetch(hashes=b"".join(block_hash for block_hash, _ in chain), tokens=tokens)
            blocks += client.call(message, Count).count
    if as_json:
        print_json({"prompts": len(requests), "blocks": blocks})
    else:
        print(f"announced {len(requests)} prompts, {blocks} whole blocks")


def _warm_command(file: Path, socket: Path, model: ModelOptions) -> list[str]:
    """Return the command that announces the prompts of a file to the daemon, once that serves."""
    if file.exists() and not file.is_file():  # the command reads it again
        raise ConfigError(f"{file} is not a regular file", hint="write the prompts into one")
    read_prompts(file)
    command = [sys.executable, "-m", "tierkv", "daemon", "prefetch", str(file.absolute())]
    command += ["--socket", str(socket), "--device", "cpu", "--salt", model.salt]
    command += ["--block-size", str(model.block_size), "--date", model.date]
    command += ["--model", model.model] if model.model else []
    command += ["--dtype", model.dtype] if model.dtype else []
    return command


def _start_detached(config: DaemonConfig, warm_command: list[str], log_format: LogFormat) -> None:
    """Start a process that serves; return when it does. Raises DaemonError with the reason if it does not."""
    from tierkv.tools.daemon_process import environment_of, log_of, to_json

    log = log_of(config.socket)
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(log.parent)
    command = [sys.executable, "-m", "tierkv.tools.daemon_process", to_json(config, warm_command, log_format)]
    output = open_log(log)
    try:
        begin = os.fstat(output).st_size
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment_of(config),
        )
        pid = _wait_until_it_serves(process, config.socket, log, lambda: os.pread(output, _MAX_LOG_BYTES, begin))
    finally:
        os.close(output)
    process.returncode = 0  # it outlives this process: without this Python warns of a child left behind
    print(f"tierkv daemon {pid} serves on {config.socket}; its log is {log}")


def _wait_until_it_serves(
    process: subprocess.Popen[bytes], socket: Path, log: Path, read_log: Callable[[], bytes]
) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = read_log().decode(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("tierkv: ") if lines else f"it ended with code {process.returncode}"
            raise DaemonError(why)
        try:
            with open_client(socket) as client:
                if client.welcome.pid == process.pid:
                    return process.pid
        except DaemonGoneError:
            pass
        time.sleep(_POLL_S)
    raise DaemonError(f"the daemon does not answer after {_START_S:.0f} s; its log is {log}")


def _listener_of(path: Path) -> int:
    """Return the process that listens on a socket, also of one that does not answer. Raises DaemonGoneError."""
    with socket_module.socket(socket_module.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(os.fspath(path))
        except (OSError, ValueError) as exc:
            raise DaemonGoneError(
                f"no daemon answers at {path}: {getattr(exc, 'strerror', None) or exc}",
                hint="tierkv daemon start --detach starts one",
            ) from exc
        pid, uid = peer_of(connection)
    if uid != os.geteuid():
        raise DaemonError(f"the daemon at {path} belongs to user {user_name(uid)}: only that user stops it")
    return pid


def _is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _what_was_lost(socket: Path, pid: int) -> str:
    """Return how many blocks an ended daemon has not written, by its lock file; empty where there are none."""
    _, lines = read_lock_file(socket.with_name(socket.name + ".lock"))
    lost = lines[1].removeprefix(NOT_WRITTEN).strip() if len(lines) > 1 and lines[0] == str(pid) else "0"
    return "" if lost == "0" else f"; {visible(lost)} blocks were not written to the store, its log says why"


group: typer.Typer = typer.Typer(help="One warm cache for every process on the machine.", add_completion=False)


@group.callback(invoke_without_command=True)
def _print_help(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for _action in (start, status, stop, prefetch, unit):
    group.command()(_action)
