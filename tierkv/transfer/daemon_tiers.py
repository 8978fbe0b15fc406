"""DaemonTiers: the daemon's warm and cold tiers, as one cache sees them.

The daemon's slab is mapped here, and registered with CUDA: the cache copies from and to it directly. The socket
carries hashes, token ids and slot numbers. Without the daemon its blocks are misses, no request fails, and a thread
looks for the daemon again.
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

from tierkv.daemon.client import DaemonClient
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
    LoadState,
    Pin,
    Prefetch,
    Saved,
    SaveState,
)
from tierkv.errors import DaemonError
from tierkv.index.chosen_eviction import IN_USE, PINNED, Choice
from tierkv.movers.mover import Mover
from tierkv.transfer.daemon_blocks import DaemonBlocks
from tierkv.transfer.daemon_connection import DaemonConnection
from tierkv.transfer.daemon_connector import RECONNECT_S, DaemonConnector
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, HashFunction, Tier, iter_chain
from tierkv.values.namespace import Namespace
from tierkv.values.stats import TierStats

__all__ = ["DaemonTiers"]

_log = logging.getLogger(__name__)

_WARM_TIMEOUT_S = 30.0  # of pin and evict, which may have to wait for the store


class DaemonTiers:
    """Keeps a connection to the daemon, drops hot copies of what is evicted there, and asks for its services.

    Thread-safe. blocks: finds, reads and writes blocks there. after_writes: calls an action when all that is queued to
    be written has been written; returns False if it will not.
    wait_s: how long a request waits for blocks that another process computes. timeout_s: of short calls.
    Raises DaemonError if the daemon refuses this namespace or speaks another version. A daemon that cannot be reached
    is no error.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        path: Path,
        daemon_user: int | None,
        namespace: Namespace,
        block_size: int,
        hash_function: HashFunction,
        wait_s: float,
        timeout_s: float,
        min_partial_tokens: int,
    ) -> None:
        self.after_writes: Callable[[Callable[[], None]], bool] = lambda _: False
        self._tiers = tiers
        self._namespace = namespace
        self._block_size = block_size
        self._hash = hash_function
        self._evictions_lock = threading.Lock()
        self._ask_evictions_at = 0.0
        self._evictions_client: DaemonClient | None = None  # the client that was asked last for evictions
        self._eviction_log = 0
        self._eviction_number = 0
        self._connector: DaemonConnector[Mover] = DaemonConnector(
            path,
            namespace,
            open_mover=lambda warm: Mover(tiers.memory.hot, warm),
            changed=tiers.changed,
            connected=self._note_connected,
            maintain=self.maintain,
            timeout_s=timeout_s,
            daemon_user=daemon_user,
        )
        self.blocks: DaemonBlocks = DaemonBlocks(
            tiers,
            lambda: self.connection,
            block_size=block_size,
            hash_function=hash_function,
            wait_s=wait_s,
            timeout_s=timeout_s,
            min_partial_tokens=min_partial_tokens,
        )
        self._connector.start()

    @property
    def connection(self) -> DaemonConnection[Mover] | None:
        """The present connection; None while no daemon answers."""
        return self._connector.connection

    @property
    def boot(self) -> int:
        """The boot id of the daemon that is there, or was."""
        return self._connector.boot

    def close(self) -> None:
        """End the connection when copies in flight have ended. May be called twice."""
        self._connector.close()

    def set_pinned(self, token_bytes: bytes, pinned: bool, ttl_s: float | None) -> int:
        """Pin or unpin a prompt's blocks there, for a time or for good. Raises DaemonError beyond the share."""
        hashes, tokens = self._chain(token_bytes)
        message = Pin(hashes=hashes, tokens=tokens, pinned=pinned, ttl_s=-1.0 if ttl_s is None else ttl_s)
        return self._connector.call(message, Count, timeout_s=_WARM_TIMEOUT_S).count

    def prefetch(self, token_bytes: bytes) -> int:
        """Announce a prompt. Return how many blocks the daemon will look for; 0 if it cannot."""
        hashes, tokens = self._chain(token_bytes)
        try:
            return self._connector.call(Prefetch(hashes=hashes, tokens=tokens), Count).count
        except DaemonError:
            return 0

    def evict(self, count: int | None) -> int:
        """Evict blocks of this namespace from the warm tier. Raises DaemonError."""
        return self._connector.call(Evict(count=-1 if count is None else count), Count, timeout_s=_WARM_TIMEOUT_S).count

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
        return self._connector.call_long(message, EvictedBlocks)

    def flush(self) -> None:
        """Wait until the daemon has put all written blocks on the disk. Without the daemon this does nothing."""
        try:
            self._connector.call_long(Flush(), Done)
        except DaemonError as exc:
            _log.warning("not flushed: %s", exc)

    def save(self, path: Path) -> Saved:
        """Have the namespace's blocks written into a state file. Raises DaemonError."""
        return self._connector.call_long(SaveState(path=os.fspath(path.absolute())), Saved)

    def load(self, path: Path) -> int:
        """Have a state file's blocks found from now on. Raises DaemonError."""
        return self._connector.call_long(LoadState(path=os.fspath(path.absolute())), Count).count

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers; see `DaemonConnector.sizes`."""
        return self._connector.sizes()

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
                self._ask_evictions_at = time.monotonic() + RECONNECT_S  # a busy daemon: not again at each request
                return
            done = self._drop_evicted(answer)
            self._evictions_client = client
            self._eviction_log, self._eviction_number = answer.log, answer.number
            # When the daemon hears this, it evicts once more what was written to it meanwhile.
            if not self.after_writes(partial(connection.post, done)):
                connection.post(done)

    def maintain(self) -> None:
        """Return leases whose copies have ended; drop what was evicted, and what was in use when it was evicted.

        A thread calls this all the time.
        """
        with self._tiers.changed:
            self._tiers.reap()
        if connection := self.connection:
            connection.send_returned()
        self.catch_up()
        with self._tiers.changed:
            if self._tiers.chosen.retry():
                self._tiers.changed.notify_all()

    def _note_connected(self, connection: DaemonConnection[Mover]) -> None:
        """Forget what another daemon had: it may have forgotten everything. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        if connection.client.boot != self.boot:
            for entry in self._tiers.index:
                entry.in_cold = False

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
