"""Completion of copies: what a user of the target waits for. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["DONE", "AllReady", "Done", "Ready"]


class Ready(Protocol):
    """Completion of a batch of moves."""

    def wait(self, layer: int | None = None) -> None:
        """Make the current stream wait for the bytes of one layer, or of all; return at once."""

    def synchronize(self) -> None:
        """Block the calling thread until all bytes have arrived."""

    def is_done(self) -> bool:
        """Return whether all bytes have arrived, without waiting."""


class Done:
    """Completed at once, as copies on a CPU are."""

    def wait(self, layer: int | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def is_done(self) -> bool:
        """Return True."""
        return True


DONE = Done()
"""One for all: thousands of queued jobs refer to it, and garbage collection would visit one of each."""


class AllReady:
    """Completion of several batches."""

    def __init__(self, parts: Sequence[Ready]) -> None:
        self._parts = parts

    def wait(self, layer: int | None = None) -> None:
        for part in self._parts:
            part.wait(layer)

    def synchronize(self) -> None:
        for part in self._parts:
            part.synchronize()

    def is_done(self) -> bool:
        return all(part.is_done() for part in self._parts)
