"""The state files that a cache, or a namespace of a daemon, has loaded: each file once, and a bounded number."""

from __future__ import annotations

import threading

from tierkv.errors import CapacityError
from tierkv.storage.state_file import StateFile

__all__ = ["STATE_FILES_LIMIT", "StateFiles"]

STATE_FILES_LIMIT = 64
"""How many state files may be loaded at once: each is an open file, and is asked at each miss."""


class StateFiles:
    """Open state files in the order in which they were loaded. Thread-safe; it closes what it is given.

    files: as they are now; a tuple that is replaced, never changed.
    """

    def __init__(self, *, limit: int = STATE_FILES_LIMIT) -> None:
        self.limit = limit
        self.files: tuple[StateFile, ...] = ()
        self._lock = threading.Lock()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self.files)

    def add(self, state: StateFile) -> StateFile:
        """Take an open file and return the one to use: the same file, where that is loaded already.

        A file that has come to the path of a loaded one takes its place; what was at that path is closed.
        Raises CapacityError where `limit` files are loaded. `state` is then closed, and also if this is.
        """
        with self._lock:
            for known in self.files:
                if known.identity == state.identity:
                    if known is not state:
                        state.close()
                    return known
            replaced = [known for known in self.files if known.path == state.path]
            kept = tuple(known for known in self.files if known.path != state.path)
            if self._is_closed or len(kept) >= self.limit:
                state.close()
            if len(kept) >= self.limit:
                raise CapacityError(
                    f"{len(kept)} state files are loaded, the most there may be",
                    hint="save them into one file, or put them into the store with `tierkv load`",
                )
            self.files = (*kept, state)
        for old in replaced:
            old.close()
        return state

    def close(self) -> None:
        """Close all files, and those that are added later. Waits for no read; later reads miss."""
        with self._lock:
            self._is_closed = True
            files = self.files
        for state in files:
            state.close()
