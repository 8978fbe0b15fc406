"""The tree of known blocks: each entry lies below the entry of its parent block, and a walk compares token ids.

An entry stays as long as it has children, even when only the cold store has its bytes. So a walk goes from verified
entry to verified entry, and a block with a colliding hash never gets another block's children. A block that comes from
outside the tree, from a store for example, is compared by its content digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from tierkv.index.children import Children, nearest_in_memory
from tierkv.values.block import TOKEN_BYTES, BlockHash, ContentDigest, Tier, chain_content_digest
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["AWAITED", "PINNED", "BlockTree", "ContentDigests", "Entry"]

PINNED, _IN_COLD, AWAITED = 1, 2, 4  # bits of `flags`
_SAME_TIME_S = 1e-4
_KEPT_EVERY = 16


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


class BlockTree:
    """The entries by hash, and below their parents.

    root: the namespace digest, parent of every first block. root_entry: its entry, which is in no tier and not in the
    table, and never changes. lock: guards the tree where threads share it. The caller of every method holds the lock.
    """

    def __init__(self, root: BlockHash, clock: Callable[[], float], lock: Owned = NO_LOCK) -> None:
        self._lock = lock
        self.root = root
        self._clock = clock
        self._now = clock()
        self._entries: dict[BlockHash, Entry] = {}
        self.root_entry: Entry = Entry(root, None, b"", self._now)
        self._content_digests = ContentDigests(self.root_entry, root, self._entries)
        self._observe: Callable[[Entry, Entry | None], None] | None = None  # called with entry, parent

    def now(self) -> float:
        """Return the time of the clock that accesses are recorded by; needs no lock."""
        return self._clock()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash,
        token_bytes: bytes,
        *,
        content_digest: ContentDigest | None = None,
    ) -> Entry | None:
        """Return the entry of exactly this block; None if it is unknown, and on a hash collision."""
        assert self._lock.is_owned()
        entry = self._entries.get(block_hash)
        if entry is None or not entry.is_same_block(parent_hash, token_bytes):
            return None
        return entry if content_digest is None or content_digest == self.content_digest_of(entry) else None

    def content_digest_of(self, entry: Entry) -> ContentDigest:
        """Return the content digest of an entry, also of one that has just left the tree."""
        assert self._lock.is_owned()
        return self._content_digests.of(entry)

    def content_digest_after(self, parent_hash: BlockHash, token_bytes: bytes) -> ContentDigest:
        """Return the digest of a whole or partial block after an entry (or the root) that is in the tree."""
        assert self._lock.is_owned()
        parent = self._parent(parent_hash)
        assert parent is not None, "the parent has left the tree"
        return chain_content_digest(self.content_digest_of(parent), token_bytes)

    def peek(self, block_hash: BlockHash) -> Entry | None:
        """Return the entry with this hash, whatever block it is: the caller compares its identity."""
        assert self._lock.is_owned()
        return self._entries.get(block_hash)

    def walk(self, token_bytes: bytes, block_size: int) -> list[Entry]:
        """Return the entries of the leading whole blocks of a sequence, up to the first that is unknown.

        token_bytes: the sequence as little-endian uint32. The walk compares token ids: it hashes nothing, and a
        collision cannot mislead it.
        """
        assert self._lock.is_owned()
        step = block_size * TOKEN_BYTES
        parent = self.root_entry
        found: list[Entry] = []
        for start in range(0, len(token_bytes) - step + 1, step):
            below = parent.child_or_children
            if below is None:
                break
            tokens = token_bytes[start : start + step]
            if isinstance(below, Children):
                child = below.find(tokens)
            else:
                child = below if below.token_bytes == tokens else None
            if child is None:
                break
            found.append(child)
            parent = child
        return found

    def collides(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Return whether another block has this hash, so that this block cannot be cached."""
        assert self._lock.is_owned()
        entry = self._entries.get(block_hash)
        if entry:
            return not entry.is_same_block(parent_hash, token_bytes)
        return block_hash == self.root

    def nearest_child(self, parent_hash: BlockHash, token_bytes: bytes) -> tuple[Entry, Tier, int] | None:
        """Return the child of an entry that has most leading tokens in common with these; see `nearest_in_memory`."""
        assert self._lock.is_owned()
        parent = self._parent(parent_hash)
        below = parent.child_or_children if parent else None
        if below is None:
            return None
        if isinstance(below, Entry):
            below = Children(below)
        return nearest_in_memory(below, token_bytes)

    def find_child(self, parent: Entry, token_bytes: bytes) -> Entry | None:
        """Return the child of an entry with exactly these token ids, whatever its hash is."""
        assert self._lock.is_owned()
        below = parent.child_or_children
        if isinstance(below, Children):
            return below.find(token_bytes)
        return below if below and below.token_bytes == token_bytes else None

    def insert(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash,
        token_bytes: bytes,
        *,
        content_digest: ContentDigest | None = None,
    ) -> Entry | None:
        """Return the entry of the block, inserted if it is new; None if its hash is taken or its parent unknown.

        A new entry has no place yet: the caller attaches one, or calls `forget`.
        content_digest: given if the caller knows the parent by its hash only. A parent with another digest counts as
        unknown, because another block may have taken its hash.
        """
        assert self._lock.is_owned()
        entry = self._entries.get(block_hash)
        if entry:
            return self.get(block_hash, parent_hash, token_bytes, content_digest=content_digest)
        parent = self._parent(parent_hash)
        if block_hash == self.root or parent is None:
            return None
        if (
            content_digest is not None
            and chain_content_digest(self.content_digest_of(parent), token_bytes) != content_digest
        ):
            return None
        entry = Entry(block_hash, parent, token_bytes, self._time())
        self._entries[block_hash] = entry
        if content_digest is not None:
            self._content_digests.keep(entry, content_digest)
        below = parent.child_or_children
        if below is None:
            parent.child_or_children = entry
        elif isinstance(below, Entry):
            parent.child_or_children = Children(below, entry, num_warm=parent.warm_children)
        else:
            below.add(entry)
        if self._observe:
            self._observe(entry, None if parent is self.root_entry else parent)
        return entry

    def depth_first(self) -> Iterator[Entry]:
        """Yield every entry, parents first, and each chain without interruption."""
        assert self._lock.is_owned()
        stack = [self.root_entry]
        while stack:
            entry = stack.pop()
            if entry is not self.root_entry:
                yield entry
            stack.extend(reversed(list(entry.children)))

    def _time(self) -> float:
        """Return the time, the same float for 0.1 ms: one float for each entry would take 32 bytes."""
        now = self._clock()
        if not 0 <= now - self._now < _SAME_TIME_S:
            self._now = now
        return self._now

    def _parent(self, parent_hash: BlockHash) -> Entry | None:
        return self.root_entry if parent_hash == self.root else self._entries.get(parent_hash)

    def _prune(self, entry: Entry) -> None:
        """Drop an entry without place and children, then each parent that has neither."""
        entries = self._entries
        while (
            entry.block_id is None
            and entry.warm_slot is None
            and entry.child_or_children is None
            and not entry.flags & AWAITED
        ):
            parent = entry.parent
            below = parent.child_or_children
            if below is entry:
                parent.child_or_children = None
            elif isinstance(below, Children) and below.find(entry.token_bytes) is entry:
                below.remove(entry)
                parent.child_or_children = below.only() or below
            else:
                return  # dropped before, or the root entry
            del entries[entry.block_hash]
            if entry.depth % _KEPT_EVERY == _KEPT_EVERY - 1:
                self._content_digests.forget(entry)
            entry = parent


