"""A process that becomes another user, then serves or acts: `python team_worker.py UID GIDS ROLE JSON`.

The interpreter may lie where other users cannot read it, so everything is imported first.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import logging
import mmap
import os
import sys
from pathlib import Path
from typing import Any

from stored_blocks import NAMESPACE, TOKENS, load, save

from tierkv import BlockStore, BlockStoreConfig, DaemonError
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks
from tierkv.daemon.messages import (
    Abandon,
    Compact,
    Count,
    Done,
    Evict,
    Found,
    Hello,
    LoadState,
    Match,
    Pin,
    Publish,
    Published,
    Reserve,
    Reserved,
    Saved,
    SaveState,
    Status,
    StatusReport,
    Stop,
)
from tierkv.daemon.server import serve
from tierkv.values.block import as_token_array, iter_chain
from tierkv.values.namespace import Namespace

F_SEAL_WRITE = 8


def hello_of(namespace: Namespace = NAMESPACE) -> Hello:
    return Hello(
        namespace=namespace.digest,
        description=namespace.describe(),
        block_bytes=namespace.layout.block_bytes,
        client="team",
    )


def serving(socket: str, store: str, group: int | None) -> None:
    logging.basicConfig(level=logging.INFO)
    config = DaemonConfig(
        socket=Path(socket), store=Path(store), warm_bytes=1 << 20, cold_bytes=64 << 20, min_free_bytes=0, group=group
    )
    serve(config, started=lambda: print("up", flush=True))


def storing(socket: str, daemon_user: int | None = None) -> dict[str, Any]:
    """Save and load blocks; return what came of it."""
    config = BlockStoreConfig(socket=Path(socket), warm_bytes=1, daemon_user=daemon_user)
    with BlockStore(config, namespace=NAMESPACE) as store:
        keys = list(store.keys(TOKENS))
        saved = save(store, keys)
        store.flush()
        loaded, failed = load(store, keys)
        return {"saved": saved, "loaded": loaded, "failed": len(failed), "skips": dict(store.stats().skip_reasons)}


def caching(socket: str, daemon_user: int | None = None) -> dict[str, Any]:
    """Answer a prompt through a TierCache; return what was cached. PatternEngine compares every cached number."""
    from pattern_engine import PatternEngine, tiny_layout

    from tierkv import CacheConfig, TierCache

    config = CacheConfig(block_size=4, hot_bytes=1 << 20, socket=Path(socket), daemon_user=daemon_user)
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device="cpu") as cache:
        sequence = PatternEngine(cache).start(list(range(41)))
        cached = sequence.num_cached_tokens
        cache.release(sequence)
        cache.flush()
        return {"cached": cached, "skips": dict(cache.stats().skip_reasons)}


def greeting(socket: str, daemon_user: int | None = None, name: str = "") -> dict[str, Any]:
    """Open a namespace under a name; return what the daemon shows of it."""
    namespace = Namespace(weights="named", layout=NAMESPACE.layout, name=name)
    with DaemonClient(Path(socket), hello_of(namespace), daemon_user=daemon_user) as client:
        report = client.call(Status(), StatusReport)
        names = {each.namespace: each.name for each in report.tenants}
        return {"name": names[namespace.digest.hex()], "is_member": client.welcome.is_member}


def asking(socket: str, daemon_user: int) -> dict[str, str]:
    """Send every request that changes something; return the refusals."""
    requests = [
        (Reserve(chains=[]), Reserved),
        (Publish(slots=b""), Published),
        (Pin(hashes=b"", tokens=b"", pinned=True), Count),
        (Evict(count=-1), Count),
        (EvictBlocks(to_bytes=0), EvictedBlocks),
        (SaveState(path="/tmp/never-written"), Saved),
        (LoadState(path="/etc/hostname"), Count),
        (Compact(), Done),
        (Abandon(slots=b""), Done),
        (Stop(), Done),
    ]
    said = {}
    with DaemonClient(Path(socket), hello_of(), daemon_user=daemon_user) as client:
        for message, expected in requests:
            try:
                client.call(message, expected)
                said[type(message).__name__] = "done"
            except DaemonError as exc:
                said[type(message).__name__] = str(exc)
        tokens = as_token_array([7] * 8).tobytes()
        hashes = b"".join(each for each, _ in iter_chain(NAMESPACE.digest, tokens, NAMESPACE.layout.block_size))
        found = client.call(Match(hashes=hashes, tokens=tokens, wants_claim=True), Found)
        said["claim"] = str(found.claim)
    return said


def writing(socket: str, daemon_user: int) -> dict[str, str]:
    """Try to change the slab in every way that a descriptor could allow; return what stopped each."""
    with DaemonClient(Path(socket), hello_of(), daemon_user=daemon_user) as client:
        fd, size = client.take_descriptor(), client.welcome.slab_bytes
        attempts = {
            "map": lambda: mmap.mmap(fd, size),
            "open": lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            "truncate": lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_TRUNC),
            "write": lambda: os.pwrite(fd, b"x", 0),
            "cut": lambda: os.ftruncate(fd, 0),
            "punch": lambda: _punch(fd),
            "chmod": lambda: os.fchmod(fd, 0o777),
            "seal": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_WRITE),
            "protect": lambda: _protect(fd, size),
        }
        said = {}
        for name, attempt in attempts.items():
            try:
                attempt()
                said[name] = "done"
            except OSError as exc:
                said[name] = os.strerror(exc.errno or 0)
        return said


def _punch(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


def _protect(fd: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


ROLES = {"serve": serving, "store": storing, "cache": caching, "greet": greeting, "ask": asking, "write": writing}

if __name__ == "__main__":
    uid, gids, role, options = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    for name in {"store": ["tierkv.movers.engine_memory"], "cache": ["pattern_engine", "tierkv.cache"]}.get(role, []):
        importlib.import_module(name)  # loads torch
    os.umask(0o022)
    os.setgroups(gids[1:])
    os.setgid(gids[0])
    os.setuid(uid)
    try:
        print(json.dumps(ROLES[role](**options)), flush=True)
    except Exception as exc:  # noqa: BLE001 - the test reads what went wrong
        print(json.dumps({"error": str(exc)}), flush=True)
