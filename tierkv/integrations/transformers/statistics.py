"""What a persistent cache did for the calls of `generate`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tierkv.values.locks import OwnedLock

__all__ = ["GenerateStats", "StatsRecorder"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateStats:
    """Counts since the cache was opened.

    num_calls: calls of `generate`. num_hit_calls: those that loaded K and V.
    num_loaded_tokens, num_computed_tokens: prompt tokens of the cached calls, without padding. Equal rows of a batch
    (beams, several sequences of one prompt) count once.
    num_saved_blocks: new blocks that the store took.
    num_computed_by_choice: calls whose prefix was there, but computing it was measured to be faster.
    uncached: calls that ran as plain `generate`, by reason.
    """

    num_calls: int = 0
    num_hit_calls: int = 0
    num_loaded_tokens: int = 0
    num_computed_tokens: int = 0
    num_saved_blocks: int = 0
    num_computed_by_choice: int = 0
    uncached: dict[str, int] = field(default_factory=dict)


class StatsRecorder:
    """Counts for `GenerateStats`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = OwnedLock()
        self._counts: dict[str, int] = {}
        self._uncached: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        """Add to counts, by their names in `GenerateStats`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count

    def add_uncached(self, reason: str) -> None:
        """Count a plain call; log each reason once."""
        with self._lock:
            self._uncached[reason] = count = self._uncached.get(reason, 0) + 1
        if count == 1:
            _log.warning("generate runs without the persistent cache: %s", reason)
        else:
            _log.debug("generate runs without the persistent cache: %s", reason)

    def snapshot(self) -> GenerateStats:
        """Return the counts as they are now."""
        with self._lock:
            return GenerateStats(**self._counts, uncached=dict(self._uncached))
