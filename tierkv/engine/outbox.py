"""Outbox: new tokens and ends on their way to the readers, which are notified once a step."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tierkv.engine.generation import ModelRequest, Wake
from tierkv.engine.sampling import Choice

__all__ = ["Outbox"]

_log = logging.getLogger(__name__)

_News = tuple[ModelRequest, Choice | None, str | None]
"""A request, its new token and why it ends with it; without a token: that it has ended."""


class Outbox:
    """Keeps what a step has chosen until `deliver`, which may run while the device computes the next step.

    A reader that raises loses its request, and no other one: cancel is called with it. Readers of one event loop are
    woken by one call.
    """

    def __init__(self, cancel: Callable[[ModelRequest], None]) -> None:
        self._cancel = cancel
        self._first: list[_News] = []  # tokens of requests that had none yet
        self._pending: list[_News] = []

    @property
    def is_pending(self) -> bool:
        """Whether something is to be delivered."""
        return bool(self._first or self._pending)

    def add(self, request: ModelRequest, choice: Choice, reason: str | None) -> None:
        """Add a new token. reason: why the request ends with it; None if it goes on."""
        if request.reader is not None and request.reader.wants_events:
            (self._first if request.num_new == 1 else self._pending).append((request, choice, reason))

    def end(self, request: ModelRequest) -> None:
        """Add the end of a request, behind all of its tokens."""
        if request.reader is not None:
            self._pending.append((request, None, None))

    def deliver(self) -> None:
        """Hand everything to the readers."""
        self.deliver_first()
        pending, self._pending = self._pending, []
        self._hand(pending)

    def deliver_first(self) -> None:
        """Hand over the first tokens of requests only: their readers wait longest, and they are few in a step."""
        first, self._first = self._first, []
        self._hand(first)

    def _hand(self, pending: list[_News]) -> None:
        sleepers: dict[Wake, list[Callable[[], None]]] = {}
        for request, choice, reason in pending:
            reader = request.reader
            assert reader is not None
            try:
                woken = reader.end(request) if choice is None else reader.put(request, choice, reason)
            except Exception:  # noqa: BLE001 - the reader's own code; the others go on
                _log.warning("the reader of a request failed: the request is cancelled", exc_info=True)
                self._cancel(request)
                continue
            if woken is not None:
                sleepers.setdefault(woken[0], []).append(woken[1])
        for wake, calls in sleepers.items():
            try:
                wake(_call_all, calls)
            except RuntimeError:  # the event loop is closed: its readers are gone, and their streams cancel
                _log.debug("an event loop was closed before its streams")


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
