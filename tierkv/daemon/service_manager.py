"""ServiceManager: reports to systemd that a service is ready, reloads, stops, and is alive.

A few datagrams to the socket that systemd names in NOTIFY_SOCKET. Source: sd_notify(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["ServiceManager"]


class ServiceManager:
    """Sends the states of a service. Without an address it does nothing. No call blocks or raises.

    watchdog_s: `alive` sends at most twice in that time; 0 for never.
    """

    def __init__(self, address: str = "", *, watchdog_s: float = 0.0) -> None:
        self._address = address
        self._watchdog_s = watchdog_s
        self._alive_at = 0.0

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> ServiceManager:
        """Return the service manager that started this process, if one did and waits for notifications."""
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(watchdog_us) / 1e6 if watchdog_us.isdecimal() and is_ours else 0.0
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog_s=watchdog_s)

    def ready(self, status: str) -> None:
        """Say that the service is ready, or that it has reloaded."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """Say that the service reloads; `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Say that the service works, if that is due."""
        now = time.monotonic()
        if self._watchdog_s and now - self._alive_at >= self._watchdog_s / 2:
            self._alive_at = now
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.setblocking(False)
            connection.sendto(state.encode(), address)
