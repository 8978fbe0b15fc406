"""RedisClient: records in Redis or Valkey, one server, a cluster, or one that sentinels name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from tierkv.errors import RemoteRefusedError
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.redis_servers import RedisServers
from tierkv.remote_tiers.redis_wire import RedisWire
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.block import BlockHash

__all__ = ["RedisClient"]

Result = TypeVar("Result")

_MOVED = ("MOVED", "ASK", "READONLY", "CLUSTERDOWN", "TRYAGAIN")  # another server has the key, or will soon
_MOST_COMMANDS = 512  # sent before the first answer is received: all their answers fit a socket's buffers
_PING_KEYS = 256


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
        """Ask for keys that do not exist: PING says nothing about rights. All servers of a cluster are asked."""
        count = _PING_KEYS if self._servers.is_cluster else 1
        self.prefix([RemoteKey(bytes(16), number.to_bytes(16, "little")) for number in range(count)], deadline)

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Ask for each key, all at once: one round trip, also where a parent was evicted before its children.

        One EXISTS of all keys would take 30 us less for 128, but says only how many there are. A script that finds the
        gap takes longer, and needs rights that many servers do not grant.
        """
        found = self._ask_each(b"EXISTS", [key.text().encode() for key in keys], (), deadline)
        return len(found) if (gap := found.find(b"0")) < 0 else gap

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Receive a value into new memory."""
        name = key.text().encode()
        command = (b"GETEX", name, *self._life) if self._life else (b"GET", name)

        def get(wire: RedisWire) -> Bytes | None:
            wire.send_command(command, deadline)
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
            wire.send_command(command, deadline)
            return wire.status(deadline) is not None

        return self._on_server(name, put, deadline)

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Refresh the life of values, or their place in the order of eviction; the last first, so parents go last."""
        names = [key.text().encode() for key in reversed(keys)]
        if self._life:
            self._ask_each(b"PEXPIRE", names, self._life[1:], deadline)
        else:
            self._ask_each(b"TOUCH", names, (), deadline)

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Keep nothing: a key of Redis that is not a block could be evicted at any time."""

    def descriptions(self, deadline: Deadline) -> list[bytes]:
        """Return none."""
        return []

    def close(self) -> None:
        """Close all connections."""
        self._servers.close()

    def _ask_each(
        self, command: bytes, names: Sequence[bytes], arguments: Sequence[bytes], deadline: Deadline
    ) -> bytes:
        """Send a command for each key, to all servers before the first answer; return the answers, digits 0 or 1."""

        def ask_all() -> bytes:
            answers = bytearray(len(names))
            by_server = self._servers.split(names, deadline)
            with contextlib.ExitStack() as opened:
                wires = [opened.enter_context(self._servers.connection(each, deadline)) for each in by_server]
                for first in range(0, len(names), _MOST_COMMANDS):
                    parts = [places[first : first + _MOST_COMMANDS] for places in by_server.values()]
                    for wire, part in zip(wires, parts, strict=True):
                        wire.send_each(command, [names[at] for at in part], arguments, deadline)
                    for wire, part in zip(wires, parts, strict=True):
                        for at, digit in zip(part, wire.flags(len(part), deadline), strict=True):
                            answers[at] = digit
            return bytes(answers)

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
