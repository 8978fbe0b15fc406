"""Ending: receives the signals of the daemon, and ends the process if it does not end by itself in time.

A thread receives the signals: the loop may be inside a call that hangs, such as one on a disk that does not answer.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Ending"]

_log = logging.getLogger(__name__)

_REPORT_S = 2.0


class Ending:
    """A context around the daemon's life. `begin`, SIGTERM or SIGINT start its end. reason: what did.

    deadline_s: time for the end. After it `report_loss` is called, which may hang as well, and the process exits with
    code 1 whatever its threads do. leave: os._exit, but for tests.
    """

    def __init__(
        self, deadline_s: float, *, report_loss: Callable[[float], None], leave: Callable[[int], Any] = os._exit
    ) -> None:
        self._deadline_s = deadline_s
        self._report_loss = report_loss
        self._leave = leave
        self.reason: str = "asked by a client"
        self._stop: Callable[[], None] = lambda: None
        self._reload: Callable[[], None] | None = None
        self._ended = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._handlers: dict[int, Any] = {}
        self._wakeup_fd = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_fd)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if self._thread:
            self.begin()
            self._thread.join()
        self._wake.close()
        self._woken.close()

    def handle_signals(self, stop: Callable[[], None], *, reload: Callable[[], None] | None = None) -> None:
        """Handle SIGTERM and SIGINT from now on, and SIGHUP if there is something to reload. Main thread only.

        Another thread calls `stop` when the end begins, and `reload` at each SIGHUP.
        """
        self._stop, self._reload = stop, reload
        self._thread = threading.Thread(target=self._run, name="tierkv-ending", daemon=True)
        self._thread.start()
        self._wakeup_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            *([signal.SIGHUP] if reload else []),
        ):  # the handler does nothing: the descriptor wakes the thread
            self._handlers[number] = signal.signal(number, lambda *_: None)

    def begin(self) -> None:
        """Begin the end. Any thread may call this, and twice."""
        try:
            self._wake.send(b"\0")
        except OSError:
            _log.debug("the end has begun already")

    def _run(self) -> None:
        while (number := self._woken.recv(1)[0]) == signal.SIGHUP and not self._ended.is_set():
            try:
                if self._reload:
                    self._reload()
            except Exception:  # noqa: BLE001 - the outermost loop of its thread: the next signal comes
                _log.exception("the reload failed")
        if self._ended.is_set():
            return
        if number:
            self.reason = signal.Signals(number).name
        self._stop()
        if self._ended.wait(self._deadline_s):
            return
        reporter = threading.Thread(target=self._report_loss, args=(self._deadline_s,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_S)
        self._leave(1)
