"""DaemonLoader: finds blocks in the daemon's tiers, and copies them from its shared memory to the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from tierkv.block_store.daemon_chains import Connection, DaemonChains
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import Origin
from tierkv.block_store.loader import Loader
from tierkv.block_store.misses import log_misses
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.transfers import Load
from tierkv.daemon.messages import NO_SLOT, Fetch, Fetched
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError
from tierkv.movers.ready import Ready
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.daemon_connection import miss_reason
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["DaemonLoader"]

_log = logging.getLogger(__name__)

_WAVE_BLOCKS = 16
_FETCH_S = 30.0
_POLL_S = 0.05


class DaemonReservation(Reservation):
    """Blocks that one connection leases. They stay as they are when the daemon ends: the memory stays mapped.

    cursor: names the prompt in Fetch; 0 if the daemon keeps none. first: number of the first block in it.
    """

    def __init__(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[int | None],
        connection: Connection,
        *,
        cursor: int,
        first: int,
        changed: OwnedCondition,
    ) -> None:
        super().__init__(keys, slots, connection.slots, changed=changed, unpin=connection.return_leases)
        self.connection: Connection = connection
        self.cursor: int = cursor
        self.first: int = first

    def drop(self, num_blocks: int) -> None:
        """Hold only so many leading blocks from now on, and without any no cursor. The caller holds the lock."""
        assert self._changed.is_owned()
        super().drop(num_blocks)
        if not self.num_blocks:
            self.end_cursor()

    def end_cursor(self) -> None:
        """Have nothing fetched any more. The caller holds the lock."""
        assert self._changed.is_owned()
        self.connection.end_cursor(self.cursor)
        self.cursor = 0


class DaemonLoader(Loader):
    """Leases warm blocks and has cold ones fetched. No method raises for a daemon that is gone: it has no blocks.

    connected: returns the present connection. room_wait_s: how long a load waits until this client may lease a block.
    """

    def __init__(
        self,
        connected: Callable[[], Connection | None],
        chains: DaemonChains,
        layout: BlockLayout,
        stats: StatsRecorder,
        changed: OwnedCondition,
        *,
        room_wait_s: float,
    ) -> None:
        super().__init__(layout, stats, changed)
        self._connected = connected
        self._chains = chains
        self._room_wait_s = room_wait_s
        self._nothing = np.empty((0, layout.block_bytes), dtype=np.uint8)

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks are there."""
        chain = self._chains.leading(keys)
        connection = self._connected()
        if connection is None or not chain:
            return 0
        try:
            answer = connection.match(self._chains.match(chain))
        except DaemonError as exc:
            _log.debug("a lookup is a miss: %s", exc)
            return 0
        num_found = len(answer.slots) // 4
        log_misses(len(keys), num_found, miss_reason(answer.miss))
        return num_found

    def reserve(self, keys: Sequence[BlockKey], start: int) -> Reservation:
        """Lease blocks; see `BlockStore.reserve`."""
        chain = self._chains.leading(keys)
        num_wanted = max(0, len(keys) - start)
        connection = self._connected()
        reason = MissReason.ABSENT if connection else MissReason.DAEMON
        found: Reservation | None = None
        if connection and start < len(chain):
            try:
                found, reason = self._lease(connection, chain, start)
            except DaemonError as exc:
                _log.debug("%d blocks are misses: %s", num_wanted, exc)
                reason = MissReason.DAEMON
        num_found = found.num_blocks if found else 0
        num_warm = found.num_held if found else 0
        with self.changed:
            self.reap()
            self.count_request(num_wanted, num_warm, num_found, reason if num_found < num_wanted else None)
        log_misses(num_wanted, num_found, reason)
        if found is None:
            return Reservation([], [], self._nothing, changed=self.changed, unpin=lambda _: None)
        if num_warm < num_found:
            found.start_reading(self.submit(self._read, found))
        return found

    def _lease(self, connection: Connection, chain: Sequence[BlockKey], start: int) -> tuple[Reservation, MissReason]:
        """Ask for blocks, and lease what is warm. Return them, and why the next one is missing. Raises DaemonError."""
        connection.send_returned()
        answer = connection.match(self._chains.match(chain, start, lease=True))
        slots = [None if slot == NO_SLOT else slot for slot in split_numbers(answer.slots)]
        try:
            connection.lease([slot for slot in slots if slot is not None])
        except DaemonError:
            connection.end_cursor(answer.cursor)
            raise
        keys = chain[start : start + len(slots)]
        found = DaemonReservation(keys, slots, connection, cursor=answer.cursor, first=start, changed=self.changed)
        found.num_at_once = _WAVE_BLOCKS
        found.origin = Origin.DISK if None in slots else Origin.WARM  # the daemon's page cache is not asked
        if None not in slots:
            with self.changed:
                found.end_cursor()
        return found, miss_reason(answer.miss) or MissReason.ABSENT

    def load_slowly(self, load: Load, reservation: Reservation, targets: Placement, after: Ready) -> None:
        """Load blocks of which some are still being read, or are not read yet, on a thread of its own.

        The others must not hold the room that the next ones need: they are released when they have been copied.
        """
        assert isinstance(reservation, DaemonReservation)
        reservation.wait()
        with self.changed:
            num_keys, slots = reservation.num_blocks, reservation.ready_slots()
        if slots and not self.copy(load, reservation, targets, slots, after):
            return
        if load.num_loaded == num_keys:
            return
        load.synchronize_parts()
        with self.changed:
            reservation.release_slots()
        while load.num_loaded < num_keys and not self.is_closing:
            if not self._load_wave(load, reservation, targets, after, most=num_keys - load.num_loaded):
                return

    def _load_wave(
        self, load: Load, reservation: DaemonReservation, targets: Placement, after: Ready, *, most: int
    ) -> bool:
        """Fetch and copy the next few blocks. Return False if one of them cannot be had."""
        count = min(most, _WAVE_BLOCKS)
        deadline = time.monotonic() + self._room_wait_s
        while True:
            slots, failure = self._fetch(reservation, load.num_loaded, count)
            if slots or failure is not MissReason.NO_ROOM or self.is_closing or time.monotonic() > deadline:
                break
            with self.changed:
                self.changed.wait(_POLL_S)
        try:
            if slots and not self.copy(load, reservation, targets, slots, after):
                return False
            load.synchronize_parts()
        finally:
            reservation.connection.return_leases(slots)
        if failure and not (slots and failure is MissReason.NO_ROOM):
            self.count_miss(failure)
            return False
        return True

    def _read(self, reservation: DaemonReservation) -> None:
        """Have the cold blocks of a reservation fetched, as far as there is room, on a thread of its own."""
        while not self.is_closing and self._read_wave(reservation):
            pass

    def _read_wave(self, reservation: DaemonReservation) -> bool:
        """Have a few blocks fetched. Return whether to go on: not after a failure, and not without room."""
        with self.changed:
            wanted = _first_run(reservation.wanted())[:_WAVE_BLOCKS]
        if not wanted:
            return False
        first = wanted[0][0]
        slots, failure = self._fetch(reservation, first, len(wanted))
        with self.changed:
            unused = [
                slot for (at, key), slot in zip(wanted, slots, strict=False) if not reservation.put(at, key, slot)
            ]
            if failure and failure is not MissReason.NO_ROOM:
                reservation.drop(first + len(slots))
            reservation.connection.return_leases(unused)
        if failure and failure is not MissReason.NO_ROOM:
            self.count_miss(failure)
        return failure is None

    def _fetch(self, reservation: DaemonReservation, first: int, count: int) -> tuple[Sequence[int], MissReason | None]:
        """Have blocks of a reservation fetched and leased. Return their slots, and why the next one did not come."""
        connection = reservation.connection
        connection.send_returned()
        try:
            ask = Fetch(cursor=reservation.cursor, first=reservation.first + first, count=count)
            answer = connection.call_long(ask, Fetched, timeout_s=_FETCH_S)
            slots = split_numbers(answer.slots)
            connection.lease(slots)
        except DaemonError as exc:
            _log.debug("%d blocks did not come: %s", count, exc)
            return (), MissReason.DAEMON
        with self.changed:
            self.stats.bytes_out[Tier.COLD] += len(slots) * self.layout.block_bytes
        if len(slots) == count:
            return slots, None
        return slots, miss_reason(answer.miss) or MissReason.ABSENT


def _first_run(wanted: Sequence[tuple[int, BlockKey]]) -> Sequence[tuple[int, BlockKey]]:
    """Return the leading blocks whose positions follow each other."""
    if not wanted:
        return wanted
    first = wanted[0][0]
    end = next((i for i, (at, _) in enumerate(wanted) if at != first + i), len(wanted))
    return wanted[:end]
