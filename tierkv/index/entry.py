"""One block that this process knows: an object without a dictionary, for there may be a million."""

from __future__ import annotations

from collections.abc import Iterable

from tierkv.index.children import Siblings
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["AWAITED", "PINNED", "Entry"]

PINNED, _IN_COLD, AWAITED = 1, 2, 4  # bits of `flags`; the properties say what they mean


class Entry:
    """One block that this process knows. Satisfies `CacheBlock`; changed by the index alone."""

    __slots__ = (  # one more, and an entry has 144 bytes instead of 128: so flags share one
        "access_count",
        "block_hash",
        "block_id",
        "created_at",
        "depth",
        "family",
        "flags",
        "hot_children",
        "last_access",
        "parent",
        "token_bytes",
        "warm_slot",
    )

    def __init__(self, block_hash: BlockHash, parent: Entry | None, token_bytes: bytes, now: float) -> None:
        self.block_hash = block_hash
        self.parent: Entry = parent or self
        self.token_bytes = token_bytes
        self.depth: int = parent.depth + 1 if parent else -1
        self.block_id: int | None = None
        self.warm_slot: int | None = None
        self.flags = 0
        self.family: Entry | Siblings[Entry] | None = None  # most entries have one child: it needs no collection
        self.hot_children = 0
        self.created_at = now
        self.last_access = now
        self.access_count = 1

    @property
    def parent_hash(self) -> BlockHash:
        """The parent's block hash; of a first block the namespace digest."""
        return self.parent.block_hash

    @property
    def children(self) -> Iterable[Entry]:
        """The entries that continue this one, in the order of their token ids."""
        family = self.family
        if family is None:
            return ()
        return (family,) if isinstance(family, Entry) else family

    @property
    def is_prefix_block(self) -> bool:
        """Whether prompts part behind it: two or more known blocks continue it."""
        return isinstance(self.family, Siblings)

    @property
    def warm_children(self) -> int:
        """How many children have bytes in the warm tier; unlike hot ones counted only where there are several."""
        family = self.family
        if family is None:
            return 0
        return int(family.warm_slot is not None) if isinstance(family, Entry) else family.num_warm

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
        """Whether its bytes are on their way: it stays without place and children."""
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
        """Tell a true hit from a hash collision."""
        return self.parent.block_hash == parent_hash and self.token_bytes == token_bytes
