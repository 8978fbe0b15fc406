"""`tierkv evict`: remove blocks by size, namespace, prompt or age, from a store and from the memory above it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tierkv.daemon.eviction_log import LOG_NAME, EvictionLog
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks, Eviction
from tierkv.daemon.host import STORE_LOCK, read_lock_file
from tierkv.daemon.messages import Status, StatusReport
from tierkv.engine.prompts import PromptRequest, prefix_tokens, read_prompts
from tierkv.errors import ConfigError, DaemonError, DaemonGoneError, StoreError
from tierkv.storage.codecs import CODECS
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_eviction import EvictionReport, StoredPrompt
from tierkv.storage.cold_tenants import TenantSettings
from tierkv.tools.confirm import DryRun, Yes, confirm, must_ask
from tierkv.tools.daemon_client import open_client
from tierkv.tools.engine_options import ModelOptions
from tierkv.tools.options import AsJson, parse_optional_size, spread
from tierkv.tools.stores import StoreOptions, find_digest, find_store_of, open_existing, store_of
from tierkv.tools.tenants import TenantNames
from tierkv.tools.terminal import print_json, visible
from tierkv.values.block import HASH_BYTES, BlockHash, as_token_array, iter_chain
from tierkv.values.units import format_bytes

__all__ = ["daemon_for", "evict", "parse_age", "request_of"]

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EVICT_S = 600.0
_MAX_AGE_S = 1e11


@spread()
def evict(
    model: ModelOptions,
    where: StoreOptions,
    to: Annotated[str | None, typer.Option(help="Until at most so many bytes are live, as 512M or 0.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace: leading hex digits, or its name.")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant: its name, leading digits of its id, or its salt.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Only blocks that were not used for so long, as 90s, 12h or 7d.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Only blocks that begin with these prompts: a file as `tierkv warm` takes it, or a text."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove blocks from a store, a daemon's memory, and engines that use the daemon. Pinned blocks and the quota stay.

    Model, device, dtype, block size and salt identify the blocks of --prompt.
    """
    daemon, path = where.find_daemon(), None
    if daemon is None:
        path = where.path
        daemon = daemon_for(path)
    if to is None and namespace is None and tenant is None and older_than is None and prompt is None:
        raise ConfigError("nothing to evict: say --to SIZE, --namespace N, --tenant T, --prompt P or --older-than T")
    size = parse_optional_size(to)
    to_bytes = -1 if size is None else size
    older_than_s = -1.0 if older_than is None else parse_age(older_than)
    if prompt is None:
        requests = [EvictBlocks(older_than_s=older_than_s, to_bytes=to_bytes)]
    else:
        store = path if daemon is None else find_store_of(daemon)
        requests = _requests_of(prompt, model, older_than_s, store)
        requests += [EvictBlocks(to_bytes=to_bytes)] if to_bytes >= 0 or not requests else []
    if dry_run or must_ask(yes=yes):
        result = _evict_stored(_store_for(daemon, path), requests, namespace, tenant, dry_run=True)
        if dry_run:
            _show(result, requests[-1].to_bytes, as_json=as_json, dry_run=True)
            return
        freed = format_bytes(result.bytes_freed)
        confirm(f"evict {result.blocks_evicted:,} blocks, {freed}, and their copies in memory?")
    if daemon is not None:
        result = _evict_through_daemon(daemon, requests, namespace, tenant)
    else:
        assert path is not None, "a store or a daemon is named"
        result = _evict_stored(path, requests, namespace, tenant)
    _show(result, requests[-1].to_bytes, as_json=as_json)


def _show(result: _Result, to_bytes: int, *, as_json: bool, dry_run: bool = False) -> None:
    if as_json:
        print_json(asdict(result) | ({"dry_run": True} if dry_run else {}))
    else:
        _print(result, to_bytes, "would evict" if dry_run else "evicted")


def _store_for(daemon: Path | None, path: Path | None) -> Path:
    """Return the store whose blocks would be evicted. Raises DaemonError for a daemon that has none."""
    if daemon is not None:
        return store_of(daemon)
    assert path is not None, "a store or a daemon is named"
    return path


@dataclass(slots=True)
class _Result:
    """What all evictions of one command did together."""

    blocks_evicted: int = 0
    bytes_freed: int = 0
    warm_blocks_evicted: int = 0
    blocks_left: int = 0
    bytes_live: int = 0
    stayed: dict[str, int] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record_stayed(self, counts: dict[str, int]) -> None:
        """Record why blocks stayed: the largest count of any eviction, because several may find the same blocks."""
        for reason, count in counts.items():
            if count:
                self.stayed[reason] = max(count, self.stayed.get(reason, 0))


