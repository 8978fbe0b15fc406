"""`tierkv warm`: compute the K and V of prompts once and keep them on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tierkv.daemon.messages import Status, StatusReport
from tierkv.engine.model_support import context_of
from tierkv.engine.prompts import PromptRequest, prefix_tokens, read_prompts
from tierkv.engine.runner import Runner
from tierkv.errors import CapacityError, ConfigError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.tools.daemon_client import open_client
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.engines import open_engine
from tierkv.tools.evict import parse_age
from tierkv.tools.options import AsJson, Lines, PromptFile, spread
from tierkv.tools.stores import open_existing, require_place, store_of
from tierkv.tools.tenants import id_of_salt
from tierkv.tools.terminal import fact_table, open_console, print_json, visible
from tierkv.tools.warm_warnings import warn_of_date, warn_of_short
from tierkv.values.block import TOKEN_BYTES, BlockHash, as_token_array, hash_block, iter_chain
from tierkv.values.units import format_bytes

__all__ = ["warm"]

_MAX_NAMED = 5  # prompts that one line of error names
_NUM_WORDS = 6
_LARGEST_RATIO = 8  # no codec compresses a block so far: with less room than that, nothing can be stored


@dataclass(slots=True)
class _Summary:
    """What a run did; blocks and bytes are counted once, however many prompts share them.

    prompts, tokens: of those that are warmed now. too_large: numbers, from 1, of those that are left out.
    blocks_evicted: by the store meanwhile, to make room.
    """

    prompts: int = 0
    tokens: int = 0
    too_large: list[int] = field(default_factory=list)
    blocks_computed: int = 0
    blocks_reused: int = 0
    bytes_raw: int = 0
    bytes_stored: int = 0
    blocks_evicted: int = 0
    seconds: float = 0.0


@spread(without=["read_only"])
def warm(
    file: PromptFile,
    options: EngineOptions,
    lines: Lines = False,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict these prompts from the store.")] = False,
    pin_for: Annotated[
        str | None, typer.Option(help="Do not evict these prompts from the store for so long, as 90s, 12h or 7d.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute nothing, print what would be computed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute the K and V of prompts once and keep them on disk.

    A prompt that is too large for the hot pool or the model is left out; the error that names it comes at the end.
    """
    config = options.config()
    if pin and pin_for is not None:
        raise ConfigError("pin the prompts for good or for a time: --pin or --pin-for, not both")
    ttl_s = None if pin_for is None else parse_age(pin_for)
    pin = pin or ttl_s is not None
    requests = read_prompts(file, lines=lines)
    if config.socket:
        store_of(config.socket)  # a daemon without a store would keep nothing
    elif not dry_run:
        assert config.cold_path, "a command without a daemon has a store"
        require_place(config.cold_path, min_free_bytes=config.min_free_bytes)
    evicted_before = _evicted_by(config.socket) if config.socket else 0
    errors = open_console(stderr=True)
    with open_engine(options, config) as runner:
        started = time.perf_counter()
        if runner.cache.cold and not dry_run:
            runner.cache.cold.require_room(runner.cache.layout.block_bytes // _LARGEST_RATIO)
        all_prompts = [prefix_tokens(runner.loaded.tokenizer, request, day=options.day) for request in requests]
        warn_of_date(runner.loaded.tokenizer, options.day)
        warn_of_short([len(prompt) for prompt in all_prompts], options.block_size)
        too_large = [i for i, prompt in enumerate(all_prompts) if len(prompt) > _most_tokens(runner)]
        prompts = [prompt for prompt in all_prompts if 0 < len(prompt) <= _most_tokens(runner)]
        summary = _Summary(
            prompts=len(prompts), tokens=sum(map(len, prompts)), too_large=[number + 1 for number in too_large]
        )
        reused: set[BlockHash] = set()
        computed: set[BlockHash] = set()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=errors) as progress:
            for prompt in progress.track(prompts, description="would warm" if dry_run else "warming"):
                before = set(runner.cache.match(prompt).block_hashes) - computed
                if not dry_run:
                    runner.prefill(prompt)
                    runner.cache.flush()
                after = _would_be_blocks(runner, prompt) if dry_run else set(runner.cache.match(prompt).block_hashes)
                reused |= after & before
                computed |= after - before - reused
                if pin and not dry_run and runner.cache.cold:  # not in memory: the next prompt needs the room
                    runner.cache.cold.set_pinned(after, True, ttl_s=ttl_s)
        if pin and not dry_run and not runner.cache.cold:  # in the daemon's tiers, once no prompt needs room here
            for prompt in prompts:
                runner.cache.pin(prompt, ttl_s=ttl_s)
        summary.blocks_reused = len(reused)
        summary.blocks_computed = len(computed)
        missing = 0 if dry_run else _add_sizes(summary, runner, reused | computed)
        remedy = _remedy(runner) if missing else ""
        if runner.cache.cold:
            summary.blocks_evicted = runner.cache.cold.stats().evicted_blocks
        elif config.socket:
            summary.blocks_evicted = _evicted_by(config.socket) - evicted_before
        summary.seconds = time.perf_counter() - started
    if as_json:
        print_json({**asdict(summary), "seconds": round(summary.seconds, 6)})
    else:
        open_console().print(_table(summary, dry_run))
    if too_large:
        raise _refusal({i + 1: (requests[i], len(all_prompts[i])) for i in too_large}, len(requests), runner)
    if missing:
        raise StoreError(
            f"{missing} of {len(reused | computed)} blocks found no room in the store, or were evicted for later ones",
            hint=remedy,
        )