class ContentDigests:
    """Computes the content digests of one tree's entries.

    Every 16th digest of a chain is kept : all of them would add a fifth to the memory of an entry.
    The newest is kept too, so that to digest a chain block by block costs one sha256 a block.
    root_digest: the namespace digest. entries: the index's table, which this reads only.
    """

    def __init__(self, root_entry: Entry, root_digest: ContentDigest, entries: Mapping[BlockHash, Entry]) -> None:
        self._entries = entries
        self._root = (root_entry, root_digest)
        self._newest = self._root
        self._kept: dict[Entry, ContentDigest] = {root_entry: root_digest}

    def of(self, entry: Entry) -> ContentDigest:
        """Return an entry's content digest, computed from the nearest kept one above it."""
        chain: list[Entry] = []
        newest, content_digest = self._newest
        at = entry
        while at is not newest:
            if kept := self._kept.get(at):
                content_digest = kept
                break
            chain.append(at)
            at = at.parent
        for each in reversed(chain):
            content_digest = chain_content_digest(content_digest, each.token_bytes)
            self.keep(each, content_digest)
        return content_digest

    def keep(self, entry: Entry, content_digest: ContentDigest) -> None:
        """Keep a computed digest as the newest, and as a 16th one if its entry is in the index."""
        self._newest = entry, content_digest
        if entry.depth % _KEPT_EVERY == _KEPT_EVERY - 1 and self._entries.get(entry.block_hash) is entry:
            self._kept[entry] = content_digest

    def forget(self, entry: Entry) -> None:
        """Drop the digest of an entry that leaves the index."""
        self._kept.pop(entry, None)

    def check(self) -> None:
        """Raise AssertionError unless each kept digest is right and its entry is in the index."""
        root_entry, root_digest = self._root
        for entry, kept in self._kept.items():
            chain: list[Entry] = []
            at = entry
            while at is not root_entry:
                chain.append(at)
                at = at.parent
            assert not chain or self._entries.get(entry.block_hash) is entry, "a content digest outlived its entry"
            computed = root_digest
            for each in reversed(chain):
                computed = chain_content_digest(computed, each.token_bytes)
            assert computed == kept, "a content digest is not that of its chain"