def daemon_for(store_path: Path) -> Path | None:
    """Return the socket of the daemon that has a store and answers. Raises DaemonError if it does not."""
    socket = _owner_of(store_path)
    if socket is not None:
        try:
            open_client(socket).close()
        except DaemonGoneError as exc:
            raise DaemonError(
                f"the store {store_path} belongs to a daemon that does not answer at {socket}",
                hint="tierkv daemon stop ends it",
            ) from exc
    return socket


def parse_age(text: str) -> float:
    """Return the seconds of an age such as 90s, 30min, 12h, 7d or 2w. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in _UNITS_S:
        raise ConfigError(f"{text!r} is not an age: say 90s, 30min, 12h or 7d")
    return min(float(match[1]) * _UNITS_S[match[2]], _MAX_AGE_S)


def request_of(
    namespace: BlockHash, token_ids: Iterable[int], block_size: int, *, older_than_s: float = -1.0
) -> EvictBlocks:
    """Return the request that evicts a prompt's blocks under one namespace, if they were not used for so long."""
    tokens = as_token_array(list(token_ids)).tobytes()
    hashes = b"".join(block_hash for block_hash, _ in iter_chain(namespace, tokens, block_size))
    return EvictBlocks(namespace=namespace, hashes=hashes, tokens=tokens, older_than_s=older_than_s)


def _requests_of(prompt: str, model: ModelOptions, older_than_s: float, store: Path | None) -> list[EvictBlocks]:
    """Return requests for the prompts of a file, or a text that is one, under the model's namespace and its lossy ones.

    Raises ConfigError for a file that holds no prompt, and for a text without tokens.
    """
    prompts = read_prompts(Path(prompt)) if _is_file(prompt) else [PromptRequest(system=prompt.strip())]
    from tierkv.tools.engines import identify  # loads torch

    loaded, namespace = identify(model, store)
    lossy = [codec.name for codec in CODECS if codec.is_lossy]
    digests = [replace(namespace, lossy_codec=name).digest for name in ("", *lossy)]
    requests = []
    for each in prompts:
        tokens = prefix_tokens(loaded.tokenizer, each, day=model.day)
        if not tokens:
            raise ConfigError("the prompt has no tokens")
        requests += [request_of(digest, tokens, model.block_size, older_than_s=older_than_s) for digest in digests]
    return requests


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:
        return False


def _owner_of(store_path: Path) -> Path | None:
    """Return the socket of the daemon that has a store, if one has it. Raises DaemonError if its socket is unknown."""
    is_held, lines = read_lock_file(store_path / STORE_LOCK)
    if not is_held:
        return None
    if len(lines) < 2:
        raise DaemonError(
            f"the store {store_path} belongs to a daemon, process {lines[0] if lines else 'unknown'}",
            hint="name its --socket",
        )
    return Path(lines[1])


def _evict_through_daemon(
    socket: Path, requests: list[EvictBlocks], namespace: str | None, tenant: str | None
) -> _Result:
    result = _Result()
    with open_client(socket) as client:
        found = _Namespaces()
        for each in client.call(Status(), StatusReport).tenants:
            found.add(each.namespace, each.name, each.owner)
        if client.welcome.has_cold:
            with suppress(StoreError), open_existing(Path(client.welcome.store)) as store:
                found.add_stored(store)
        for request in found.within(requests, namespace, tenant):
            answer = client.call(request, EvictedBlocks, timeout_s=_EVICT_S)
            result.blocks_evicted += answer.cold
            result.warm_blocks_evicted += answer.warm
            result.bytes_freed += answer.freed_bytes
            result.record_stayed(answer.stayed)
            result.engines = [{name: getattr(each, name) for name in each.__struct_fields__} for each in answer.engines]
            result.blocks_left, result.bytes_live = answer.left, answer.live_bytes
    result.notes.append(f"through the daemon at {socket}: its warm tier and its clients as well")
    return result


def _evict_stored(
    store_path: Path,
    requests: list[EvictBlocks],
    namespace: str | None,
    tenant: str | None,
    *,
    dry_run: bool = False,
) -> _Result:
    """Evict from a store. dry_run: change nothing, and look at each request alone: several may free a little more."""
    result = _Result()
    would_go: set[BlockHash] = set()
    had_daemon = (store_path / STORE_LOCK).exists()
    with open_existing(store_path, read_only=False) as store:
        found = _Namespaces()
        found.add_stored(store)
        log = EvictionLog(store_path / LOG_NAME) if had_daemon and not dry_run else None
        for asked in found.within(requests, namespace, tenant):
            report = _evict_one(store, asked, dry_run=dry_run)
            would_go.update(report.hashes if dry_run else ())
            result.blocks_evicted += report.blocks
            result.bytes_freed += report.freed_bytes
            result.record_stayed({"stored, pinned": report.num_pinned})
            result.record_stayed({"stored, continued by others that stay": report.num_continued})
            if log:  # the next daemon passes it on to the engines that still have copies
                _add_to_log(log, asked, report.hashes)
        if log:
            log.save()
        left = store.stats()
        result.blocks_left, result.bytes_live = left.blocks, left.live_bytes
        if dry_run:
            result.blocks_evicted = len(would_go)
            result.bytes_freed = sum(entry.value_bytes for entry in store.lookup_many(would_go) if entry)
            result.blocks_left -= result.blocks_evicted
            result.bytes_live -= result.bytes_freed
        elif store.is_shared():
            result.notes.append("another process has this store open: copies in its own memory stay until it ends")
    return result


