"""DaemonConnector: keeps a connection to the daemon, and looks for a daemon that is not there.

The daemon ends all leases of a connection when the connection ends. So a connection that has failed is closed only
after the last copy from or to its slots has ended: until then no other client can get such a slot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic

from tierkv.daemon.client import Answer, DaemonClient
from tierkv.daemon.messages import Hello, Message, Status, StatusReport
from tierkv.daemon.protocol import printable
from tierkv.errors import DaemonError, DaemonGoneError, StoreError
from tierkv.storage.warm import WarmPool
from tierkv.transfer.daemon_connection import DaemonConnection, SlabMover
from tierkv.values.block import Tier
from tierkv.values.locks import OwnedCondition
from tierkv.values.namespace import NAME_LIMIT, Namespace
from tierkv.values.stats import TierStats

__all__ = ["RECONNECT_S", "DaemonConnector"]

_log = logging.getLogger(__name__)

RECONNECT_S = 1.0
_TICK_S = 0.1
_LONG_TIMEOUT_S = 600.0  # of flush, save and load, which write to disks


class DaemonConnector(Generic[SlabMover]):
    """The present connection of one namespace, and a thread that replaces it when it is lost. Thread-safe.

    connection: None while no daemon answers. boot: of the daemon that is there, or was. has_cold: whether it has a
    store. open_mover: see `DaemonConnection`. changed: the lock that guards `connection`. connected: called with that
    lock before a connection is used. maintain: called all the time by the thread, without the lock. timeout_s: of
    short calls. daemon_user: see `DaemonClient`. A daemon that gave an impossible answer is not used again.
    """

    def __init__(
        self,
        path: Path,
        namespace: Namespace,
        *,
        open_mover: Callable[[WarmPool], SlabMover] | None,
        changed: OwnedCondition,
        connected: Callable[[DaemonConnection[SlabMover]], None],
        maintain: Callable[[], None],
        timeout_s: float,
        daemon_user: int | None,
    ) -> None:
        self.path = path
        self.namespace = namespace
        self.connection: DaemonConnection[SlabMover] | None = None
        self.boot: int = 0
        self.has_cold: bool = False
        self._open_mover = open_mover
        self._changed = changed
        self._connected = connected
        self._maintain = maintain
        self._timeout_s = timeout_s
        self._daemon_user = daemon_user
        self._rejected_boot: int | None = None  # of a daemon that has given an impossible answer
        self._connect_at = 0.0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tierkv-daemon-connection", daemon=True)

    def start(self) -> None:
        """Connect, and start the thread. A daemon that cannot be reached is no error.

        Raises DaemonError if the daemon refuses this namespace or speaks another version.
        """
        try:
            self._connect()
        except (DaemonGoneError, StoreError) as exc:
            _log.warning("working without the daemon until it is there: %s", exc)
        self._thread.start()

    def close(self, *, is_idle: bool = False) -> None:
        """End the connection when the last slot is returned, or now if `is_idle`: no copy is in flight.

        May be called twice.
        """
        self._is_closing.set()
        if self._thread.is_alive():
            self._thread.join()
        connection, self.connection = self.connection, None
        if connection:
            connection.retire(is_idle=is_idle)

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its answer. Raises DaemonError."""
        return self._require_connection().call(message, expected, timeout_s=timeout_s)

    def call_long(self, message: Message, expected: type[Answer]) -> Answer:
        """Send a request that may take long; see `DaemonConnection.call_long`. Raises DaemonError."""
        return self._require_connection().call_long(message, expected, timeout_s=_LONG_TIMEOUT_S)

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers; of the warm one, what this namespace has of it."""
        try:
            report = self.call(Status(), StatusReport)
        except DaemonError:
            return {Tier.WARM: TierStats(), **({Tier.COLD: TierStats()} if self.has_cold else {})}
        mine = [tenant for tenant in report.tenants if tenant.namespace == self.namespace.digest.hex()]
        blocks = sum(tenant.warm_blocks for tenant in mine)
        used = blocks * self.namespace.layout.block_bytes
        warm = TierStats(blocks=blocks, used_bytes=used, stored_bytes=used, capacity_bytes=report.warm_bytes)
        if not report.cold:
            return {Tier.WARM: warm}
        cold = TierStats(
            blocks=report.cold["blocks"],
            stored_bytes=report.cold["live_bytes"],
            capacity_bytes=report.cold["quota_bytes"],
        )
        return {Tier.WARM: warm, Tier.COLD: cold}

    def _require_connection(self) -> DaemonConnection[SlabMover]:
        if (connection := self.connection) is None:
            raise DaemonGoneError(f"no daemon answers at {self.path}")
        return connection

    def _connect(self) -> None:
        hello = Hello(
            namespace=self.namespace.digest,
            description=self.namespace.describe(),
            block_bytes=self.namespace.layout.block_bytes,
            client=f"{printable(self.namespace.name, NAME_LIMIT) or 'model'}, process {os.getpid()}",
        )
        client = DaemonClient(self.path, hello, timeout_s=self._timeout_s, daemon_user=self._daemon_user)
        try:
            if client.boot == self._rejected_boot:
                raise DaemonError(f"the daemon at {self.path} has given an impossible answer", hint="restart it")
            connection = DaemonConnection(client, hello.block_bytes, open_mover=self._open_mover, lost=self._lose)
        except BaseException:
            client.close()
            raise
        with self._changed:
            self._connected(connection)
            self.boot = client.boot
            self.has_cold = client.welcome.has_cold
            self.connection = connection

    def _lose(self, connection: DaemonConnection[SlabMover], why: DaemonGoneError) -> None:
        """Work without this connection from now on."""
        with self._changed:
            if connection.client.has_answered_wrongly:
                self._rejected_boot = connection.client.boot
            if self.connection is connection:
                self.connection = None
                _log.warning("working without the daemon until it is back: %s", why)
        connection.retire()

    def _run(self) -> None:
        while not self._is_closing.wait(_TICK_S):
            try:
                self._run_once()
            except Exception:  # noqa: BLE001 - without this thread the cache never finds a daemon again
                _log.exception("maintaining the connection to the daemon failed; next try in %g s", RECONNECT_S)
                self._is_closing.wait(RECONNECT_S)

    def _run_once(self) -> None:
        self._maintain()
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
            self._connect_at = time.monotonic() + RECONNECT_S
