"""The tree of known blocks: each entry lies below the entry of its parent block, and a walk compares token ids.

An entry stays as long as it has children, even when only the cold store has its bytes. So a walk goes from verified
entry to verified entry, and a block with a colliding hash never gets another block's children. A block that comes from
outside the tree, from a store for example, is compared by its content digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from tierkv.index.children import Children, nearest_in_memory
from tierkv.index.content_digests import ContentDigests
from tierkv.index.entry import AWAITED, PINNED, Entry
from tierkv.index.entry_table import EntryTable
from tierkv.values.block import TOKEN_BYTES, BlockHash, ContentDigest, Tier, chain_content_digest
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["AWAITED", "PINNED", "BlockTree", "ContentDigests", "Entry"]

_SAME_TIME_S = 1e-4


class BlockTree:
    """The entries by hash, and below their parents.

    root: the namespace digest, parent of every first block. root_entry: its entry, which is in no tier and not in the
    table, and never changes. numbers: see `EntryTable`.
    lock: guards the tree where threads share it. The caller of every method holds the lock.
    """

    def __init__(
        self, root: BlockHash, clock: Callable[[], float], lock: Owned = NO_LOCK, numbers: Sequence[int] = ()
    ) -> None:
        self._lock = lock
        self.root = root
        self._clock = clock
        self._now = clock()
        self._entries = EntryTable(numbers)
        self.root_entry: Entry = Entry(root, None, b"", self._now)
        self._content_digests = ContentDigests(self.root_entry, root, self._entries)
        self._observe: Callable[[Sequence[Entry], Entry | None], None] | None = None  # called with a chain, its parent

    def __del__(self) -> None:
        self._entries.clear()
        self.root_entry.child_or_children = None

    def now(self) -> float:
        """Return the time of the clock that accesses are recorded by; needs no lock."""
        return self._clock()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

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

    def walk(self, token_bytes: bytes, block_size: int, max_tokens: int | None = None) -> list[Entry]:
        """Return the entries of the leading whole blocks of a sequence, up to the first that is unknown.

        token_bytes: the sequence as little-endian uint32, of which no more than `max_tokens` tokens count. The walk
        compares token ids: it hashes nothing, and a collision cannot mislead it.
        """
        assert self._lock.is_owned()
        step = block_size * TOKEN_BYTES
        parent = self.root_entry
        found: list[Entry] = []
        end = len(token_bytes) if max_tokens is None else min(len(token_bytes), max_tokens * TOKEN_BYTES)
        for start in range(0, end - step + 1, step):
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
        self._entries.add(entry)
        if content_digest is not None:
            self._content_digests.keep(entry, content_digest)
        if parent.child_or_children is None:
            parent.child_or_children = entry
        else:
            self._add_child(parent, entry)
        if self._observe:
            try:
                self._observe((entry,), None if parent is self.root_entry else parent)
            except BaseException:  # of a user's policy: the caller gets no entry that it could place or forget
                self._prune_all((entry,))
                raise
        return entry

    def prune(self, entry: Entry) -> None:
        """Drop an entry that has no place, is not awaited and has no children, then each such parent."""
        assert self._lock.is_owned()
        self._prune_all((entry,))

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

    def _add_child(self, parent: Entry, entry: Entry) -> None:
        """Add a child to an entry that has some."""
        below = parent.child_or_children
        if isinstance(below, Children):
            below.add(entry)
        else:
            assert below is not None, "the first child needs no collection"
            parent.child_or_children = Children(below, entry, num_warm=parent.warm_children)

    def _parent(self, parent_hash: BlockHash) -> Entry | None:
        return self.root_entry if parent_hash == self.root else self._entries.get(parent_hash)

    def _prune_all(self, entries: Iterable[Entry]) -> None:
        """Drop entries without place and children, then each parent that has neither."""
        dropped: list[Entry] = []
        for entry in entries:
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
                    break  # dropped before, or the root entry
                dropped.append(entry)
                entry = parent
        if dropped:
            self._entries.remove_all(dropped)
            self._content_digests.forget_all(dropped)