def _evict_one(store: ColdStore, request: EvictBlocks, *, dry_run: bool) -> EvictionReport:
    prompt = None
    if request.tokens:
        hashes = [request.hashes[at : at + HASH_BYTES] for at in range(0, len(request.hashes), HASH_BYTES)]
        prompt = StoredPrompt(request.namespace, hashes, request.tokens)
    return store.evict(
        to_bytes=request.to_bytes if request.to_bytes >= 0 else None,
        namespace=request.namespace or None,
        older_than_s=request.older_than_s if request.older_than_s >= 0 else None,
        prompt=prompt,
        dry_run=dry_run,
    )


def _add_to_log(log: EvictionLog, request: EvictBlocks, hashes: Iterable[BlockHash]) -> None:
    now = time.time()
    if request.to_bytes == 0:
        log.add(Eviction(0, now))
        return
    if request.namespace or request.older_than_s >= 0:
        log.add(Eviction(0, now, request.namespace, request.tokens, request.older_than_s))
    if request.to_bytes > 0:
        log.add(Eviction(0, now, block_hashes=b"".join(hashes)))


@dataclass(slots=True)
class _Namespaces:
    """Namespaces of a store and of a daemon: names and tenants by hex digest."""

    names: dict[str, str] = field(default_factory=dict)
    tenants: dict[str, str | None] = field(default_factory=dict)
    settings: dict[str, TenantSettings] = field(default_factory=dict)

    def add(self, digest: str, name: str, tenant: str | None) -> None:
        """Add one namespace."""
        self.names[digest] = name
        self.tenants[digest] = tenant

    def add_stored(self, store: ColdStore) -> None:
        """Add all namespaces of a store, and the names of its tenants."""
        self.settings.update(store.tenants())
        for each in store.namespaces():
            self.add(each.digest.hex(), str(each.description.get("name", "")), each.tenant)

    def within(self, requests: list[EvictBlocks], namespace: str | None, tenant: str | None) -> list[EvictBlocks]:
        """Return the requests, limited to a namespace and a tenant where these are named. Raises ConfigError."""
        if namespace is None and tenant is None:
            return [each for each in requests if not each.namespace or each.namespace.hex() in self.names]
        allowed = set(self.names) if namespace is None else {find_digest(self.names, namespace)}
        if tenant is not None:
            ids = frozenset(each for each in self.tenants.values() if each is not None)
            wanted = TenantNames(self.settings, ids | self.settings.keys()).find(tenant)
            allowed = {digest for digest in allowed if self.tenants[digest] == wanted}
        limited: list[EvictBlocks] = []
        has_prompts = any(request.namespace for request in requests)
        for request in requests:
            if request.namespace:
                limited += [request] if request.namespace.hex() in allowed else []
                continue
            if not has_prompts:
                limited += [
                    EvictBlocks(namespace=bytes.fromhex(each), older_than_s=request.older_than_s) for each in allowed
                ]
            limited += [EvictBlocks(to_bytes=request.to_bytes)] if request.to_bytes >= 0 else []
        return limited


def _print(result: _Result, to_bytes: int, done: str) -> None:
    warm = f", and {result.warm_blocks_evicted} from the warm tier" if result.warm_blocks_evicted else ""
    print(
        f"{done} {result.blocks_evicted} blocks, {format_bytes(result.bytes_freed)}{warm}; "
        f"{result.blocks_left} blocks, {format_bytes(result.bytes_live)}, are left"
        + (" (pinned blocks and those before them stay)" if 0 <= to_bytes < result.bytes_live else "")
    )
    for reason, count in result.stayed.items():
        print(f"stayed: {count} blocks ({visible(reason)})")
    for engine in result.engines:
        name = visible(engine["client"])
        if not engine["has_answered"]:
            print(f"{name}: has not answered yet; it drops its copies when it does")
        elif engine["blocks"] or engine["in_use"] or engine["pinned"]:
            print(
                f"{name}: dropped {engine['blocks']} hot blocks; {engine['in_use']} in use go when their "
                f"requests end, {engine['pinned']} pinned stay"
            )
    for note in result.notes:
        print(visible(note))
