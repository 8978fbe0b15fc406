"""RemoteEvictions: drops this process's hot copies of what was evicted in the daemon."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Eviction, EvictionDone, Evictions, EvictionsSince
from tierkv.errors import DaemonError
from tierkv.index.chosen_eviction import IN_USE, PINNED, Choice
from tierkv.transfer.daemon_connection import LinkKeeper
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, Tier

__all__ = ["RemoteEvictions"]

_log = logging.getLogger(__name__)


class RemoteEvictions:
    """Follows the daemon's log of evictions. Thread-safe.

    The daemon tells each client of an eviction; the client asks what it was, drops what it has of that, and says so.
    After a new connection it asks too: the daemon, or the connection, may have been away meanwhile.
    after_writes: has something done when all that is queued to be written is; False if it will not.
    """

    def __init__(self, tiers: Tiers, keeper: LinkKeeper) -> None:
        self._tiers = tiers
        self._keeper = keeper
        self._lock = threading.Lock()
        self._client: DaemonClient | None = None  # the one that was asked last
        self._log = 0
        self._number = 0
        self.after_writes: Callable[[Callable[[], None]], bool] = lambda _: False

    def catch_up(self) -> None:
        """Drop what was evicted since the last time. Raises nothing; costs a poll of the socket where nothing was."""
        link = self._keeper.link
        if link is None:
            return
        self._keeper.read_waiting(link)
        client = link.client
        if client is self._client and client.last_eviction <= self._number:
            return
        with self._lock:
            if client is self._client and client.last_eviction <= self._number:
                return
            told = client.last_eviction
            try:
                answer = self._keeper.call_on(link, EvictionsSince(log=self._log, number=self._number), Evictions)
                if answer.number < told:  # it would be asked again at each request
                    raise client.disbelieve(f"it knows of eviction {answer.number} only, having told of {told}")
            except DaemonError as exc:
                _log.debug("what was evicted is not known: %s", exc)
                if client.is_alive:
                    self._client, self._number = client, client.last_eviction
                return
            done = self._apply(answer)
            self._client, self._log, self._number = client, answer.log, answer.number
            # The daemon looks once more for what was written to it meanwhile, when it has heard this.
            if not self.after_writes(partial(self._keeper.post, link, done)):
                self._keeper.post(link, done)

    def retry(self) -> None:
        """Drop what was in use when it was evicted."""
        with self._tiers.changed:
            if self._tiers.chosen.retry():
                self._tiers.changed.notify_all()

    def _apply(self, answer: Evictions) -> EvictionDone:
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
