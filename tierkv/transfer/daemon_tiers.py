"""DaemonTiers: the daemon's warm and cold tiers, as one cache sees them.

The daemon's slab is mapped here, and registered with CUDA: the cache copies from and to it directly. The socket
carries hashes, token ids and slot numbers. Without the daemon its blocks are misses, no request fails, and a thread
looks for the daemon again.

The daemon ends all leases of a connection when the connection ends. So a connection that has failed is closed only
after the last copy from or to its slots has ended: until then no other client can get such a slot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tierkv.daemon.client import Answer, DaemonClient
from tierkv.daemon.eviction_messages import (
    EvictBlocks,
    EvictedBlocks,
    Eviction,
    EvictionDone,
    Evictions,
    EvictionsSince,
)
from tierkv.daemon.messages import (
    Count,
    Done,
    Evict,
    Flush,
    Hello,
    LoadState,
    Message,
    Pin,
    Prefetch,
    Saved,
    SaveState,
    Status,
    StatusReport,
)
from tierkv.daemon.protocol import printable
from tierkv.errors import DaemonError, DaemonGoneError, StoreError
from tierkv.index.chosen_eviction import IN_USE, PINNED, Choice
from tierkv.transfer.daemon_blocks import DaemonBlocks
from tierkv.transfer.daemon_connection import DaemonConnection
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, HashFunction, Tier, iter_chain
from tierkv.values.namespace import NAME_LIMIT, Namespace
from tierkv.values.stats import TierStats

__all__ = ["DaemonTiers"]

_log = logging.getLogger(__name__)

_RECONNECT_S = 1.0
_TICK_S = 0.1
_WARM_TIMEOUT_S = 30.0  # of pin and evict, which may have to wait for the store
_LONG_TIMEOUT_S = 600.0  # of flush, save and load, which write to disks


class DaemonTiers:
    """Keeps a connection to the daemon, drops hot copies of what is evicted there, and asks for its services.

    Thread-safe. blocks: finds, reads and writes blocks there. connection: None while no daemon answers.
    boot: of the daemon that is there, or was. after_writes: calls an action when all that is queued to be written has
    been written; returns False if it will not.
    wait_s: how long a request waits for blocks that another process computes. timeout_s: of short calls.
    Raises DaemonError if the daemon refuses this namespace or speaks another version. A daemon that cannot be reached
    is no error.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        path: Path,
        namespace: Namespace,
        block_size: int,
        hash_function: HashFunction,
        wait_s: float,
        timeout_s: float,
        min_partial_tokens: int,
    ) -> None:
        self.path = path
        self.connection: DaemonConnection | None = None
        self.boot: int = 0
        self.after_writes: Callable[[Callable[[], None]], bool] = lambda _: False
        self._tiers = tiers
        self._namespace = namespace
        self._block_size = block_size
        self._hash = hash_function
        self._timeout_s = timeout_s
        self._has_cold = False
        self._rejected_boot: int | None = None  # of a daemon that has given an impossible answer
        self._evictions_lock = threading.Lock()
        self._ask_evictions_at = 0.0
        self._connect_at = 0.0
        self._evictions_client: DaemonClient | None = None  # the client that was asked last for evictions
        self._eviction_log = 0
        self._eviction_number = 0
        self._is_closing = threading.Event()
        self.blocks: DaemonBlocks = DaemonBlocks(
            tiers,
            lambda: self.connection,
            block_size=block_size,
            hash_function=hash_function,
            wait_s=wait_s,
            timeout_s=timeout_s,
            min_partial_tokens=min_partial_tokens,
        )
        try:
            self._connect()
        except (DaemonGoneError, StoreError) as exc:
            _log.warning("working without the daemon until it is there: %s", exc)
        self._thread = threading.Thread(target=self._maintain, name="tierkv-daemon-connection", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the connection when copies in flight have ended. May be called twice."""
        self._is_closing.set()
        self._thread.join()
        connection, self.connection = self.connection, None
        if connection:
            connection.retire()

    def set_pinned(self, token_bytes: bytes, pinned: bool) -> int:
        """Pin or unpin a prompt's blocks there. Raises DaemonError if the tenant's share is used up."""
        hashes, tokens = self._chain(token_bytes)
        return self._call(Pin(hashes=hashes, tokens=tokens, pinned=pinned), Count, timeout_s=_WARM_TIMEOUT_S).count

    def prefetch(self, token_bytes: bytes) -> int:
        """Announce a prompt. Return how many blocks the daemon will look for; 0 if it cannot."""
        hashes, tokens = self._chain(token_bytes)
        try:
            return self._call(Prefetch(hashes=hashes, tokens=tokens), Count).count
        except DaemonError:
            return 0

    def evict(self, count: int | None) -> int:
        """Evict blocks of this namespace from the warm tier. Raises DaemonError."""
        return self._call(Evict(count=-1 if count is None else count), Count, timeout_s=_WARM_TIMEOUT_S).count

    def evict_everywhere(self, token_bytes: bytes, older_than_s: float | None) -> EvictedBlocks:
        """Evict a prompt's blocks, or all of this namespace, from every tier of the daemon and of its other clients.

        Raises DaemonError.
        """
        hashes, tokens = self._chain(token_bytes)
        message = EvictBlocks(
            namespace=self._namespace.digest,
            hashes=hashes,
            tokens=tokens,
            older_than_s=-1.0 if older_than_s is None else older_than_s,
        )
        return self._call_long(message, EvictedBlocks)

    def flush(self) -> None:
        """Wait until the daemon has put all written blocks on the disk. Without the daemon this does nothing."""
        try:
            self._call_long(Flush(), Done)
        except DaemonError as exc:
            _log.warning("not flushed: %s", exc)

    def save(self, path: Path) -> Saved:
        """Have the namespace's blocks written into a state file. Raises DaemonError."""
        return self._call_long(SaveState(path=os.fspath(path.absolute())), Saved)

    def load(self, path: Path) -> int:
        """Have a state file's blocks found from now on. Raises DaemonError."""
        return self._call_long(LoadState(path=os.fspath(path.absolute())), Count).count

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers; of the warm one, what this namespace has of it."""
        try:
            report = self._call(Status(), StatusReport)
        except DaemonError:
            return {Tier.WARM: TierStats(), **({Tier.COLD: TierStats()} if self._has_cold else {})}
        mine = [tenant for tenant in report.tenants if tenant.namespace == self._namespace.digest.hex()]
        blocks = sum(tenant.warm_blocks for tenant in mine)
        used = blocks * self._tiers.layout.block_bytes
        warm = TierStats(blocks=blocks, used_bytes=used, stored_bytes=used, capacity_bytes=report.warm_bytes)
        if not report.cold:
            return {Tier.WARM: warm}
        cold = TierStats(
            blocks=report.cold["blocks"],
            stored_bytes=report.cold["live_bytes"],
            capacity_bytes=report.cold["quota_bytes"],
        )
        return {Tier.WARM: warm, Tier.COLD: cold}

    def catch_up(self) -> None:
        """Drop this process's hot copies of what was evicted in the daemon since the last call. Raises nothing.

        The daemon notifies each client of an eviction. The client asks what it was, drops its copies, and says so.
        After a new connection the client asks too: it may have missed evictions meanwhile. Without an eviction this
        costs a poll of the socket.
        """
        connection = self.connection
        if connection is None:
            return
        connection.read_waiting()
        client = connection.client
        if self._knows_evictions(client):
            return
        with self._evictions_lock:
            if self._knows_evictions(client) or time.monotonic() < self._ask_evictions_at:
                return
            notified = client.last_eviction
            ask = EvictionsSince(log=self._eviction_log, number=self._eviction_number)
            try:
                answer = connection.call(ask, Evictions)
                if answer.number < notified:  # else each request would ask again
                    raise client.reject_answer(f"it knows of eviction {answer.number} only, and notified of {notified}")
            except DaemonError as exc:
                _log.debug("what was evicted is not known: %s", exc)
                self._ask_evictions_at = time.monotonic() + _RECONNECT_S  # a busy daemon: not again at each request
                return
            done = self._drop_evicted(answer)
            self._evictions_client = client
            self._eviction_log, self._eviction_number = answer.log, answer.number
            # When the daemon hears this, it evicts once more what was written to it meanwhile.
            if not self.after_writes(partial(connection.post, done)):
                connection.post(done)

    def maintain(self) -> None:
        """Drop what was evicted, and what was in use when it was evicted. A thread calls this all the time."""
        self.catch_up()
        with self._tiers.changed:
            if self._tiers.chosen.retry():
                self._tiers.changed.notify_all()

    def _knows_evictions(self, client: DaemonClient) -> bool:
        return client is self._evictions_client and client.last_eviction <= self._eviction_number

    def _drop_evicted(self, answer: Evictions) -> EvictionDone:
        blocks = 0
        stayed: Counter[str] = Counter()
        own = self._tiers.namespace
        with self._tiers.changed:
            self._tiers.reap()
            choices = [self._choice(each) for each in answer.evictions if each.namespace in (b"", own)]
            for choice in choices if answer.is_complete else [Choice()]:
                found = self._tiers.chosen.evict(
                    self._tiers.index.root_entry, choice, self._tiers.layout.block_size * TOKEN_BYTES
                )
                blocks += found.blocks[Tier.HOT]
                stayed += found.stayed
            self._tiers.changed.notify_all()
        return EvictionDone(number=answer.number, blocks=blocks, in_use=stayed[IN_USE], pinned=stayed[PINNED])

    def _choice(self, eviction: Eviction) -> Choice:
        hashes = None
        if (packed := eviction.block_hashes) is not None:
            hashes = frozenset(packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))
        since = None
        if eviction.older_than_s >= 0:
            ago_s = max(0.0, time.time() - eviction.at)
            since = self._tiers.index.now() - ago_s - eviction.older_than_s
        return Choice(tokens=eviction.tokens, hashes=hashes, unused_since=since)

    def _chain(self, token_bytes: bytes) -> tuple[bytes, bytes]:
        chain = iter_chain(self._tiers.index.root, token_bytes, self._block_size, self._hash)
        return b"".join(block_hash for block_hash, _ in chain), token_bytes

    def _require_connection(self) -> DaemonConnection:
        if (connection := self.connection) is None:
            raise DaemonGoneError(f"no daemon answers at {self.path}")
        return connection

    def _call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        return self._require_connection().call(message, expected, timeout_s=timeout_s)

    def _call_long(self, message: Message, expected: type[Answer]) -> Answer:
        return self._require_connection().call_long(message, expected, timeout_s=_LONG_TIMEOUT_S)

    # the connection

    def _connect(self) -> None:
        hello = Hello(
            namespace=self._namespace.digest,
            description=self._namespace.describe(),
            block_bytes=self._tiers.layout.block_bytes,
            client=f"{printable(self._namespace.name, NAME_LIMIT) or 'model'}, process {os.getpid()}",
        )
        client = DaemonClient(self.path, hello, timeout_s=self._timeout_s)
        try:
            if client.boot == self._rejected_boot:
                raise DaemonError(f"the daemon at {self.path} has given an impossible answer", hint="restart it")
            connection = DaemonConnection(client, self._tiers, lost=self._lose)
        except BaseException:
            client.close()
            raise
        with self._tiers.changed:
            if client.boot != self.boot:  # it may have forgotten everything
                for entry in self._tiers.index:
                    entry.in_cold = False
            self.boot = client.boot
            self._has_cold = client.welcome.has_cold
            self.connection = connection

    def _lose(self, connection: DaemonConnection, why: DaemonGoneError) -> None:
        """Work without this connection from now on. A daemon that gave an impossible answer is not used again."""
        with self._tiers.changed:
            if connection.client.has_answered_wrongly:
                self._rejected_boot = connection.client.boot
            if self.connection is connection:
                self.connection = None
                _log.warning("working without the daemon until it is back: %s", why)
        connection.retire()

    def _maintain(self) -> None:
        """Return leases whose copies have ended, follow evictions, and look for a daemon that is not there."""
        while not self._is_closing.wait(_TICK_S):
            try:
                self._maintain_once()
            except Exception:  # noqa: BLE001 - without this thread the cache never finds a daemon again
                _log.exception("maintaining the connection to the daemon failed; next try in %g s", _RECONNECT_S)
                self._is_closing.wait(_RECONNECT_S)

    def _maintain_once(self) -> None:
        with self._tiers.changed:
            self._tiers.reap()
        if connection := self.connection:
            connection.send_returned()
        self.maintain()
        connection = self.connection
        if connection and connection.client.has_hung_up():
            why = connection.client.failure or f"the daemon at {self.path} has ended"
            self._lose(connection, DaemonGoneError(why))
        if self.connection is not None or time.monotonic() < self._connect_at:
            return
        try:
            self._connect()
            _log.info("the daemon at %s is there", self.path)
        except (DaemonError, StoreError) as exc:
            _log.debug("still without the daemon: %s", exc)
            self._connect_at = time.monotonic() + _RECONNECT_S
