"""`tierkv daemon unit`, and how a daemon's memory is sized."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.tools.example_files import read_example
from tierkv.tools.options import parse_size
from tierkv.values.free_memory import memory_room
from tierkv.values.units import format_bytes

__all__ = ["installed_command", "size_of_slab", "unit"]

_DEFAULT_BYTES = 1 << 30
_DEFAULT_SHARE = 0.5
_MIB = 1 << 20
_COMMAND_OF_EXAMPLE = "%h/.local/bin/tierkv"


def unit() -> None:
    """Print a systemd unit for a daemon of this user, with the place of this command.

    It sizes the shared memory by MemoryMax=, is ready when clients can connect, and reloads at `systemctl reload`.
    Example: tierkv daemon unit > ~/.config/systemd/user/tierkv-daemon.service
    """
    text = read_example("tierkv-daemon.service")
    print(text.replace(_COMMAND_OF_EXAMPLE, installed_command()), end="")


def installed_command() -> str:
    """Return the command line that starts this tierkv, as systemd reads it."""
    called = Path(sys.argv[0])
    found = str(called.absolute()) if called.name == "tierkv" and called.is_file() else shutil.which("tierkv")
    words = [found] if found else [sys.executable, "-m", "tierkv"]
    return " ".join(map(_quoted, words))


def size_of_slab(text: str | None) -> int:
    """Return the bytes of --warm: a size, a share of the memory that is left, or the default. Raises ConfigError."""
    share = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text) if text is not None else None
    if text is not None and not share:
        return parse_size(text)
    if share and not 0 < float(share[1]) <= 100:
        raise ConfigError(f"{text!r} is no share of the memory that is left: say 50%")
    room = memory_room()
    of_room = int(room.free_bytes * (float(share[1]) / 100 if share else _DEFAULT_SHARE))
    size = (of_room if share else min(of_room, _DEFAULT_BYTES)) // _MIB * _MIB
    if size <= 0:
        raise ConfigError(f"{room.limited_by} leaves {format_bytes(room.free_bytes)} of memory, too little for a cache")
    return size


def _quoted(word: str) -> str:
    """Return a word of ExecStart=: systemd reads %, blanks, quotes and backslashes as its own; $ not in a path."""
    word = word.replace("%", "%%")
    if not re.search(r"[\s'\"\\;]", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
