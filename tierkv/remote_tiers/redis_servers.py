"""RedisServers: which server has a key, and connections to it: one server, a cluster, or one that sentinels name.

redis-py (the extra `redis`) connects. Its retries are off: they turn a stopped server into seconds.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tierkv.errors import ConfigError, RemoteError, RemoteRefusedError
from tierkv.remote_tiers.call_threads import CallThreads
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.remote_tiers.redis_wire import RedisWire
from tierkv.remote_tiers.urls import RemoteUrl

__all__ = ["Address", "RedisServers"]

Address = tuple[str, int]
Result = TypeVar("Result")

_PORT = 6379
_SENTINEL_PORT = 26379
_SLOTS = 16384
_MOST_IDLE = 16  # connections that are kept for each server
_MOST_CONNECTING = 8
_MAP_BYTES = 1 << 20


class RedisServers:
    """The servers of one URL. Thread-safe. Raises ConfigError where redis-py is not installed."""

    def __init__(self, url: RemoteUrl) -> None:
        self._redis = _import_redis()
        self._url = url
        self._user, self._password = url.secrets()
        self.is_cluster: bool = url.flag("cluster")
        self._threads = CallThreads(_MOST_CONNECTING, name="tierkv-remote-connect")
        self._lock = threading.Lock()
        self._idle: dict[Address, list[RedisWire]] = {}
        self._map: list[Address] | None = None  # by slot
        self._master: Address | None = None
        self._is_closed = False
        self._memory = RecordMemory()

    def address_of(self, key: bytes, deadline: Deadline) -> Address:
        """Return the server that has a key."""
        if self.is_cluster:
            slots = self._map or self._read_map(deadline)
            return slots[binascii.crc_hqx(key, 0) % _SLOTS]
        if self._url.option("sentinel"):
            return self._master or self._ask_sentinels(deadline)
        host, port = self._url.hosts[0]
        return (host, port or _PORT)

    def split(self, keys: Sequence[bytes], deadline: Deadline) -> dict[Address, Sequence[int]]:
        """Return which of the keys each server has, by their places in `keys`."""
        if not keys:
            return {}
        if not self.is_cluster:
            return {self.address_of(keys[0], deadline): range(len(keys))}
        found: dict[Address, list[int]] = {}
        for at, key in enumerate(keys):
            found.setdefault(self.address_of(key, deadline), []).append(at)
        return dict(found)

    def forget_map(self) -> None:
        """Ask again which server has which key, before the next call: a key has moved, or a server has failed."""
        self._map = self._master = None

    @contextlib.contextmanager
    def connection(self, address: Address, deadline: Deadline) -> Iterator[RedisWire]:
        """Yield a connection to a server, and keep it afterwards, unless an error leaves answers unread in it."""
        wire = self._take_idle(address) or self._connect(address, deadline)
        try:
            yield wire
        except RemoteRefusedError:
            if wire.is_in_step:
                self._keep(address, wire)
            else:  # answers to later commands of the same batch still come
                wire.close()
            raise
        except RemoteDamageError:
            wire.close()  # the rest of the value still comes
            raise
        except BaseException:
            wire.close()
            self._drop_idle(address)
            self.forget_map()
            raise
        self._keep(address, wire)

    def close(self) -> None:
        """Close all connections that are not in use. May be called twice."""
        self._threads.close()
        with self._lock:
            self._is_closed = True
            wires = [wire for idle in self._idle.values() for wire in idle]
            self._idle.clear()
        for wire in wires:
            wire.close()

    def _take_idle(self, address: Address) -> RedisWire | None:
        while True:
            with self._lock:
                idle = self._idle.get(address)
                wire = idle.pop() if idle else None
            if wire is None or not wire.is_stale():
                return wire
            wire.close()

    def _keep(self, address: Address, wire: RedisWire) -> None:
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if not self._is_closed and len(idle) < _MOST_IDLE:
                idle.append(wire)
                return
        wire.close()

    def _drop_idle(self, address: Address) -> None:
        with self._lock:
            wires = self._idle.pop(address, [])
        for wire in wires:
            wire.close()

    def _connect(self, address: Address, deadline: Deadline) -> RedisWire:
        """Connect on another thread: the system may look for a name longer than the deadline."""
        return self._threads.call(lambda: self._log_in(address, deadline), left_s=deadline.left_s, undo=RedisWire.close)

    def _log_in(self, address: Address, deadline: Deadline) -> RedisWire:
        """Return a connection that has authenticated. Raises RemoteError, RemoteRefusedError."""
        commands: list[tuple[bytes, ...]] = []
        if self._user:
            commands.append((b"AUTH", self._user.encode(), (self._password or "").encode()))
        elif self._password:
            commands.append((b"AUTH", self._password.encode()))
        if database := int(self._url.path or 0):
            commands.append((b"SELECT", b"%d" % database))
        wire = self._open(address, deadline)
        try:
            for command in commands:
                wire.send_command(command, deadline)
                wire.status(deadline)
        except BaseException:
            wire.close()
            raise
        return wire

    def _open(self, address: Address, deadline: Deadline) -> RedisWire:
        """Return a connection on which nothing was sent. Raises RemoteError."""
        redis, url = self._redis, self._url
        kind: Any = redis.Connection
        options: dict[str, Any] = {}
        if url.scheme == "rediss":
            kind = redis.SSLConnection
            options["ssl_ca_certs"] = url.option("ca")
            options["ssl_certfile"] = url.option("cert")
            options["ssl_keyfile"] = url.option("key")
        host, port = address
        try:
            connection = kind(
                host=host,
                port=port,
                socket_connect_timeout=deadline.left_s(),
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
                redis_connect_func=lambda _: None,  # it says nothing to the server: see RedisWire
                **options,
            )
            connection.connect()
        except (redis.exceptions.RedisError, OSError, ValueError) as exc:
            raise RemoteError(f"{self._url} cannot be reached: {type(exc).__name__}") from None
        return RedisWire(_socket_of(connection), self._memory)

    def _read_map(self, deadline: Deadline) -> list[Address]:
        """Ask the first server that answers which server has which slots."""
        known = [*self._known_nodes(), *((host, port or _PORT) for host, port in self._url.hosts)]

        def read(address: Address, deadline: Deadline) -> list[Address]:
            with contextlib.closing(self._log_in(address, deadline)) as wire:
                wire.send_command((b"CLUSTER", b"SLOTS"), deadline)
                return _slots_of(wire.reply(deadline, most_bytes=_MAP_BYTES), address[0])

        self._map = found = self._ask_first(known, read, deadline)
        return found

    def _known_nodes(self) -> list[Address]:
        with self._lock:
            return list(self._idle)

    def _ask_sentinels(self, deadline: Deadline) -> Address:
        """Ask the first sentinel that answers which server takes writes now."""
        name = (self._url.option("sentinel") or "").encode()

        def ask(address: Address, deadline: Deadline) -> Address:
            with contextlib.closing(self._open(address, deadline)) as wire:
                wire.send_command((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name), deadline)
                return _address_of(wire.reply(deadline, most_bytes=_MAP_BYTES))

        sentinels = [(host, port or _SENTINEL_PORT) for host, port in self._url.hosts]
        self._master = found = self._ask_first(sentinels, ask, deadline)
        return found

    def _ask_first(
        self, addresses: Sequence[Address], ask: Callable[[Address, Deadline], Result], deadline: Deadline
    ) -> Result:
        """Return what the first server answers that answers; each has its share of the time."""
        failure: RemoteError | None = None
        for number, address in enumerate(addresses):
            share = deadline.part(len(addresses) - number)
            try:
                return self._threads.call(functools.partial(ask, address, share), left_s=share.left_s)
            except RemoteError as exc:
                failure = exc
        raise failure or RemoteError(f"{self._url} names no server")


def _socket_of(connection: Any) -> Any:
    """Take the socket out of a connection of redis-py, which has none then and closes none.

    redis-py has no public name for it. Its parser has read nothing: nothing was sent.
    """
    connected, connection._sock = connection._sock, None
    return connected


def _slots_of(answer: Any, host: str) -> list[Address]:
    """Return the server of each slot. host: of the server that was asked, where it leaves out its own name."""
    found: list[Address | None] = [None] * _SLOTS
    try:
        for first, last, node, *_ in answer:
            name = (node[0] or b"").decode() or host
            if not 0 <= int(first) <= int(last) < _SLOTS:
                raise ValueError("no such slot")
            found[int(first) : int(last) + 1] = [(name, _port_of(node[1]))] * (int(last) - int(first) + 1)
    except (TypeError, ValueError, AttributeError, IndexError) as exc:
        raise RemoteError("the remote tier's map of its cluster cannot be read") from exc
    known = [each for each in found if each is not None]
    if len(known) < _SLOTS:
        raise RemoteError("the remote tier's cluster does not serve all keys")
    return known


def _address_of(answer: Any) -> Address:
    try:
        host, port = answer
        return host.decode(), _port_of(port)
    except (TypeError, ValueError, AttributeError) as exc:
        raise RemoteError("the sentinels do not know that name") from exc


def _port_of(answer: Any) -> int:
    """Return the port that a server names. Raises TypeError and ValueError."""
    port = int(answer)
    if not 0 < port < 1 << 16:
        raise ValueError("no such port")
    return port


def _import_redis() -> Any:
    try:
        import redis
        import redis.backoff
        import redis.retry
    except ImportError as exc:
        raise ConfigError("a remote tier on Redis needs redis-py", hint="pip install 'tierkv[redis]'") from exc
    return redis
