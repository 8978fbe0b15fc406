"""Reader: one reader process, seen from the cache that has started it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from tierkv.readers.messages import MAX_MESSAGE_BYTES, READY

__all__ = ["Reader", "ReaderFailedError"]

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MODULE = "tierkv.readers.process"


class ReaderFailedError(Exception):
    """A reader process has ended, does not answer in time, or answers what it must not. Handled by the pool."""


class Reader:
    """A process that answers one request at a time. One thread at a time uses it; any thread may `kill` it.

    It is started by exec, in a session of its own: the interrupt of a terminal does not reach it.
    """

    def __init__(self, memory_fd: int, memory_bytes: int) -> None:
        """Start the process; raises OSError. memory_fd: of the shared memory with the places of blocks."""
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with other:
                arguments = (other.fileno(), memory_fd, memory_bytes, os.getpid())
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(other.fileno(), memory_fd),
                    start_new_session=True,
                    env=_environment(),
                )
        except BaseException:
            self._connection.close()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the process can read. Raises ReaderFailedError."""
        if self._receive(timeout_s) != READY:
            raise ReaderFailedError("its first message is another one")

    def ask(self, request: bytes, data_fd: int, *, timeout_s: float) -> bytes:
        """Send a request with a descriptor of the data file, and return the answer. Raises ReaderFailedError.

        After that, or after an interrupt, the process may still read and write: call `end`.
        """
        try:
            self._connection.settimeout(timeout_s)
            socket.send_fds(self._connection, [request], [data_fd])
        except OSError as exc:
            raise ReaderFailedError(f"it takes no request: {exc}") from exc
        return self._receive(timeout_s)

    def kill(self) -> None:
        """End the process at once, stopped or not. Does not wait; `end` does."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def end(self, timeout_s: float | None = None) -> bool:
        """Kill the process, wait until it has ended, and close the connection.

        Return whether it has: not where the system holds it, as in a read of a disk that does not answer, for longer
        than `timeout_s`. Only then may it still write into the shared memory.
        """
        self.kill()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self._connection.close()
        return True

    def describe_end(self) -> str:
        """Return how the process ended; only after `end`."""
        code = self._process.returncode
        return f"exit status {code}" if code is None or code >= 0 else f"signal {-code}"

    def _receive(self, timeout_s: float) -> bytes:
        try:
            self._connection.settimeout(timeout_s)
            message = self._connection.recv(MAX_MESSAGE_BYTES)
        except TimeoutError as exc:
            raise ReaderFailedError(f"no answer within {timeout_s:g} s") from exc
        except OSError as exc:
            raise ReaderFailedError(f"its connection failed: {exc}") from exc
        if not message:
            raise ReaderFailedError("it has ended")
        return message


def _environment() -> dict[str, str]:
    """Return the environment of a reader: it imports what this process imports, and computes with one thread."""
    paths = [str(Path(each).absolute()) for each in sys.path]  # "" is the current folder
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    environment.update(dict.fromkeys(_ONE_THREAD, "1"))
    return environment
