"""One connection to the daemon with the slab mapped through it: what a cache copies from and to."""

from __future__ import annotations

import threading
from array import array
from collections import deque

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Release
from tierkv.errors import DaemonGoneError
from tierkv.movers.mover import Mover
from tierkv.storage.warm import Slab, WarmPool, slot_stride
from tierkv.tiers import Tiers

__all__ = ["Link"]


class Link:
    """One connection, the slab mapped through it, and how many slots are lent over it. Satisfies `PlaceOwner`."""

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
            self.mover = Mover(tiers.hot, self._warm)
        except BaseException:
            self._warm.close()
            raise
        self.is_retired = False
        self._lock = threading.Lock()
        self._num_lent = 0
        self._is_closed = False
        self._returned: deque[int] = deque()
        self._cursors: deque[int] = deque()

    def lend(self, count: int) -> None:
        """Count slots that the daemon lent. Raises DaemonGoneError if the connection has been closed meanwhile."""
        with self._lock:
            if self._is_closed:
                raise DaemonGoneError("the connection to the daemon was closed")
            self._num_lent += count

    def give_back(self, slot: int) -> None:
        """End a lease; the daemon hears of it at the next `settle`."""
        self._returned.append(slot)
        self.end_loan()

    def end_loan(self) -> None:
        """Count a slot that is no longer used, without telling the daemon."""
        with self._lock:
            self._num_lent -= 1
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
            if not self.is_retired or self._num_lent or self._is_closed:
                return
            self._is_closed = True
        self.mover.close()
        self._warm.close()
        self.client.close()
