"""The standard streams of a command, and how results look on them: tables, one JSON object, ages."""

from __future__ import annotations

import codecs
import io
import json
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierkv.errors import TierKVError

__all__ = [
    "OutputError",
    "close_table",
    "cut_text",
    "fact_table",
    "format_age",
    "note",
    "open_console",
    "print_json",
    "set_verbosity",
    "standard_streams",
    "visible",
]

_MIN_WIDTH = 20
_verbosity = 0
_REPLACE = "tierkv-replace"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


class OutputError(TierKVError):
    """Standard output cannot be written. is_reader_gone: it is a pipe that nothing reads any more."""

    def __init__(self, reason: str, *, is_reader_gone: bool = False) -> None:
        super().__init__(f"the output cannot be written: {reason}")
        self.is_reader_gone = is_reader_gone


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the three streams safe for the body of a with statement.

    - A closed descriptor 0, 1 or 2 becomes /dev/null. Otherwise the next file that the process opens gets this
      number, and a message that some library prints goes into the store.
    - Standard output prints "?" for a character that its encoding does not have. Bytes of a path that are not UTF-8
      are printed as they are. Its failures are OutputError, unlike those of other files.
    - Standard error escapes what its encoding does not have. Its failures are ignored.
    """
    _open_descriptors()
    codecs.register_error(_REPLACE, _replacement)
    _set_errors(sys.stdout, _REPLACE)
    _set_errors(sys.stderr, "backslashreplace")
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Diagnostics(sys.stderr)):
        yield


def visible(text: str) -> str:
    """Return a text from elsewhere (a prompt, a name, a path) with its control characters escaped, for a terminal."""
    return text.translate(_CONTROLS)


def set_verbosity(level: int) -> None:
    """Show less or more on standard error: -1 errors alone, 0 progress too, 1 what the library logs, 2 its details."""
    global _verbosity
    _verbosity = level
    logger = logging.getLogger("tierkv")
    if level > 0:
        handler: logging.Handler = logging.StreamHandler()  # onto the standard error of now
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)
    else:
        handler = _Notes(logging.ERROR if level < 0 else logging.WARNING)
    logger.handlers = [handler]


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that shows texts as they are: a prompt with [/b] or :smile: in it is no markup.

    stderr: for what is no result; it shows nothing where the user wants results and errors only.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, quiet=stderr and _verbosity < 0)
    console.width = max(console.width, _MIN_WIDTH)  # COLUMNS=0 would print nothing at all
    return console


def fact_table(title: str | None = None) -> Table:
    """Return an empty table of names and values. A value too long for the terminal goes on in a further line."""
    table = Table(title=title, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def close_table(*columns: str, title: str | None = None, folded: Collection[str] = ()) -> Table:
    """Return an empty table with little between its columns, so that 60 columns of a terminal have room for many.

    folded: columns whose values go on in a further line where they are too long.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in folded)
    return table


def cut_text(text: str) -> Text:
    """Return a cell that is cut where its column is narrower. Only columns without no_wrap become narrower."""
    return Text(visible(" ".join(text.split())), no_wrap=True, overflow="ellipsis")


def note(text: str) -> None:
    """Print one line that is no result on standard error, unless the user wants results and errors only."""
    if _verbosity >= 0:
        print(visible(f"tierkv: {' '.join(text.split())}"), file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON object in ASCII. JSON has no nan and no infinity: they are null."""
    print(json.dumps(_finite(value), allow_nan=False))


def format_age(seconds: float) -> str:
    """Return an age in its largest whole unit: 5 s, 3 min, 2 h, 4 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


class _Notes(logging.Handler):
    """What the library warns of, as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        print(visible(f"tierkv: {' '.join(record.getMessage().split())}"), file=sys.stderr)


class _Output:
    """A text stream whose failures are OutputError. stream: None where the descriptor was closed."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
        self._is_closed = stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. Raises OutputError."""
        if self._is_closed:
            return self._failed("standard output is closed", is_reader_gone=False)
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as exc:
            return self._failed(_reason(exc), is_reader_gone=isinstance(exc, BrokenPipeError))

    def writelines(self, lines: Iterator[str]) -> None:
        """Write texts. Raises OutputError."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the buffer. Raises OutputError."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as exc:
            self._failed(_reason(exc), is_reader_gone=isinstance(exc, BrokenPipeError))

    def _failed(self, reason: str, *, is_reader_gone: bool) -> int:
        self._discard()
        raise OutputError(reason, is_reader_gone=is_reader_gone)

    def _discard(self) -> None:
        """Discard what the stream has buffered, so that it does not fail again when Python ends."""
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


class _Diagnostics(_Output):
    """Standard error: what cannot be written is dropped."""

    def _failed(self, _reason: str, *, is_reader_gone: bool) -> int:
        if not self._is_closed:
            self._discard()
        return 0


def _reason(exc: OSError | ValueError) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or type(exc).__name__


def _open_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _set_errors(stream: TextIO | None, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)


def _replacement(exc: UnicodeError) -> tuple[str | bytes, int]:
    """Encode one character that an encoding does not have: a byte of a path as this byte, anything else as "?"."""
    assert isinstance(exc, UnicodeEncodeError)
    code = ord(exc.object[exc.start])
    return (bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else "?"), exc.start + 1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
