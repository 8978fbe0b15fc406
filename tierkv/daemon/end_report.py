"""EndReport: what a daemon leaves behind about its end."""

from __future__ import annotations

import logging
from pathlib import Path

from tierkv.daemon.core import Core
from tierkv.daemon.host import NOT_WRITTEN, LockFile

__all__ = ["EndReport"]

_log = logging.getLogger(__name__)


class EndReport:
    """Reports the end of the daemon: in its log, and in its lock file for `tierkv daemon stop`."""

    def __init__(self, socket_path: Path, lock: LockFile) -> None:
        self.core: Core | None = None
        self._socket = socket_path
        self._lock = lock

    def note_written(self) -> None:
        """Note how many blocks were not written to the store."""
        self._lock.note(f"{NOT_WRITTEN} {self.core.num_writes if self.core else 0}")

    def report_loss(self, deadline_s: float) -> None:
        """Log that the daemon exits while something hangs. Called by a thread of its own."""
        lost = self.core.num_writes if self.core else 0
        self.note_written()
        self._socket.unlink(missing_ok=True)
        _log.error(
            "something has not ended within %g s, such as a disk that does not answer: "
            "the process exits, %d blocks were not written to the store",
            deadline_s,
            lost,
        )
