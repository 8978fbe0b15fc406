"""The entry of one block: what the index knows of it, and its place in the tree."""

from __future__ import annotations

from collections.abc import Iterable

from tierkv.index.children import Children
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["AWAITED", "INDEX_FLAGS", "MOST_NOTE", "NOTE_SHIFT", "PINNED", "Entry"]

PINNED, _IN_COLD, AWAITED = 1, 2, 4  # bits of `flags`
INDEX_FLAGS, NOTE_SHIFT, MOST_NOTE = 7, 3, 31
"""The bits above INDEX_FLAGS are the policy's. With a larger number CPython would keep an object for each entry."""


class Entry:
    """One block that this process knows. Satisfies `CacheBlock`; only the index changes it.

    child_or_children: None, the only child, or a collection: most entries have one child and need no collection.
    """

    __slots__ = (  # 128 bytes; one slot more makes 144, so three flags share one
        "access_count",
        "block_hash",
        "block_id",
        "child_or_children",
        "created_at",
        "depth",
        "flags",
        "hot_children",
        "last_access",
        "parent",
        "token_bytes",
        "warm_slot",
    )

    def __init__(self, block_hash: BlockHash, parent: Entry | None, token_bytes: bytes, now: float) -> None:
        self.block_hash: BlockHash = block_hash
        self.parent: Entry = parent or self
        self.token_bytes: bytes = token_bytes
        self.depth: int = parent.depth + 1 if parent else -1
        self.block_id: int | None = None
        self.warm_slot: int | None = None
        self.flags: int = 0
        self.child_or_children: Entry | Children[Entry] | None = None
        self.hot_children: int = 0
        self.created_at: float = now
        self.last_access: float = now
        self.access_count: int = 1

    @property
    def parent_hash(self) -> BlockHash:
        """The parent's block hash; of a first block the namespace digest."""
        return self.parent.block_hash

    @property
    def children(self) -> Iterable[Entry]:
        """The entries that continue this one, in the order of their token ids."""
        below = self.child_or_children
        if below is None:
            return ()
        return (below,) if isinstance(below, Entry) else below

    @property
    def is_prefix_block(self) -> bool:
        """Whether two or more known blocks continue it."""
        return isinstance(self.child_or_children, Children)

    @property
    def warm_children(self) -> int:
        """How many children have bytes in the warm tier. Only a collection counts them."""
        below = self.child_or_children
        if below is None:
            return 0
        return int(below.warm_slot is not None) if isinstance(below, Entry) else below.num_warm

    @property
    def pinned(self) -> bool:
        """Whether no tier may evict it."""
        return bool(self.flags & PINNED)

    @pinned.setter
    def pinned(self, is_kept: bool) -> None:
        self.flags = self.flags | PINNED if is_kept else self.flags & ~PINNED

    @property
    def in_cold(self) -> bool:
        """Whether the cold store is known to have the block."""
        return bool(self.flags & _IN_COLD)

    @in_cold.setter
    def in_cold(self, is_there: bool) -> None:
        self.flags = self.flags | _IN_COLD if is_there else self.flags & ~_IN_COLD

    @property
    def awaited(self) -> bool:
        """Whether a load of its bytes is in flight. The entry stays in the index even without place and children."""
        return bool(self.flags & AWAITED)

    @awaited.setter
    def awaited(self, is_coming: bool) -> None:
        self.flags = self.flags | AWAITED if is_coming else self.flags & ~AWAITED

    @property
    def num_tokens(self) -> int:
        """Tokens of the block; fewer than the block size in a stored partial block."""
        return len(self.token_bytes) // TOKEN_BYTES

    def place(self, tier: Tier) -> int | None:
        """Return the block id (hot) or warm slot that holds the bytes, or None."""
        return self.block_id if tier is Tier.HOT else self.warm_slot

    def tier_children(self, tier: Tier) -> int:
        """Return how many children have bytes in that tier."""
        return self.hot_children if tier is Tier.HOT else self.warm_children

    def is_same_block(self, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Return whether this is that block; False on a hash collision."""
        return self.parent.block_hash == parent_hash and self.token_bytes == token_bytes
