"""One command of tierkv in this process, as a user types it, and what it prints."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from tierkv.tools import cli

__all__ = ["Command", "Printed", "run_command"]


class Printed(NamedTuple):
    """Exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return the object that a command without an error printed."""
        assert self.code == 0, self.err
        value: dict[str, Any] = json.loads(self.out)
        return value


Command = Callable[..., Printed]


def run_command(*arguments: object, encoding: str = "utf-8") -> Printed:
    """Run `tierkv` with arguments, on streams of an encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tierkv", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            cli.main()
    code = exit_info.value.code or 0
    assert isinstance(code, int)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding, "surrogateescape"))  # type: ignore[attr-defined]
    return Printed(code, *texts)
