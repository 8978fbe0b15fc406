"""`tierkv serve`: an OpenAI-compatible server on this machine, whose cache survives restarts."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tierkv import __version__
from tierkv.daemon.service_manager import ServiceManager
from tierkv.engine.engine import Engine
from tierkv.engine.model_support import context_of
from tierkv.engine.models import EMBEDDED
from tierkv.engine.prompts import prefix_tokens, read_prompts
from tierkv.engine.runner import Runner
from tierkv.errors import ConfigError
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.engines import open_engine
from tierkv.tools.logs import FormatOption, LogFormat, configure_logs
from tierkv.tools.options import Lines, as_path, parse_size, spread
from tierkv.tools.terminal import visible
from tierkv.tools.warm_warnings import warn_of_date
from tierkv.values.log_event import LogEvent

if TYPE_CHECKING:
    from tierkv.serving.limits import ServeLimits

__all__ = ["Limits", "Place", "serve"]

_API_KEY = "TIERKV_API_KEY"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the server listens, under which name, and for which clients."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000
    served_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="MODEL as it is given")
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that requests must carry.", show_default=f"{_API_KEY}, else none"),
    ] = None
    warm_file: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="FILE", help="Prompts to compute before the first request, as for warm."),
    ] = None
    lines: Lines = False
    log_format: FormatOption = LogFormat.TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask for, and for how long."""

    max_body: Annotated[
        str | None,
        typer.Option(help="Bytes of a request, as 4M.", show_default="1M and 16 for each token of the longest prompt"),
    ] = None
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt.", show_default="what the model and the hot pool hold")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 4096
    max_choices: Annotated[int, typer.Option(min=1, help="Answers of one request: its prompts times n.")] = 32
    max_logprob_memory: Annotated[
        str, typer.Option(help="Memory for the log-probabilities of answers in work; more get 429.")
    ] = "1G"
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at the same time; more get 429.")] = 512
    max_connections: Annotated[int, typer.Option(min=1, help="Open connections; more are closed.")] = 1024
    max_running: Annotated[int, typer.Option(min=1, help="Answers that are computed together.")] = 256
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that wait for their turn; more get 429.")] = 1024
    max_seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for one request; its answer then ends.")] = 600.0
    stop_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds from SIGTERM to the end of the process.")] = 5.0


@spread(without=["model"])
def serve(
    place: Place,
    limits: Limits,
    options: EngineOptions,
    model_name: Annotated[
        str | None, typer.Argument(help="Directory or hub name; without it the embedded model.", metavar="[MODEL]")
    ] = None,
) -> None:
    """Serve a model by OpenAI's API, with a page at / that shows the cache.

    Paths: /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. Prompts and answers are found
    again after a restart: only what is new is computed.
    """
    serving = _import_serving()
    options = replace(options, model=model_name)
    config = options.config()
    prompts = read_prompts(place.warm_file, lines=place.lines) if place.warm_file else []
    chosen = _limits_of(limits, serving.ServeLimits)
    key = place.api_key if place.api_key is not None else os.environ.get(_API_KEY) or None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise ConfigError("an API key is a word of printable ASCII characters")
    configure_logs(place.log_format, logging.StreamHandler(sys.stderr))
    with _bound(place, serving) as bound, open_engine(options, config) as runner:
        warn_of_date(runner.loaded.tokenizer, options.day)
        _warm(runner, options, prompts)
        with Engine(runner, max_running=chosen.max_running, max_waiting=chosen.max_waiting) as engine:
            name = place.served_name or model_name or EMBEDDED
            asyncio.run(_serve(serving, runner, engine, name, chosen, options, key, bound))
    _LOG.info(LogEvent("stopped"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is closed: what the interpreter does at its end would only take time, and there is a limit


async def _serve(
    serving: Any,
    runner: Runner,
    engine: Engine,
    name: str,
    limits: ServeLimits,
    options: EngineOptions,
    key: str | None,
    bound: socket.socket,
) -> None:
    service = serving.Service(runner, engine, name=name, limits=limits, day=options.day)
    try:
        host, port = bound.getsockname()[:2]
        is_open_to_all = key is None and not _is_loopback(host)
        app = serving.make_app(service, api_key=key, needs_local_host=key is None and not is_open_to_all)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if is_open_to_all:
            _LOG.warning("every client that reaches this machine may ask: there is no --api-key")
        bound.listen(limits.max_connections)  # a client of the address that is printed next may come at once
        print(f"tierkv serves {visible(name)} at {address}", flush=True)
        _LOG.info(LogEvent("serving", version=__version__, pid=os.getpid(), model=name, address=address))
        manager = ServiceManager.of_environment(os.environ)
        manager.ready(f"serving {visible(name)} at {address}")
        await serving.serve(app, service, bound)
        manager.stopping()
        _LOG.info(LogEvent("stopping", uptime_s=round(time.monotonic() - service.started, 3)))
    finally:
        service.close()


def _import_serving() -> Any:
    """Return the names of the serving room. Raises ConfigError where its extra is not installed."""
    try:
        import tierkv.serving.command as serving
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] == "tierkv":
            raise
        raise ConfigError(f"serving needs {exc.name}", hint="pip install 'tierkv[serve]'") from exc
    return serving


def _limits_of(limits: Limits, kind: type[ServeLimits]) -> ServeLimits:
    given = {each.name: getattr(limits, each.name) for each in fields(limits)}
    body, stop_s = given.pop("max_body"), given.pop("stop_seconds")
    logprob_bytes = parse_size(given.pop("max_logprob_memory"))
    return kind(
        max_body_bytes=parse_size(body) if body else None, max_logprob_bytes=logprob_bytes, stop_s=stop_s, **given
    )


@contextmanager
def _bound(place: Place, serving: Any) -> Iterator[socket.socket]:
    """Yield a socket that is bound to the address, before a model is loaded. Raises ConfigError."""
    try:
        bound = serving.bind(place.host, place.port)
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"cannot listen at {place.host}:{place.port}: {reason}") from exc
    with bound:
        yield bound


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _warm(runner: Runner, options: EngineOptions, requests: list[Any]) -> None:
    """Compute what is not cached of the prompts of the warm file."""
    if not requests:
        return
    pool = runner.cache.hot
    room = pool.num_blocks * pool.layout.block_size
    room = min(room, context_of(runner.loaded.model) or room)
    tokens = computed = too_large = 0
    for request in requests:
        prompt = prefix_tokens(runner.loaded.tokenizer, request, day=options.day)
        if not prompt or len(prompt) > room:
            too_large += 1
            continue
        tokens += len(prompt)
        computed += runner.prefill(prompt)
    left_out = f"; {too_large} were too large, and were left out" if too_large else ""
    warmed = f"{len(requests) - too_large:,}"
    _LOG.info("warmed %s prompts of %s tokens, %s computed%s", warmed, f"{tokens:,}", f"{computed:,}", left_out)
