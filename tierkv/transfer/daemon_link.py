"""One connection to the daemon with the slab mapped through it: what a cache copies from and to."""

from __future__ import annotations

import threading
from array import array
from collections import Counter, deque
from collections.abc import Sequence

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Release
from tierkv.errors import DaemonGoneError
from tierkv.movers.mover import Mover
from tierkv.storage.warm import Slab, WarmPool, slot_stride
from tierkv.transfer.tiers import Tiers

__all__ = ["Link"]


class Link:
    """One connection, the slab mapped through it, and which slots are in use over it. Satisfies `PlaceOwner`.

    A slot is lent to be read, by any number of requests, or it is written by this process, never both: what a daemon
    gives otherwise is refused, because the copy would change a block that is being read.
    """

    def __init__(self, client: DaemonClient, tiers: Tiers) -> None:
        """Map the slab. Raises StoreError."""
        self.client = client
        slab = Slab.attach(client.take_descriptor(), client.welcome.slab_bytes)
        try:
            block_bytes = tiers.layout.block_bytes
            self._warm = WarmPool(block_bytes, slab.size_bytes // slot_stride(block_bytes), slab=slab)
        except BaseException:
            slab.close()
            raise
        try:
            self.mover = Mover(tiers.memory.hot, self._warm)
        except BaseException:
            self._warm.close()
            raise
        self.is_retired = False
        self._lock = threading.Lock()
        self._lent: Counter[int] = Counter()
        self._written: set[int] = set()
        self._is_closed = False
        self._returned: deque[int] = deque()
        self._cursors: deque[int] = deque()

    def lend(self, slots: Sequence[int]) -> None:
        """Note slots that the daemon lent, once for each loan. Raises DaemonGoneError, nothing noted.

        That is if the connection has been closed meanwhile, or a slot is one that this process is writing.
        """
        with self._lock:
            self._require_open()
            if not self._written.isdisjoint(slots):
                raise self.client.disbelieve("it lends a slot that is still being written")
            self._lent.update(slots)

    def give_back(self, slot: int) -> None:
        """End a lease; the daemon hears of it at the next `settle`."""
        with self._lock:  # before that: from then on the daemon may give the slot to be written
            self._lent[slot] -= 1
            if not self._lent[slot]:
                del self._lent[slot]
        self._returned.append(slot)
        self._close_if_unused()

    def begin_writing(self, slots: Sequence[int]) -> None:
        """Note slots that the daemon gave to be written. Raises DaemonGoneError, nothing noted, as `lend` does."""
        with self._lock:
            self._require_open()
            if any(slot in self._lent or slot in self._written for slot in slots):
                raise self.client.disbelieve("it gives a slot to be written that is in use")
            self._written.update(slots)

    def end_writing(self, slots: Sequence[int]) -> None:
        """Forget slots, before the daemon is told that they are written or given up: it may lend them from then on."""
        with self._lock:
            self._written.difference_update(slots)
        self._close_if_unused()

    def end_cursor(self, cursor: int) -> None:
        """Forget a cursor at the next `settle`."""
        if cursor:
            self._cursors.append(cursor)

    def settle(self) -> None:
        """Tell the daemon what has been given back. Raises DaemonGoneError."""
        slots, cursors = array("I"), array("I")
        while self._returned:
            slots.append(self._returned.popleft())
        while self._cursors:
            cursors.append(self._cursors.popleft())
        if (slots or cursors) and not self.is_retired:
            self.client.post(Release(slots=slots.tobytes(), cursors=cursors.tobytes()))

    def retire(self) -> None:
        """Use this connection no more; it is closed when the last copy over it has ended."""
        self.is_retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._lock:
            if not self.is_retired or self._lent or self._written or self._is_closed:
                return
            self._is_closed = True
        self.mover.close()
        self._warm.close()
        self.client.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise DaemonGoneError("the connection to the daemon was closed")
