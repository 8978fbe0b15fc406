"""HttpWire: one request of HTTP/1.1 at a time, whose answer is received into the memory that the caller gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tierkv.errors import RemoteError
from tierkv.remote_tiers.protocol import Deadline
from tierkv.remote_tiers.wire import Wire
from tierkv.storage.codec import Bytes

__all__ = ["Answer", "HttpWire"]

_MOST_HEAD_BYTES = 16 << 10
_MOST_SKIPPED_BYTES = 64 << 10  # of a body that nothing needs; a connection with more of it is closed
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: .*)?")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_LENGTH = re.compile(r"\d{1,18}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands before a body. headers: by their names in small letters."""

    status: int
    headers: Mapping[str, str]

    @property
    def num_bytes(self) -> int | None:
        """Length of the body; None where the server does not say it."""
        text = self.headers.get("content-length", "")
        return int(text) if _LENGTH.fullmatch(text) and "transfer-encoding" not in self.headers else None

    @property
    def range(self) -> tuple[int, int, int] | None:
        """First byte, last byte, and length of the whole object."""
        match = _RANGE.fullmatch(self.headers.get("content-range", ""))
        return (int(match[1]), int(match[2]), int(match[3])) if match else None


class HttpWire(Wire):
    """One connection to a server of HTTP/1.1, used by one thread at a time. After an error it must be closed."""

    def ask(
        self, method: str, target: str, headers: Mapping[str, str], deadline: Deadline, *, body: Bytes | None = None
    ) -> Answer:
        """Send a request and receive what stands before the answer's body. Raises RemoteError.

        target: path and query, encoded. The body stays in its own memory.
        """
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"Content-Length: {body.size}")
        self.send("\r\n".join([*lines, "", ""]).encode("ascii"), deadline)
        if body is not None:
            self.send(body.data, deadline)
        return _parse(self.receive_line(b"\r\n\r\n", deadline, most_bytes=_MOST_HEAD_BYTES))

    def skip_body(self, answer: Answer, deadline: Deadline) -> bool:
        """Receive a short body that nothing needs. Return whether the connection can be used again."""
        size = answer.num_bytes
        if size is None or size > _MOST_SKIPPED_BYTES or answer.headers.get("connection", "").lower() == "close":
            return False
        while len(self.unread) < size:
            self.receive_more(deadline)
        self.unread = self.unread[size:]
        return True


def _parse(head: bytes) -> Answer:
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None or status[1] < b"200":
        raise RemoteError("the object store does not speak HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    return Answer(int(status[1]), headers)
