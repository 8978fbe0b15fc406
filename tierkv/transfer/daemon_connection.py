"""DaemonConnection: one connection to the daemon, and its slab, mapped: its user copies from and to it."""

from __future__ import annotations

import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from tierkv.daemon.client import Answer, DaemonClient
from tierkv.daemon.local_leases import LocalLeases
from tierkv.daemon.messages import Found, Match, Message, Release, Used
from tierkv.errors import DaemonGoneError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.outcomes import MissReason
from tierkv.storage.warm import Slab, WarmPool, slot_stride

__all__ = ["DaemonConnection", "SlabMover", "miss_reason"]


class _Closable(Protocol):
    def close(self) -> None:
        """Wait for all copies, and use the slab no more."""


SlabMover = TypeVar("SlabMover", bound=_Closable)


def miss_reason(miss: str) -> MissReason | None:
    """Return why the daemon has not found a block; None if it does not say."""
    try:
        return MissReason(miss) if miss else None
    except ValueError:
        return MissReason.DAEMON


class DaemonConnection(Generic[SlabMover]):
    """One connection, the slab mapped through it, and the slots in use over it. Thread-safe; satisfies `PlaceOwner`.

    A slot is leased to be read, by any number of requests, or this process writes it, never both. An answer that says
    otherwise is refused, because the copy would change a block that is being read.
    open_mover: returns what copies from and to the slab; None for a user that only looks up, and maps no slab.
    lost: called with this connection when a call has found that the daemon is gone.
    """

    def __init__(
        self,
        client: DaemonClient,
        block_bytes: int,
        *,
        open_mover: Callable[[WarmPool], SlabMover] | None,
        lost: Callable[[DaemonConnection[SlabMover], DaemonGoneError], None],
    ) -> None:
        """Map the slab. Raises StoreError; then the caller closes the client."""
        self.client = client
        self.is_retired: bool = False
        self._lost = lost
        self._lock = threading.Lock()
        self._leased: Counter[int] = Counter()
        self._written: set[int] = set()
        self._is_closed = False
        self._returned = array("I")
        self._cursors = array("I")
        self._warm: WarmPool | None = None
        self._mover: SlabMover | None = None
        self._local: LocalLeases | None = None
        if open_mover is None:
            os.close(client.take_descriptor())  # it would keep the memory of a daemon that has ended
            return
        slab = Slab.attach(client.take_descriptor(), client.welcome.slab_bytes, read_only=client.welcome.is_member)
        try:
            self._warm = WarmPool(block_bytes, slab.size_bytes // slot_stride(block_bytes), slab=slab)
        except BaseException:
            slab.close()
            raise
        try:
            self._mover = open_mover(self._warm)
        except BaseException:
            self._warm.close()
            raise
        self._local = self._open_local()

    def _open_local(self) -> LocalLeases | None:
        """Return the leases that need no question, if the daemon and this system have them; close their descriptors."""
        client, descriptors = self.client, self.client.flag_descriptors
        client.flag_descriptors = []
        if not descriptors:
            return None
        try:
            return LocalLeases.open(
                descriptors,
                num_slots=client.welcome.flag_slots,
                root=client.namespace,
                block_size=client.block_size,
                most=client.welcome.most_flags,
            )
        except StoreError as exc:
            raise client.reject_answer(str(exc)) from exc
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @property
    def is_reader(self) -> bool:
        """Whether blocks can be read over this connection, and none be written."""
        return self.client.welcome.is_member

    @property
    def mover(self) -> SlabMover:
        """What copies from and to the slab."""
        assert self._mover is not None, "a connection that only looks up maps no slab"
        return self._mover

    @property
    def slots(self) -> Bytes:
        """The slab as [slots, block bytes]. A caller that keeps it while it holds slots keeps the memory too."""
        assert self._warm is not None, "a connection that only looks up maps no slab"
        return self._warm.slots

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its answer. Raises DaemonError."""
        try:
            return self.client.call(message, expected, timeout_s=timeout_s)
        except DaemonGoneError as exc:
            self._lost(self, exc)
            raise

    def match(self, asked: Match) -> Found:
        """Return what there is of a prompt; does not ask the daemon if it is known and still there. Raises DaemonError.

        The slots that are leased are for the caller to note, by `lease`.
        """
        local = self._local
        if local is None:
            return self.call(asked, Found)
        if self.client.is_alive and not self.is_retired and (found := local.match(asked)):
            return found
        found = self.call(asked, Found)
        local.learn(asked, found)
        return found

    def call_long(self, message: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
        """Do as `call`, for what may take long: it fails soon after the daemon has stopped. Raises DaemonError."""
        try:
            return self.client.call_long(message, expected, timeout_s=timeout_s)
        except DaemonGoneError as exc:
            self._lost(self, exc)
            raise

    def post(self, message: Message) -> None:
        """Send a message that has no answer. A daemon that is gone is no error: it needs none."""
        try:
            self.client.post(message)
        except DaemonGoneError as exc:
            self._lost(self, exc)

    def read_waiting(self) -> None:
        """Read what the daemon has sent without being asked. A daemon that is gone is no error."""
        try:
            self.client.read_waiting()
        except DaemonGoneError as exc:
            self._lost(self, exc)

    def lease(self, slots: Sequence[int]) -> None:
        """Note slots that the daemon has leased, once for each lease.

        Raises DaemonGoneError, with nothing noted, if the connection was closed meanwhile or this process is writing
        one of the slots.
        """
        with self._lock:
            self._require_open()
            if not self._written.isdisjoint(slots):
                raise self.client.reject_answer("it leases a slot that is still being written")
            self._leased.update(slots)

    def return_lease(self, slot: int) -> None:
        """End a lease. The next `send_returned` notifies the daemon."""
        self.return_leases((slot,))

    def return_leases(self, slots: Iterable[int]) -> None:
        """End leases, once for each time that a slot is named."""
        with self._lock:
            if self._is_closed:
                return
            slots = list(slots)
            for slot in slots:
                self._leased[slot] -= 1
                if not self._leased[slot]:
                    del self._leased[slot]
            self._returned += self._local.end(slots) if self._local else array("I", slots)
        self._close_if_unused()

    def begin_writing(self, slots: Sequence[int]) -> None:
        """Note slots that the daemon gave to be written. Raises DaemonGoneError as `lease` does."""
        with self._lock:
            self._require_open()
            if self.client.welcome.is_member:
                raise self.client.reject_answer("it gives a member a slot to be written")
            if any(slot in self._leased or slot in self._written for slot in slots):
                raise self.client.reject_answer("it gives a slot to be written that is in use")
            self._written.update(slots)

    def end_writing(self, slots: Sequence[int]) -> None:
        """Forget slots. Call it before the daemon is notified that they are written: from then on it may lease them."""
        with self._lock:
            self._written.difference_update(slots)
        self._close_if_unused()

    def end_cursor(self, cursor: int) -> None:
        """End a cursor. The next `send_returned` notifies the daemon."""
        if cursor:
            with self._lock:
                self._cursors.append(cursor)

    def send_returned(self) -> None:
        """Notify the daemon which leases and cursors have ended."""
        with self._lock:  # several threads call this
            slots, cursors = self._returned, self._cursors
            self._returned, self._cursors = array("I"), array("I")
        if self._local and not self.is_retired and (used := self._local.take_used()):
            self.post(Used(slots=used.tobytes()))
        if (slots or cursors) and not self.is_retired:
            self.post(Release(slots=slots.tobytes(), cursors=cursors.tobytes()))

    def retire(self, *, is_idle: bool = False) -> None:
        """Use this connection no more. It is closed when the last copy from or to its slots has ended.

        is_idle: none is in flight, though slots may be leased.
        """
        self.is_retired = True
        if is_idle:
            with self._lock:
                self._leased.clear()
                self._written.clear()
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._lock:
            if not self.is_retired or self._leased or self._written or self._is_closed:
                return
            self._is_closed = True
        if self._mover is not None and self._warm is not None:
            self._mover.close()
            self._warm.close()
        self.client.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise DaemonGoneError("the connection to the daemon was closed")
