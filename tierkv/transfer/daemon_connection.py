"""LinkKeeper: keeps a link to the daemon, and looks for the daemon again where there is none."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tierkv.daemon.client import Answer, DaemonClient
from tierkv.daemon.messages import Hello, Message
from tierkv.daemon.protocol import printable
from tierkv.errors import DaemonError, DaemonGoneError, StoreError
from tierkv.transfer.daemon_link import Link
from tierkv.transfer.tiers import Tiers
from tierkv.values.namespace import NAME_LIMIT, Namespace

__all__ = ["LinkKeeper"]

_log = logging.getLogger(__name__)

_RECONNECT_S = 1.0
_TICK_S = 0.1


class LinkKeeper:
    """The present link, if there is one, and the thread that sees to it. Thread-safe.

    timeout_s: of short calls. Raises DaemonError if the daemon refuses this namespace or speaks another version; one
    that cannot be reached is no error.
    """

    def __init__(self, tiers: Tiers, *, path: Path, namespace: Namespace, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.link: Link | None = None
        self.boot = 0
        self.has_cold = False  # of the daemon that is there, or was
        self._lying_boot: int | None = None  # of a daemon that has answered what cannot be
        self.maintain: Callable[[], None] = lambda: None  # called again and again by the thread
        self._tiers = tiers
        self._namespace = namespace
        self._is_closing = threading.Event()
        try:
            self._connect()
        except (DaemonGoneError, StoreError) as exc:
            _log.warning("working without the daemon until it is there: %s", exc)
        self._thread = threading.Thread(target=self._keep, name="tierkv-daemon-link", daemon=True)
        self._thread.start()

    @property
    def socket_bytes(self) -> tuple[int, int]:
        """Bytes (sent, received) over the present link."""
        link = self.link
        return (link.client.bytes_sent, link.client.bytes_received) if link else (0, 0)

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Ask the daemon over the present link. Raises DaemonError; DaemonGoneError where there is none."""
        link = self.link
        if link is None:
            raise DaemonGoneError(f"no daemon answers at {self.path}")
        return self.call_on(link, message, expected, timeout_s=timeout_s)

    def call_on(
        self, link: Link, message: Message, expected: type[Answer], *, timeout_s: float | None = None
    ) -> Answer:
        """Ask the daemon over one link: that which slots or cursors are named of. Raises DaemonError."""
        try:
            return link.client.call(message, expected, timeout_s=self.timeout_s if timeout_s is None else timeout_s)
        except DaemonGoneError as exc:
            self._lose(link, exc)
            raise

    def call_long(self, message: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
        """Ask for what may take long, as long as the daemon is alive. Raises DaemonError."""
        link = self.link
        if link is None:
            raise DaemonGoneError(f"no daemon answers at {self.path}")
        try:
            return link.client.call_long(message, expected, timeout_s=timeout_s)
        except DaemonGoneError as exc:
            self._lose(link, exc)
            raise

    def read_waiting(self, link: Link) -> None:
        """Take in what the daemon has sent unasked."""
        try:
            link.client.read_waiting()
        except DaemonGoneError as exc:
            self._lose(link, exc)

    def post(self, link: Link, message: Message) -> None:
        """Send what has no answer; a daemon that has gone knows without."""
        try:
            link.client.post(message)
        except DaemonGoneError as exc:
            self._lose(link, exc)

    def settle(self) -> None:
        """Tell the daemon what has been given back. The caller does not hold the lock."""
        assert not self._tiers.changed.is_owned()
        link = self.link
        if link:
            try:
                link.settle()
            except DaemonGoneError as exc:
                self._lose(link, exc)

    def close(self) -> None:
        """End the link when copies in flight have ended. May be called twice."""
        self._is_closing.set()
        self._thread.join()
        link, self.link = self.link, None
        if link:
            link.retire()

    def _lose(self, link: Link, why: DaemonError) -> None:
        """Work without this link from now on; for good, until another daemon is there, if what it said was false."""
        with self._tiers.changed:
            if link.client.has_lied:
                self._lying_boot = link.client.boot
            if self.link is link:
                self.link = None
                _log.warning("working without the daemon until it is back: %s", why)
        link.retire()

    def _connect(self) -> None:
        hello = Hello(
            namespace=self._namespace.digest,
            description=self._namespace.describe(),
            block_bytes=self._tiers.layout.block_bytes,
            client=f"{printable(self._namespace.name, NAME_LIMIT) or 'model'}, process {os.getpid()}",
        )
        client = DaemonClient(self.path, hello, timeout_s=self.timeout_s)
        try:
            if client.boot == self._lying_boot:
                raise DaemonError(f"the daemon at {self.path} has answered what cannot be", hint="restart it")
            link = Link(client, self._tiers)
        except BaseException:
            client.close()
            raise
        with self._tiers.changed:
            if client.boot != self.boot:  # it may have forgotten everything
                for entry in self._tiers.index:
                    entry.in_cold = False
            self.boot = client.boot
            self.has_cold = client.welcome.has_cold
            self.link = link

    def _keep(self) -> None:
        """Give back what copies on a GPU have ended with, and look for a daemon that is not there."""
        next_try = 0.0
        while not self._is_closing.wait(_TICK_S):
            with self._tiers.changed:
                self._tiers.reap()
            self.settle()
            self.maintain()
            link = self.link
            if link and link.client.has_hung_up():
                self._lose(link, DaemonGoneError(link.client.failure or f"the daemon at {self.path} has ended"))
            if self.link is not None or time.monotonic() < next_try:
                continue
            try:
                self._connect()
                _log.info("the daemon at %s is there", self.path)
            except (DaemonError, StoreError) as exc:
                _log.debug("still without the daemon: %s", exc)
                next_try = time.monotonic() + _RECONNECT_S
