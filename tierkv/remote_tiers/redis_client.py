"""RedisClient: records in Redis or Valkey, one server, a cluster, or one that sentinels name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tierkv.errors import RemoteRefusedError
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.redis_servers import Address, RedisServers
from tierkv.remote_tiers.redis_wire import RedisWire
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.block import BlockHash

__all__ = ["RedisClient"]

Result = TypeVar("Result")

_MOVED = ("MOVED", "ASK", "READONLY", "CLUSTERDOWN", "TRYAGAIN")  # another server has the key, or will soon
_MOST_COMMANDS = 512  # sent before the first answer is received: all their answers fit a socket's buffers


class RedisClient:
    """Satisfies `RemoteClient`.

    A value's life is refreshed by the read itself (GETEX) where the URL names `ttl_s`. Keys have no hash tag, so a
    cluster spreads the blocks of one prompt over its servers.
    """

    def __init__(self, url: RemoteUrl) -> None:
        self._servers = RedisServers(url)
        ttl_s = url.number("ttl_s", 0)
        self._life = (b"PX", b"%d" % max(1, int(ttl_s * 1000))) if ttl_s else ()

    def ping(self, deadline: Deadline) -> None:
        """Ask one server for a key that does not exist: PING says nothing about rights."""
        self.prefix([RemoteKey(bytes(16), bytes(16))], deadline)

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Count all values with one EXISTS. Where some are missing, they are the last ones, as a second one shows.

        Where a parent was evicted before its children, ask for each key. A script would find the gap in one round trip,
        but needs rights that many servers do not grant.
        """
        names = [key.text().encode() for key in keys]
        if not names:
            return 0
        if self._servers.is_cluster:
            return self._first_gap(names, deadline)

        found = self._count(names, deadline)
        if found in (0, len(names)) or self._count(names[:found], deadline) == found:
            return found
        return self._first_gap(names[:found], deadline)

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Receive a value into new memory."""
        name = key.text().encode()
        command = (b"GETEX", name, *self._life) if self._life else (b"GET", name)

        def get(wire: RedisWire) -> Bytes | None:
            wire.send([command], deadline)
            return wire.value(deadline, most_bytes=most_bytes)

        try:
            return self._on_server(name, get, deadline)
        except RemoteRefusedError as exc:
            if exc.code == "WRONGTYPE":
                raise RemoteDamageError("a key of the remote tier has a value of another type") from exc
            raise

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        """Set a value, with NX unless `replace`."""
        name = key.text().encode()
        command = (b"SET", name, record, *self._life, *(() if replace else (b"NX",)))

        def put(wire: RedisWire) -> bool:
            wire.send([command], deadline)
            return wire.status(deadline) is not None

        return self._on_server(name, put, deadline)

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Refresh the life of values, or their place in the order of eviction; the last first, so parents go last."""
        names = [key.text().encode() for key in reversed(keys)]
        commands: list[tuple[bytes, ...]]
        if self._life:
            commands = [(b"PEXPIRE", name, self._life[1]) for name in names]
        else:
            commands = [(b"TOUCH", name) for name in names]
        self._ask_each(names, commands, deadline)

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Keep nothing: a key of Redis that is not a block could be evicted at any time."""

    def close(self) -> None:
        """Close all connections."""
        self._servers.close()

    def _count(self, names: Sequence[bytes], deadline: Deadline) -> int:
        def count(wire: RedisWire) -> int:
            wire.send([(b"EXISTS", *names)], deadline)
            return wire.number(deadline, most=len(names))

        return self._on_server(names[0], count, deadline)

    def _first_gap(self, names: Sequence[bytes], deadline: Deadline) -> int:
        found = self._ask_each(names, [(b"EXISTS", name) for name in names], deadline)
        return next((at for at, exists in enumerate(found) if not exists), len(names))

    def _ask_each(self, names: Sequence[bytes], commands: Sequence[tuple[bytes, ...]], deadline: Deadline) -> list[int]:
        """Send a command for each key, all of one server at once; return the answers, each 0 or 1."""

        def ask_all() -> list[int]:
            answers = [0] * len(names)
            by_server: dict[Address, list[int]] = {}
            for at, name in enumerate(names):
                by_server.setdefault(self._servers.address_of(name, deadline), []).append(at)
            for address, places in by_server.items():
                for first in range(0, len(places), _MOST_COMMANDS):
                    part = places[first : first + _MOST_COMMANDS]
                    with self._servers.connection(address, deadline) as wire:
                        wire.send([commands[at] for at in part], deadline)
                        for at in part:
                            answers[at] = wire.number(deadline, most=1)
            return answers

        return self._following(ask_all)

    def _on_server(self, name: bytes, work: Callable[[RedisWire], Result], deadline: Deadline) -> Result:
        """Run commands on the server that has a key."""

        def run() -> Result:
            with self._servers.connection(self._servers.address_of(name, deadline), deadline) as wire:
                return work(wire)

        return self._following(run)

    def _following(self, work: Callable[[], Result]) -> Result:
        """Do some work; once more where another server has a key by now."""
        try:
            return work()
        except RemoteRefusedError as exc:
            if exc.code not in _MOVED:
                raise
            self._servers.forget_map()
        return work()
