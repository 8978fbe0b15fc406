"""Ending: takes the signals that stop the daemon, and ends the process where it does not end by itself in time.

A thread takes the signals: the loop may be inside a call that hangs, on a disk that does not answer for instance.
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

_LAST_WORDS_S = 2.0


class Ending:
    """A context around the daemon's life; `begin`, SIGTERM or SIGINT start its end.

    deadline_s: so long may the end take. Then `last_words` is called (it says what is lost, and may hang as well), and
    the process exits with code 1 whatever its threads do. leave: os._exit, but for tests.
    """

    def __init__(
        self, deadline_s: float, *, last_words: Callable[[float], None], leave: Callable[[int], Any] = os._exit
    ) -> None:
        self._deadline_s = deadline_s
        self._last_words = last_words
        self._leave = leave
        self._stop: Callable[[], None] = lambda: None
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

    def watch(self, stop: Callable[[], None]) -> None:
        """Take SIGTERM and SIGINT from now on. stop: called by another thread when the end begins. Main thread only."""
        self._stop = stop
        self._thread = threading.Thread(target=self._run, name="tierkv-ending", daemon=True)
        self._thread.start()
        self._wakeup_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):  # the handler does nothing: the descriptor wakes the thread
            self._handlers[number] = signal.signal(number, lambda *_: None)

    def begin(self) -> None:
        """Begin the end. For any thread; may be called twice."""
        try:
            self._wake.send(b"\0")
        except OSError:
            _log.debug("the end has begun already")

    def _run(self) -> None:
        self._woken.recv(1)
        if self._ended.is_set():
            return
        self._stop()
        if self._ended.wait(self._deadline_s):
            return
        speaker = threading.Thread(target=self._last_words, args=(self._deadline_s,), daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_S)
        self._leave(1)
