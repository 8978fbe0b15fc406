"""The tree of known blocks: an entry hangs under that of its parent block, and is found by following token ids.

An entry stays as long as it has children, even when its own bytes lie only in the cold store: so a chain is followed
from verified entry to verified entry, and a block stored later under a colliding hash can never adopt another's
children. What comes from outside the tree (a block read from a store, one written down behind the request) is known
by its content digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from tierkv.index.children import Siblings
from tierkv.index.content_digests import KEPT_EVERY, ContentDigests
from tierkv.index.entry import AWAITED, Entry
from tierkv.values.block import TOKEN_BYTES, BlockHash, ContentDigest, Tier, chain_content_digest, common_run
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["BlockTree"]

_NEAREST = 32
_SAME_TIME_S = 1e-4


class BlockTree:
    """Entries by hash and by what they follow. root: the namespace digest, parent of every first block.

    lock: guards the tree where threads share it. The caller of every method holds the lock.
    """

    def __init__(self, root: BlockHash, clock: Callable[[], float], lock: Owned = NO_LOCK) -> None:
        self._lock = lock
        self.root = root
        self._clock = clock
        self._now = clock()
        self._entries: dict[BlockHash, Entry] = {}
        self._trunk = Entry(root, None, b"", self._now)  # stands for the root, and is not in the table
        self._content_digests = ContentDigests(self._trunk, root, self._entries)
        self._observe: Callable[[Entry, Entry | None], None] | None = None  # told of an insertion, and its parent

    @property
    def root_entry(self) -> Entry:
        """What the first blocks of all chains hang under; it is in no tier, stays the same, and needs no lock."""
        return self._trunk

    def now(self) -> float:
        """Return the time by which accesses are noted; needs no lock."""
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
        """Return the entry of exactly this block. None if it is unknown, and on a hash collision."""
        assert self._lock.is_owned()
        entry = self._entries.get(block_hash)
        if entry is None or not entry.is_same_block(parent_hash, token_bytes):
            return None
        return entry if content_digest is None or content_digest == self.content_digest_of(entry) else None

    def content_digest_of(self, entry: Entry) -> ContentDigest:
        """Return what proves an entry, computed if it is not kept; also of one that has just gone."""
        assert self._lock.is_owned()
        return self._content_digests.of(entry)

    def content_digest_after(self, parent_hash: BlockHash, token_bytes: bytes) -> ContentDigest:
        """Return the digest of a block, perhaps a partial one, behind an entry (or the root) that the caller holds."""
        assert self._lock.is_owned()
        parent = self._parent(parent_hash)
        assert parent is not None, "the parent of what is to be sealed has gone"
        return chain_content_digest(self.content_digest_of(parent), token_bytes)

    def peek(self, block_hash: BlockHash) -> Entry | None:
        """Return whatever entry has this hash: the caller compares its identity."""
        assert self._lock.is_owned()
        return self._entries.get(block_hash)

    def walk(self, token_bytes: bytes, block_size: int) -> list[Entry]:
        """Return the entries of the leading whole blocks of a sequence, up to the first that is unknown.

        token_bytes: the sequence as little-endian uint32. The tree is followed by token ids, so nothing is hashed
        and no collision can lead astray.
        """
        assert self._lock.is_owned()
        step = block_size * TOKEN_BYTES
        parent = self._trunk
        found: list[Entry] = []
        for start in range(0, len(token_bytes) - step + 1, step):
            family = parent.family
            if family is None:
                break
            tokens = token_bytes[start : start + step]
            if isinstance(family, Siblings):
                child = family.find(tokens)
            else:
                child = family if family.token_bytes == tokens else None
            if child is None:
                break
            found.append(child)
            parent = child
        return found

    def collides(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Tell whether another block has taken this hash, so that this one cannot be cached."""
        assert self._lock.is_owned()
        entry = self._entries.get(block_hash)
        if entry:
            return not entry.is_same_block(parent_hash, token_bytes)
        return block_hash == self.root

    def children(self, parent_hash: BlockHash) -> list[Entry]:
        """Return the entries that continue the block (or, for the root, begin a chain)."""
        assert self._lock.is_owned()
        parent = self._parent(parent_hash)
        return list(parent.children) if parent else []

    def nearest_child(self, parent_hash: BlockHash, token_bytes: bytes) -> tuple[Entry, Tier, int] | None:
        """Return the child whose token ids have most in common with these, its tier, and how many they have.

        Only children with bytes in the hot or the warm tier, and one token or more in common. Of equals a hot one,
        if there is one among the 32 nearest on either side: there may be a hundred thousand.
        """
        assert self._lock.is_owned()
        parent = self._parent(parent_hash)
        family = parent.family if parent else None
        if family is None:
            return None
        if isinstance(family, Entry):
            family = Siblings(family)
        best: tuple[Entry, Tier, int] | None = None
        for side in (family.upwards(token_bytes), family.downwards(token_bytes)):
            best = _nearest(islice(side, _NEAREST), token_bytes, best)
        return best

    def find_child(self, parent: Entry, token_bytes: bytes) -> Entry | None:
        """Return the child of an entry with exactly these token ids, whatever its hash."""
        assert self._lock.is_owned()
        family = parent.family
        if isinstance(family, Siblings):
            return family.find(token_bytes)
        return family if family and family.token_bytes == token_bytes else None

    def insert(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash,
        token_bytes: bytes,
        *,
        content_digest: ContentDigest | None = None,
    ) -> Entry | None:
        """Return the entry of the block, made if need be. None if its hash is taken or its parent unknown.

        A new entry has no place yet: attach one, or call `forget`.
        content_digest: of a block whose parent the caller does not hold, and so knows by the hash alone: another block
        may
        have that hash by now. Then that is an unknown parent too.
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
        family = parent.family
        if family is None:
            parent.family = entry
        elif isinstance(family, Entry):
            parent.family = Siblings(family, entry, num_warm=parent.warm_children)
        else:
            family.add(entry)
        if self._observe:
            self._observe(entry, None if parent is self._trunk else parent)
        return entry

    def depth_first(self) -> Iterator[Entry]:
        """Yield every entry, parents first, and what continues a block right behind it, as far as it does not part."""
        assert self._lock.is_owned()
        stack = [self._trunk]
        while stack:
            entry = stack.pop()
            if entry is not self._trunk:
                yield entry
            stack.extend(reversed(list(entry.children)))

    def _time(self) -> float:
        """Return the time, the same float for a while: a float of its own would cost every entry 32 bytes."""
        now = self._clock()
        if not 0 <= now - self._now < _SAME_TIME_S:
            self._now = now
        return self._now

    def _parent(self, parent_hash: BlockHash) -> Entry | None:
        return self._trunk if parent_hash == self.root else self._entries.get(parent_hash)

    def _prune(self, entry: Entry) -> None:
        """Drop an entry without place and children, and those above it that are left without."""
        entries = self._entries
        while entry.block_id is None and entry.warm_slot is None and entry.family is None and not entry.flags & AWAITED:
            parent = entry.parent
            family = parent.family
            if family is entry:
                parent.family = None
            elif isinstance(family, Siblings) and family.find(entry.token_bytes) is entry:
                family.remove(entry)
                parent.family = family.only() or family
            else:
                return  # it had been dropped before, or is the trunk
            del entries[entry.block_hash]
            if entry.depth % KEPT_EVERY == KEPT_EVERY - 1:
                self._content_digests.forget(entry)
            entry = parent


def _nearest(
    children: Iterable[Entry], token_bytes: bytes, best: tuple[Entry, Tier, int] | None
) -> tuple[Entry, Tier, int] | None:
    """Return the best of `best` and some children, of which each has at most as much in common as the one before."""
    has_warm = False
    for child in children:
        if best and not child.token_bytes.startswith(token_bytes[: best[2] * TOKEN_BYTES]):
            break
        if child.block_id is None and (has_warm or child.warm_slot is None):
            continue
        if child.token_bytes[:TOKEN_BYTES] != token_bytes[:TOKEN_BYTES]:
            break
        run = common_run(child.token_bytes, token_bytes)
        tier = Tier.WARM if child.block_id is None else Tier.HOT
        if best is None or run > best[2] or (tier is Tier.HOT and best[1] is Tier.WARM):
            best = (child, tier, run)
        if best[1] is Tier.HOT:
            break
        has_warm = True
    return best
