"""LogEvent: a line of a log with named values, and a limit of lines a minute."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["LogEvent", "LogLimit", "key_value"]

_MINUTE_S = 60.0


class LogEvent:
    """What is logged: a few words, and values by name. Pass it to a logger in place of a text.

    Any handler prints it as `words name=value`. The formatters of `tierkv daemon` and `tierkv serve` keep names and
    values apart. Values are numbers and texts.

    >>> str(LogEvent("evicted", tier="warm", blocks=3))
    'evicted tier=warm blocks=3'
    """

    __slots__ = ("message", "values")

    def __init__(self, message: str, /, **values: Any) -> None:
        self.message = message
        self.values = values

    def __str__(self) -> str:
        return " ".join([self.message, *(key_value(name, value) for name, value in self.values.items())])


def key_value(name: str, value: Any) -> str:
    """Return name=value on one line; a value with a blank, a quote or a control character is quoted as in JSON."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_plain = text and text.isprintable() and not any(each in text for each in ' "=\\')
    return f"{name}={text if is_plain else json.dumps(text, ensure_ascii=False)}"


class LogLimit:
    """At most `lines` a minute. Not thread-safe."""

    def __init__(self, lines: int, *, clock: Callable[[], float]) -> None:
        self._lines = lines
        self._clock = clock
        self._count = 0
        self._minute = clock()

    def take(self) -> tuple[bool, int]:
        """Count a line. Return whether it may be logged, and how many lines of the last minute were not."""
        now, missed = self._clock(), 0
        if now - self._minute >= _MINUTE_S:
            missed = max(0, self._count - self._lines)
            self._count, self._minute = 0, now
        self._count += 1
        return self._count <= self._lines, missed
