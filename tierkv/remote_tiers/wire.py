"""Wire: a connected socket whose calls end at a deadline, and which takes no memory that the caller did not give."""

from __future__ import annotations

import socket
import struct
import sys

from tierkv.errors import RemoteError
from tierkv.remote_tiers.protocol import Deadline

__all__ = ["HEAD_BYTES", "Wire"]

HEAD_BYTES = 4096
"""Received at once where an answer begins; of a value so many bytes are copied once more."""
_WAIT_BYTES = 2 << 20


class Wire:
    """One connection, used by one thread at a time. After an error it must be closed.

    unread: what was received behind the last answer.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.unread: bytes = b""
        self._socket = connected
        self._may_wait_for_all = sys.platform == "linux" and type(connected) is socket.socket  # TLS cannot

    def close(self) -> None:
        """Close the socket. May be called twice."""
        self._socket.close()

    def is_stale(self) -> bool:
        """Return whether the server has closed the connection, or has sent what nothing asked for."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError as exc:  # TLS has an error of its own for "nothing there"
            return type(exc).__name__ != "SSLWantReadError"
        return True

    def send(self, data: bytes | memoryview, deadline: Deadline) -> None:
        """Send all of some bytes. Raises RemoteError."""
        view = memoryview(data)
        try:
            while view:
                self._socket.settimeout(deadline.left_s())
                view = view[self._socket.send(view) :]
        except OSError as exc:
            raise _lost(exc) from exc

    def receive_line(self, end: bytes, deadline: Deadline, *, most_bytes: int) -> bytes:
        """Receive up to an end mark, and return what stands before it. Raises RemoteError."""
        while (at := self.unread.find(end, 0, most_bytes)) < 0:
            if len(self.unread) >= most_bytes:
                raise RemoteError("the remote tier sends a line that does not end")
            self.receive_more(deadline)
        line, self.unread = self.unread[:at], self.unread[at + len(end) :]
        return line

    def receive_more(self, deadline: Deadline) -> None:
        """Receive what comes, at most HEAD_BYTES, into `unread`. Raises RemoteError."""
        self._socket.settimeout(deadline.left_s())
        try:
            found = self._socket.recv(HEAD_BYTES)
        except OSError as exc:
            raise _lost(exc) from exc
        if not found:
            raise RemoteError("the remote tier has closed the connection")
        self.unread += found

    def receive_into(self, memory: memoryview, deadline: Deadline) -> None:
        """Fill memory, from `unread` first. Raises RemoteError.

        The kernel waits for all of it where it can: few calls are needed then, each with a limit.
        """
        found = min(len(memory), len(self.unread))
        memory[:found] = self.unread[:found]
        self.unread = self.unread[found:]
        try:
            while found < len(memory):
                left_s = deadline.left_s()
                if self._may_wait_for_all:
                    self._socket.settimeout(None)
                    limit = struct.pack("ll", int(left_s), int(left_s % 1 * 1e6) or 1)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                    count = self._socket.recv_into(memory[found : found + _WAIT_BYTES], 0, socket.MSG_WAITALL)
                else:
                    self._socket.settimeout(left_s)
                    count = self._socket.recv_into(memory[found:])
                if not count:
                    raise RemoteError("the remote tier has closed the connection within a value")
                found += count
        except OSError as exc:
            raise _lost(exc) from exc


def _lost(failure: OSError) -> RemoteError:
    if isinstance(failure, TimeoutError | BlockingIOError):
        return RemoteError("the remote tier did not answer in time")
    return RemoteError(f"the connection to the remote tier is lost: {failure.strerror or type(failure).__name__}")
