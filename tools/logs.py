"""The log lines of `tierkv daemon` and `tierkv serve`: time in UTC, level, part of tierkv, words, named values."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from enum import Enum
from typing import Annotated, Any

import typer

from tierkv.values.log_event import LogEvent, key_value

__all__ = ["FormatOption", "LogFormat", "configure_logs"]


class LogFormat(str, Enum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", help="Lines of the log: text is time=... level=... key=value, json one object each."),
]


def configure_logs(log_format: LogFormat, handler: logging.Handler) -> None:
    """Send every log of this process to one handler. Level INFO, or what -v has set for tierkv."""
    handler.setFormatter(_JsonFormatter() if log_format is LogFormat.JSON else _TextFormatter())
    ours = logging.getLogger("tierkv")
    ours.handlers = []  # that of -v would print each line again
    ours.setLevel(ours.level or logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return a record as values by name, those that every line has first."""
    at = datetime.fromtimestamp(record.created, timezone.utc)
    event = record.msg if isinstance(record.msg, LogEvent) else None
    fields: dict[str, Any] = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "part": record.name.removeprefix("tierkv."),
        "msg": event.message if event else record.getMessage(),
    }
    fields |= {name: value for name, value in (event.values if event else {}).items() if name not in fields}
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


class _TextFormatter(logging.Formatter):
    """One line of key=value pairs, as Loki and others read them (logfmt)."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(key_value(name, value) for name, value in _fields_of(record).items())


class _JsonFormatter(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields_of(record), default=str)
