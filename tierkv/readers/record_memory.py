"""RecordMemory: shared memory that reader processes write records into."""

from __future__ import annotations

import threading

from tierkv.storage.warm import Slab

__all__ = ["RecordMemory"]


class RecordMemory:
    """Places of one record each. Thread-safe. most_kept: free places that are kept for the next records."""

    def __init__(self, *, most_kept: int) -> None:
        self._most_kept = most_kept
        self._lock = threading.Lock()
        self._free: list[Slab] = []
        self._is_closed = False

    def take(self, num_bytes: int) -> Slab | None:
        """Return a place of so many bytes or more; None where there is no memory for it."""
        with self._lock:
            for place in self._free:
                if place.size_bytes >= num_bytes:
                    self._free.remove(place)
                    return place
        try:
            return Slab(num_bytes, num_threads=1)
        except (OSError, ValueError, MemoryError):
            return None

    def put_back(self, place: Slab) -> None:
        """Have a place free for another record: no process and no view uses it any more."""
        with self._lock:
            self._free.append(place)
            spare = self._free[: max(0, len(self._free) - (0 if self._is_closed else self._most_kept))]
            del self._free[: len(spare)]
        for each in spare:
            each.close()

    def close(self) -> None:
        """Free all places, those in use when they are put back. May be called twice."""
        with self._lock:
            self._is_closed = True
            free, self._free = self._free, []
        for each in free:
            each.close()
