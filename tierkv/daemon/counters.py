"""EventCounter: the daemon's counters by name, some of them also by reason."""

from __future__ import annotations

from collections import Counter, defaultdict

__all__ = ["EventCounter"]


class EventCounter(Counter[str]):
    """Counters by name. reasons: of those that have reasons, how often each was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, name: str, number: int = 1, *, reason: str) -> None:
        """Raise a counter, and its count of this reason."""
        if number:
            self[name] += number
            self.reasons[name][reason] += number
