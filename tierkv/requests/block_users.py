"""BlockUsers: how many running sequences use each hot block, kept up to date so that nobody has to count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

__all__ = ["BlockUsers"]


class BlockUsers:
    """Users by block id. num_shared: sums up, over all sequences, their blocks that another one uses too.

    Every method wants the lock held. A sequence uses a block once.
    """

    def __init__(self) -> None:
        self.num_shared = 0
        self._users: dict[int, int] = {}

    def add(self, block_ids: Iterable[int]) -> None:
        """Count one more user of each block."""
        users, num_shared = self._users, 0
        for block_id in block_ids:
            count = users[block_id] = users.get(block_id, 0) + 1
            if count > 1:
                num_shared += 2 if count == 2 else 1
        self.num_shared += num_shared

    def remove(self, block_ids: Iterable[int]) -> None:
        """Count one user less of each block."""
        users, num_shared = self._users, 0
        for block_id in block_ids:
            count = users.pop(block_id) - 1
            if count:
                users[block_id] = count
                num_shared += 2 if count == 1 else 1
        self.num_shared -= num_shared

    def replace(self, old: int, new: int) -> None:
        """Let one user of a block use another one instead."""
        self.remove((old,))
        self.add((new,))

    def rename(self, moved: Mapping[int, int]) -> None:
        """Count the users of blocks under their new ids, old id -> new, from now on."""
        counts = {new: self._users.pop(old) for old, new in moved.items() if old in self._users}
        self._users.update(counts)

    def counted(self) -> Counter[int]:
        """Return the users by block id."""
        return Counter(self._users)
