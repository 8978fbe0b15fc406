"""RedisWire: sends commands of Redis' protocol RESP2 over a connected socket, and receives the answers.

redis-py connects: name, TLS, password. It is not used for values: it copies each of them two times or more, which costs
1.0 to 1.8 CPU seconds a GB. Here a value is received into the memory that the caller keeps.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Sequence

import numpy as np

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.storage.codec import Bytes

__all__ = ["RedisWire"]

_HEAD_BYTES = 4096  # received at once where an answer begins; of a value so many bytes are copied once more
_LINE_BYTES = 512  # no answer that is asked for here has a longer line
_WAIT_BYTES = 2 << 20
_MOST_DIGITS = 19
_LONG_BYTES = 16 << 10  # of a value that is sent from its own memory


class RedisWire:
    """One connection, used by one thread at a time. After an error, other than a refusal, it must be closed."""

    def __init__(self, connected: socket.socket, memory: RecordMemory) -> None:
        self._socket = connected
        self._memory = memory
        self._may_wait_for_all = sys.platform == "linux" and type(connected) is socket.socket  # TLS cannot
        self._unread = b""
        self._num_pending = 0  # answers that have not begun to come

    @property
    def is_in_step(self) -> bool:
        """Whether all answers have been received: then the connection can be used again, also after a refusal."""
        return not self._num_pending and not self._unread

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

    def send(self, commands: Sequence[Sequence[bytes | Bytes]], deadline: Deadline) -> None:
        """Send commands, each a name and its arguments. Long arguments are sent from their own memory."""
        parts: list[bytes] = []
        self._num_pending += len(commands)
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            for argument in command:
                if isinstance(argument, bytes):
                    parts.append(b"$%d\r\n%s\r\n" % (len(argument), argument))
                elif argument.size < _LONG_BYTES:
                    parts.append(b"$%d\r\n%s\r\n" % (argument.size, argument.tobytes()))
                else:
                    parts.append(b"$%d\r\n" % argument.size)
                    self._send(b"".join(parts), deadline)
                    self._send(argument.data, deadline)
                    parts = [b"\r\n"]
        self._send(b"".join(parts), deadline)

    def number(self, deadline: Deadline, *, most: int) -> int:
        """Receive a number from 0 to `most`. Raises RemoteError, RemoteRefusedError."""
        kind, text = self._line(deadline)
        if kind != b":" or not text.isdigit() or len(text) > _MOST_DIGITS or int(text) > most:
            raise _unexpected(kind, text)
        return int(text)

    def status(self, deadline: Deadline) -> bytes | None:
        """Receive a line of text, or None for a null. Raises RemoteError, RemoteRefusedError."""
        kind, text = self._line(deadline)
        if kind == b"$" and text == b"-1":
            return None
        if kind != b"+":
            raise _unexpected(kind, text)
        return text

    def value(self, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Receive a value into memory of its own, or None for a null. Raises RemoteError, RemoteDamageError."""
        kind, text = self._line(deadline)
        if kind == b"$" and text == b"-1":
            return None
        if kind != b"$" or not text.isdigit() or len(text) > _MOST_DIGITS:
            raise _unexpected(kind, text)
        size = int(text)
        if size > most_bytes:
            raise RemoteDamageError(f"a value of {size} bytes is longer than any record of this layout")
        deadline.allow_bytes(size)
        memory = self._memory.take(size + 2)  # and the end of the line
        known = self._unread[: size + 2]
        self._unread = self._unread[size + 2 :]
        memory[: len(known)] = np.frombuffer(known, dtype=np.uint8)
        self._receive_into(memory[len(known) :].data, deadline)
        if memory[size:].tobytes() != b"\r\n":
            raise RemoteError("the remote tier does not speak Redis' protocol: a value has another length")
        return memory[:size]

    def _line(self, deadline: Deadline) -> tuple[bytes, bytes]:
        """Receive a line; return its first character and the rest. Raises RemoteRefusedError for an error."""
        while (end := self._unread.find(b"\r\n", 0, _LINE_BYTES)) < 0:
            if len(self._unread) >= _LINE_BYTES:
                raise RemoteError("the remote tier does not speak Redis' protocol: a line does not end")
            self._unread += self._receive(deadline)
        line, self._unread = self._unread[:end], self._unread[end + 2 :]
        self._num_pending -= 1
        if line[:1] == b"-":
            raise refusal(line[1:].decode("ascii", errors="replace"))
        return line[:1], line[1:]

    def _receive(self, deadline: Deadline) -> bytes:
        self._socket.settimeout(deadline.left_s())
        try:
            found = self._socket.recv(_HEAD_BYTES)
        except OSError as exc:
            raise _lost(exc) from exc
        if not found:
            raise RemoteError("the remote tier has closed the connection")
        return found

    def _receive_into(self, memory: memoryview, deadline: Deadline) -> None:
        """Fill memory. The kernel waits for all of it where it can: few calls are needed then, each with a limit."""
        found = 0
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

    def _send(self, data: bytes | memoryview, deadline: Deadline) -> None:
        view = memoryview(data)
        try:
            while view:
                self._socket.settimeout(deadline.left_s())
                view = view[self._socket.send(view) :]
        except OSError as exc:
            raise _lost(exc) from exc


def refusal(text: str) -> RemoteRefusedError:
    """Return the error of an answer that is one. Only its code is shown: the rest may name anything."""
    code = text.split(" ", 1)[0]
    if not (code.isalpha() and code.isupper() and len(code) <= 16):
        code = "ERR"
    return RemoteRefusedError(f"the remote tier refuses: {code}", code=code)


def _lost(failure: OSError) -> RemoteError:
    if isinstance(failure, TimeoutError | BlockingIOError):
        return RemoteError("the remote tier did not answer in time")
    return RemoteError(f"the connection to the remote tier is lost: {failure.strerror or type(failure).__name__}")


def _unexpected(kind: bytes, text: bytes) -> RemoteError:
    return RemoteError(f"the remote tier does not speak Redis' protocol: {kind + text[:20]!r} is no answer to this")
