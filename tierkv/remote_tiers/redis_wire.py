"""RedisWire: sends commands of Redis' protocol RESP2 over a connected socket, and receives the answers.

redis-py connects: name, TLS. It is not used for values: it copies each of them two times or more, which costs 1.0 to
1.8 CPU seconds a GB. Here a value is received into the memory that the caller keeps. It is not used for other answers
either: it takes as much memory for them as the server sends.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TypeAlias

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.remote_tiers.wire import Wire
from tierkv.storage.codec import Bytes

__all__ = ["RedisWire", "Reply"]

Reply: TypeAlias = "int | bytes | list[Reply] | None"
"""An answer of any kind."""

_LINE_BYTES = 512  # no answer that is asked for here has a longer line
_MOST_DIGITS = 19
_LONG_BYTES = 16 << 10  # of a value that is sent from its own memory
_FLAG_BYTES = 4  # of an answer that is 0 or 1
_ITEM_BYTES = 64  # of memory that an item of a list takes, beside its text
_MOST_DEPTH = 5
_CODES = {
    *("ERR", "NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "OOM", "MISCONF", "READONLY", "NOREPLICAS", "LOADING", "BUSY"),
    *("MASTERDOWN", "WRONGTYPE", "MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "CROSSSLOT"),
}
"""Of refusals. Each is a counter."""


class RedisWire(Wire):
    """One connection, used by one thread at a time. After an error, other than a refusal, it must be closed."""

    def __init__(self, connected: socket.socket, memory: RecordMemory) -> None:
        super().__init__(connected)
        self._memory = memory
        self._num_pending = 0  # answers that have not begun to come

    @property
    def is_in_step(self) -> bool:
        """Whether all answers have been received: then the connection can be used again, also after a refusal."""
        return not self._num_pending and not self.unread

    def send_command(self, command: Sequence[bytes | Bytes], deadline: Deadline) -> None:
        """Send a command, its name and its arguments. Long arguments are sent from their own memory."""
        self._num_pending += 1
        parts = [b"*%d\r\n" % len(command)]
        for argument in command:
            if isinstance(argument, bytes):
                parts.append(b"$%d\r\n%s\r\n" % (len(argument), argument))
            elif argument.size < _LONG_BYTES:
                parts.append(b"$%d\r\n%s\r\n" % (argument.size, argument.tobytes()))
            else:
                parts.append(b"$%d\r\n" % argument.size)
                self.send(b"".join(parts), deadline)
                self.send(argument.data, deadline)
                parts = [b"\r\n"]
        self.send(b"".join(parts), deadline)

    def send_each(self, name: bytes, keys: Sequence[bytes], arguments: Sequence[bytes], deadline: Deadline) -> None:
        """Send one command for each key, all at once. `flags` receives the answers."""
        self._num_pending += len(keys)
        head = b"*%d\r\n$%d\r\n%s\r\n" % (2 + len(arguments), len(name), name)
        end = b"".join(b"$%d\r\n%s\r\n" % (len(argument), argument) for argument in arguments)
        self.send(b"".join([b"%s$%d\r\n%s\r\n%s" % (head, len(key), key, end) for key in keys]), deadline)

    def flags(self, count: int, deadline: Deadline) -> bytes:
        """Receive so many numbers, each 0 or 1; return their digits. Raises RemoteError, RemoteRefusedError."""
        size = _FLAG_BYTES * count
        while len(self.unread) < size and self.unread[:1] in (b"", b":"):
            self.receive_more(deadline)
        answers = self.unread[:size]
        digits = answers[1::_FLAG_BYTES]
        if answers == b"".join([b":%c\r\n" % digit for digit in digits]) and not digits.strip(b"01"):
            self.unread = self.unread[size:]
            self._num_pending -= count
            return digits
        return b"".join([b"%d" % self.number(deadline, most=1) for _ in range(count)])  # raises what is wrong

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
        self.receive_into(memory.data, deadline)
        if memory[size:].tobytes() != b"\r\n":
            raise RemoteError("the remote tier does not speak Redis' protocol: a value has another length")
        return memory[:size]

    def reply(self, deadline: Deadline, *, most_bytes: int) -> Reply:
        """Receive an answer of any kind. Raises RemoteError where it takes more memory, RemoteRefusedError."""
        kind, text = self._line(deadline)
        item, _ = self._item(kind, text, deadline, most_bytes, depth=0)
        return item

    def _item(self, kind: bytes, text: bytes, deadline: Deadline, left: int, *, depth: int) -> tuple[Reply, int]:
        """Receive what follows an answer's first line; return the answer, and what is left of the memory for it."""
        left -= _ITEM_BYTES
        if kind == b"+":
            return text, left
        if len(text) > _MOST_DIGITS or not text.removeprefix(b"-").isdigit() or kind not in (b":", b"$", b"*"):
            raise _unexpected(kind, text)
        size = int(text)
        if kind == b":":
            return size, left
        if size < 0:
            return None, left
        left -= size if kind == b"$" else size * _ITEM_BYTES
        if left < 0 or depth > _MOST_DEPTH:
            raise RemoteError("the remote tier sends an answer that is too long")
        if kind == b"$":
            while len(self.unread) < size + 2:
                self.receive_more(deadline)
            found, self.unread = self.unread[:size], self.unread[size + 2 :]
            return found, left
        items: list[Reply] = []
        for _ in range(size):
            item, left = self._item(*self._any_line(deadline), deadline, left, depth=depth + 1)
            items.append(item)
        return items, left

    def _line(self, deadline: Deadline) -> tuple[bytes, bytes]:
        """Receive the first line of an answer. Raises RemoteRefusedError for an error."""
        kind, text = self._any_line(deadline)
        self._num_pending -= 1
        if kind == b"-":
            raise refusal(text.decode("ascii", errors="replace"))
        return kind, text

    def _any_line(self, deadline: Deadline) -> tuple[bytes, bytes]:
        """Receive a line; return its first character and the rest."""
        line = self.receive_line(b"\r\n", deadline, most_bytes=_LINE_BYTES)
        return line[:1], line[1:]


def refusal(text: str) -> RemoteRefusedError:
    """Return the error of an answer that is one. Only a code that Redis has is shown: the rest may name anything."""
    code = text.split(" ", 1)[0]
    if code not in _CODES:
        code = "ERR"
    return RemoteRefusedError(f"the remote tier refuses: {code}", code=code)


def _unexpected(kind: bytes, text: bytes) -> RemoteError:
    return RemoteError(f"the remote tier does not speak Redis' protocol: {kind + text[:20]!r} is no answer to this")
