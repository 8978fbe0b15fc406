"""Single keys from a terminal, while a command shows something."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Keys", "single_keys"]


class Keys:
    """Waits for keys. descriptor: of the terminal; None where standard input is none, and no key ever comes."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    def wait(self, seconds: float) -> str:
        """Wait so long for a key; return the keys that were pressed, "" if none was. Ends early at a key."""
        if self.descriptor is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self.descriptor], [], [], seconds)
        if not ready:
            return ""
        pressed = os.read(self.descriptor, 64)
        if not pressed:  # the terminal is gone
            self.descriptor = None
        return pressed.decode(errors="replace")


@contextmanager
def single_keys() -> Iterator[Keys]:
    """Yield the keys of the terminal at standard input, which gives them unechoed and without Enter until the end.

    A process in the background, which may not change its terminal, gets no keys.
    """
    descriptor = _terminal()
    if descriptor is None:
        yield Keys(None)
        return
    before = termios.tcgetattr(descriptor)
    changed = [*before]
    changed[3] &= ~(termios.ICANON | termios.ECHO)  # signals such as Ctrl-C stay
    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield Keys(descriptor)
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _terminal() -> int | None:
    with suppress(OSError, ValueError, AttributeError):  # standard input is closed, or an object without a descriptor
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return descriptor
    return None