def _evicted_by(socket: Path) -> int:
    """Return how many blocks a daemon has evicted from its store since it started. Raises DaemonGoneError."""
    with open_client(socket) as client:
        return client.call(Status(), StatusReport).cold.get("evicted_blocks", 0)


def _most_tokens(runner: Runner) -> int:
    """Return how many tokens a prompt may have: what the hot pool and the model's context have room for."""
    pool = runner.cache.hot
    room = pool.num_blocks * pool.layout.block_size
    return min(room, context_of(runner.loaded.model) or room)


def _refusal(refused: dict[int, tuple[PromptRequest, int]], num_prompts: int, runner: Runner) -> CapacityError:
    """Return the error that names the prompts that were left out, by number, with a remedy as its hint."""
    names = [
        f"number {number} ({_first_words(request)}: {num_tokens:,} tokens)"
        for number, (request, num_tokens) in list(refused.items())[:_MAX_NAMED]
    ]
    names += [f"{len(refused) - _MAX_NAMED:,} more"] if len(refused) > _MAX_NAMED else []
    layout = runner.cache.layout
    context = context_of(runner.loaded.model) or 1 << 62
    sizes = [num_tokens for _, num_tokens in refused.values()]
    remedies = []
    if min(sizes) <= context:
        largest = max(size for size in sizes if size <= context)
        num_bytes = -(-largest // layout.block_size) * layout.block_bytes
        remedies.append(f"raise --hot to {-(-num_bytes // (1 << 20))}M or more")
    if max(sizes) > context:
        remedies.append(f"shorten what is over the model's context of {context:,} tokens")
    hint = "; ".join(remedies)
    return CapacityError(
        f"{len(refused):,} of {num_prompts:,} prompts are too large and were left out: {', '.join(names)}", hint=hint
    )


def _first_words(request: PromptRequest) -> str:
    texts = [request.system, *(str(message.get("content") or "") for message in request.messages)]
    words = " ".join(texts).split()
    text = visible(" ".join(words[:_NUM_WORDS])[:60])
    return f'"{text} ..."' if text else "no text"


def _would_be_blocks(runner: Runner, prompt: list[int]) -> set[BlockHash]:
    """Return the blocks that a prompt would be found in once it is warmed."""
    match = runner.cache.match(prompt)
    if match.num_cached_tokens == len(prompt):
        return set(match.block_hashes)
    token_bytes = as_token_array(prompt).tobytes()
    root, size = runner.cache.namespace.digest, runner.cache.config.block_size
    chain = [block_hash for block_hash, _ in iter_chain(root, token_bytes, size)]
    partial_block = token_bytes[len(chain) * size * TOKEN_BYTES :]
    return {*chain, *([hash_block(chain[-1] if chain else root, partial_block)] if partial_block else [])}


def _add_sizes(summary: _Summary, runner: Runner, block_hashes: set[BlockHash]) -> int:
    """Add the sizes of the blocks that are stored. Return how many are not."""
    with _store_of(runner) as store:
        stored = [entry for entry in store.lookup_many(block_hashes) if entry]
    summary.bytes_raw = sum(entry.raw_bytes for entry in stored)
    summary.bytes_stored = sum(entry.stored_bytes for entry in stored)
    return len(block_hashes) - len(stored)


def _remedy(runner: Runner) -> str:
    """Return what helps where blocks found no room in the store."""
    tenant = id_of_salt(runner.cache.namespace.salt)
    with _store_of(runner) as store:
        settings = store.tenants().get(tenant)
        used = sum(each.value_bytes for each in store.namespaces() if each.tenant == tenant)
    if settings and settings.cold_limit is not None and used + runner.cache.layout.block_bytes > settings.cold_limit:
        limit = format_bytes(settings.cold_limit)
        return f"tenant {settings.name} has a limit of {limit}: tierkv tenant set {settings.name} --cold-limit SIZE"
    return "free disk space, lower --min-free, or raise the quota: tierkv quota SIZE"


@contextmanager
def _store_of(runner: Runner) -> Iterator[ColdStore]:
    """Yield the store that has the blocks: this process's own, or the daemon's, opened for reading."""
    if runner.cache.cold is not None:
        yield runner.cache.cold
        return
    assert runner.cache.config.socket is not None, "the command opens a store, or has a daemon's"
    with open_existing(store_of(runner.cache.config.socket)) as store:
        yield store


def _table(summary: _Summary, dry_run: bool) -> Table:
    table = fact_table("would be warmed" if dry_run else "warmed")
    table.add_row("prompts", f"{summary.prompts:,}")
    table.add_row("tokens", f"{summary.tokens:,}")
    if summary.too_large:
        table.add_row("too large, left out", f"{len(summary.too_large):,}")
    table.add_row("blocks to compute" if dry_run else "blocks computed", f"{summary.blocks_computed:,}")
    table.add_row("blocks reused", f"{summary.blocks_reused:,}")
    if summary.blocks_evicted:
        table.add_row("blocks evicted to make room", f"{summary.blocks_evicted:,}")
    if not dry_run:
        table.add_row("bytes raw", format_bytes(summary.bytes_raw))
        table.add_row("bytes stored", format_bytes(summary.bytes_stored))
    table.add_row("seconds", f"{summary.seconds:.2f}")
    return table
