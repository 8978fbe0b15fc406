"""`tierkv evict`: remove blocks by size, namespace, prompt or age, from a store and from the memory above it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.eviction_log import LOG_NAME, EvictionLog
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks, Eviction
from tierkv.daemon.host import read_lock_file
from tierkv.daemon.messages import Status, StatusReport
from tierkv.daemon.server import STORE_LOCK
from tierkv.errors import ConfigError, DaemonError, DaemonGoneError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_eviction import EvictionReport, StoredPrompt
from tierkv.tools.options import parse_size
from tierkv.tools.render import format_bytes, print_json, visible
from tierkv.tools.stores import open_existing
from tierkv.values.block import HASH_BYTES, BlockHash, as_token_array, iter_chain

__all__ = ["PromptBlocks", "daemon_for", "evict", "parse_age"]

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EVICT_S = 600.0
_MAX_AGE_S = 1e11


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """A prompt under one namespace: its token ids as little-endian uint32, and the hashes of its whole blocks."""

    namespace: BlockHash
    hashes: list[BlockHash]
    token_bytes: bytes

    @classmethod
    def of(cls, namespace: BlockHash, token_ids: Iterable[int], block_size: int) -> PromptBlocks:
        """Return what a prompt is under a namespace."""
        token_bytes = as_token_array(list(token_ids)).tobytes()
        chain = iter_chain(namespace, token_bytes, block_size)
        return cls(namespace, [block_hash for block_hash, _ in chain], token_bytes)


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

    def stay(self, counts: dict[str, int]) -> None:
        """Note blocks that stayed; of several evictions the most, since each may meet the same ones."""
        for reason, count in counts.items():
            if count:
                self.stayed[reason] = max(count, self.stayed.get(reason, 0))


def evict(
    store_path: Path | None,
    *,
    socket: Path | None,
    to: str | None,
    namespace: str | None,
    older_than: str | None,
    as_json: bool,
    prompts: list[PromptBlocks] | None = None,
) -> None:
    """Remove unpinned blocks, leaves first: those of a namespace, of prompts and of an age, where given; then the least
    recently used until at most `to` bytes are live.

    socket: of the daemon that has the store. It evicts from its warm tier too, and its clients drop their hot copies.
    Raises ConfigError if nothing is given, StoreError, DaemonError.
    """
    if to is None and namespace is None and older_than is None and prompts is None:
        raise ConfigError("nothing to evict: say --to SIZE, --namespace N, --prompt P or --older-than T")
    wishes = _wishes(
        to_bytes=-1 if to is None else 0 if to.strip() == "0" else parse_size(to),
        older_than_s=-1.0 if older_than is None else parse_age(older_than),
        prompts=prompts,
    )
    if socket is not None:
        result = _evict_through_daemon(socket, wishes, namespace)
    else:
        assert store_path is not None, "a store or a daemon is named"
        result = _evict_stored(store_path, wishes, namespace)
    if as_json:
        print_json(asdict(result))
    else:
        _print(result, wishes[-1].to_bytes)


def daemon_for(store_path: Path) -> Path | None:
    """Return the socket of the daemon that has a store and answers. Raises DaemonError if it does not."""
    socket = _owner_of(store_path)
    if socket is not None:
        try:
            DaemonClient(socket).close()
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


def _wishes(*, to_bytes: int, older_than_s: float, prompts: list[PromptBlocks] | None) -> list[EvictBlocks]:
    """Return one eviction for each prompt, and the size to come down to with the last one."""
    if prompts is None:
        return [EvictBlocks(older_than_s=older_than_s, to_bytes=to_bytes)]
    wishes = [
        EvictBlocks(
            namespace=prompt.namespace,
            hashes=b"".join(prompt.hashes),
            tokens=prompt.token_bytes,
            older_than_s=older_than_s,
        )
        for prompt in prompts
    ]
    if to_bytes >= 0 or not wishes:
        wishes.append(EvictBlocks(to_bytes=to_bytes))
    return wishes


def _evict_through_daemon(socket: Path, wishes: list[EvictBlocks], namespace: str | None) -> _Result:
    result = _Result()
    with DaemonClient(socket) as client:
        names = {each.namespace: each.name for each in client.call(Status(), StatusReport).tenants}
        if client.welcome.has_cold:
            with suppress(StoreError), open_existing(Path(client.welcome.store)) as store:
                names |= {each.digest.hex(): str(each.description.get("name", "")) for each in store.namespaces()}
        digest = _find(names, namespace)
        for wish in wishes:
            if not _can_match(wish, digest, names):
                continue
            answer = client.call(_within(wish, digest), EvictedBlocks, timeout_s=_EVICT_S)
            result.blocks_evicted += answer.cold
            result.warm_blocks_evicted += answer.warm
            result.bytes_freed += answer.freed_bytes
            result.stay(answer.stayed)
            result.engines = [{name: getattr(each, name) for name in each.__struct_fields__} for each in answer.engines]
            result.blocks_left, result.bytes_live = answer.left, answer.live_bytes
    result.notes.append(f"through the daemon at {socket}: its warm tier and its clients as well")
    return result


def _evict_stored(store_path: Path, wishes: list[EvictBlocks], namespace: str | None) -> _Result:
    result = _Result()
    had_daemon = (store_path / STORE_LOCK).exists()
    with open_existing(store_path, read_only=False) as store:
        names = {each.digest.hex(): str(each.description.get("name", "")) for each in store.namespaces()}
        digest = _find(names, namespace)
        log = EvictionLog(store_path / LOG_NAME) if had_daemon else None
        for wish in wishes:
            if not _can_match(wish, digest, names):
                continue
            asked = _within(wish, digest)
            report = _evict_one(store, asked)
            result.blocks_evicted += report.blocks
            result.bytes_freed += report.freed_bytes
            result.stay({"stored, pinned": report.num_pinned})
            result.stay({"stored, continued by others that stay": report.num_continued})
            if log:  # the next daemon tells the engines that still have copies
                _note(log, asked, report.hashes)
        if log:
            log.save()
        left = store.stats()
        result.blocks_left, result.bytes_live = left.blocks, left.live_bytes
        if store.is_shared():
            result.notes.append("another process has this store open: copies in its own memory stay until it ends")
    return result


def _evict_one(store: ColdStore, wish: EvictBlocks) -> EvictionReport:
    prompt = None
    if wish.tokens:
        hashes = [wish.hashes[at : at + HASH_BYTES] for at in range(0, len(wish.hashes), HASH_BYTES)]
        prompt = StoredPrompt(wish.namespace, hashes, wish.tokens)
    return store.evict(
        to_bytes=wish.to_bytes if wish.to_bytes >= 0 else None,
        namespace=wish.namespace or None,
        older_than_s=wish.older_than_s if wish.older_than_s >= 0 else None,
        prompt=prompt,
    )


def _note(log: EvictionLog, wish: EvictBlocks, hashes: Iterable[BlockHash]) -> None:
    now = time.time()
    if wish.to_bytes == 0:
        log.add(Eviction(0, now))
        return
    if wish.namespace or wish.older_than_s >= 0:
        log.add(Eviction(0, now, wish.namespace, wish.tokens, wish.older_than_s))
    if wish.to_bytes > 0:
        log.add(Eviction(0, now, block_hashes=b"".join(hashes)))


def _within(wish: EvictBlocks, digest: BlockHash) -> EvictBlocks:
    """Return a wish within a namespace, if one is named."""
    namespace = wish.namespace or digest
    return EvictBlocks(namespace, wish.hashes, wish.tokens, wish.older_than_s, wish.to_bytes)


def _can_match(wish: EvictBlocks, digest: BlockHash, names: dict[str, str]) -> bool:
    """Tell whether a wish is of a namespace that there is, and that was not excluded."""
    return not wish.namespace or (digest in (b"", wish.namespace) and wish.namespace.hex() in names)


def _find(names: dict[str, str], prefix: str | None) -> BlockHash:
    """Return the namespace whose hex digest begins with `prefix`; b"" where none is named. Raises ConfigError."""
    if prefix is None:
        return b""
    fitting = [digest for digest in names if digest.startswith(prefix.lower())]
    if len(fitting) == 1:
        return bytes.fromhex(fitting[0])
    listed = ", ".join(f"{digest[:12]} ({name or 'unnamed'})" for digest, name in names.items())
    raise ConfigError(
        f"{len(fitting)} namespaces begin with {prefix}; choose one with --namespace: {listed or 'it is empty'}"
    )


def _print(result: _Result, to_bytes: int) -> None:
    warm = f", and {result.warm_blocks_evicted} from the warm tier" if result.warm_blocks_evicted else ""
    print(
        f"evicted {result.blocks_evicted} blocks, {format_bytes(result.bytes_freed)}{warm}; "
        f"{result.blocks_left} blocks, {format_bytes(result.bytes_live)}, are left"
        + (" (pinned blocks and what they continue stay)" if 0 <= to_bytes < result.bytes_live else "")
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
