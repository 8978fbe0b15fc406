"""Operation: what the daemon says of its start, its reloads and its end, in its log and to systemd."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.service_manager import ServiceManager
from tierkv.values.log_event import LogEvent

__all__ = ["NO_MANAGER", "Operation"]

NO_MANAGER: Final = ServiceManager()

_log = logging.getLogger(__name__)


class Operation:
    """The daemon's life as its operator sees it. reload: reopens the log, for example; None for no reload."""

    def __init__(self, reload: Callable[[], None] | None, manager: ServiceManager, version: str) -> None:
        self.manager = manager
        self.version = version
        self._reload = reload
        self._status = ""

    @property
    def reload_at_signal(self) -> Callable[[], None] | None:
        """What a thread calls at SIGHUP; None if that signal is not handled."""
        return self._reload_and_say if self._reload else None

    def note_start(self, config: DaemonConfig, *, metrics_port: int | None) -> None:
        """Say that clients may connect. metrics_port: where the metrics are, also if any free port was asked for."""
        self._status = f"serving on {config.socket}"
        _log.info(
            LogEvent(
                "serving",
                version=self.version,
                pid=os.getpid(),
                socket=config.socket,
                store=config.store or "",
                warm_bytes=config.warm_bytes,
                metrics_port="" if metrics_port is None else metrics_port,
            )
        )
        self.manager.ready(self._status)

    def note_stop(self, reason: str, *, uptime_s: float) -> None:
        """Say that the daemon ends. reason: the signal, or that a client asked for it."""
        self.manager.stopping()
        _log.info(LogEvent("stopping", reason=reason, uptime_s=round(uptime_s, 3)))

    def _reload_and_say(self) -> None:
        self.manager.reloading()
        if self._reload:
            self._reload()
        _log.info(LogEvent("reloaded", pid=os.getpid()))
        self.manager.ready(self._status)
