"""The values of the daemon's core: clients, namespaces, and blocks that are being loaded or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tierkv.daemon.eviction_messages import EngineEvicted
from tierkv.daemon.protocol import ProtocolError, split_hashes
from tierkv.daemon.size_class import SizeClass
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.remote_tiers.source import RemoteSource
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, ContentDigest, chain_content_digest
from tierkv.values.layout import BlockLayout

__all__ = [
    "BlockIdentifier",
    "BlockSource",
    "Claim",
    "Connection",
    "Cursor",
    "FetchTask",
    "Load",
    "Reservation",
    "Tenant",
    "Write",
    "has_hash",
    "holds",
    "is_in_some",
    "is_unknown",
    "parent_hash",
    "whole_hashes",
]


_CURSOR_BYTES = 512  # of the objects of one cursor


class StoredEntry(Protocol):
    """What a source knows of a block without reading its bytes."""

    @property
    def parent(self) -> BlockHash: ...
    @property
    def num_tokens(self) -> int: ...


class BlockSource(Protocol):
    """A tier or file below the warm tier. The core asks it for identities, not for bytes."""

    def lookup(self, block_hash: BlockHash) -> StoredEntry | None: ...
    def read_tokens(self, block_hash: BlockHash) -> bytes | None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None: ...


@dataclass(slots=True, eq=False)
class Tenant:
    """One namespace: its layout, its sources, and its share of the warm tier.

    root_hash: key of its root in the index. No client knows it, so that no block can take it.
    codec: the lossy codec of its blocks, or "". claims: by the hashes of the blocks. left_at: when its last client
    left. num_loading: fetches and loads in work. num_awaited: slots that loads and clients are filling.
    is_registered: whether the store has its description. is_of_member: no client of the daemon's user has described it.
    has_rows: its blocks are all children of the root. remote: its blocks in remote tiers, the last of the sources.
    """

    digest: BlockHash
    description: bytes
    name: str
    owner: str
    layout: BlockLayout
    size_class: SizeClass
    root_hash: BlockHash
    codec: str = ""
    has_rows: bool = False
    sources: list[BlockSource] = field(default_factory=list)
    claims: dict[BlockHash, Claim] = field(default_factory=dict)
    warm_blocks: int = 0
    pinned_bytes: int = 0
    clients: int = 0
    left_at: float = 0.0
    num_loading: int = 0
    num_awaited: int = 0
    is_registered: bool = False
    is_of_member: bool = False
    remote: RemoteSource | None = None

    @property
    def step(self) -> int:
        """Bytes of the token ids of a whole block."""
        return self.layout.block_size * TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Load:
    """A block that is being read from a source into a slot. Each fetch that waits for it has its own pin of the slot.

    num_left: pins of fetches that were answered without it. They stay until no thread writes into the slot any more.
    """

    tenant: Tenant
    entry: Entry
    slot: int
    source: BlockSource
    is_done: bool = False
    reason: MissReason | None = None
    num_left: int = 0


@dataclass(slots=True, eq=False)
class FetchTask:
    """One fetch: the slots that it has pinned, and the loads that fill some of them. fresh: those that it started."""

    slots: list[int] = field(default_factory=list)
    loads: dict[int, Load] = field(default_factory=dict)
    fresh: list[Load] = field(default_factory=list)
    miss: MissReason | None = None
    num_counted: int = 0  # in its connection's num_fetching


@dataclass(slots=True, eq=False)
class Write:
    """A published block that the store lacks. Its slot stays pinned until `finish_write`."""

    tenant: Tenant
    entry: Entry
    slot: int


@dataclass(slots=True, eq=False)
class Cursor:
    """A matched prompt, so that Fetch can name its blocks by number. partial_block: (hash, tokens) of block `total`.

    hashes: of the `total` whole blocks, 16 bytes each: a list of them would take three times as much memory.
    """

    hashes: bytes
    tokens: bytes
    total: int
    partial_block: tuple[bytes, bytes] | None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return (
            len(self.hashes)
            + len(self.tokens)
            + (len(self.partial_block[1]) if self.partial_block else 0)
            + _CURSOR_BYTES
        )


@dataclass(slots=True, eq=False)
class Claim:
    """The promise of a connection to compute these blocks."""

    number: int
    connection: Connection
    hashes: set[BlockHash]
    expires_at: float


@dataclass(slots=True, eq=False)
class Reservation:
    """A slot that a connection writes a block into."""

    connection: Connection
    tenant: Tenant
    entry: Entry
    slot: int


@dataclass(slots=True, eq=False)
class Connection:
    """What one client holds. All of it ends with the connection.

    num_leases: the sum of `leases`. num_fetching: slots pinned by its fetches in work, which become leases.
    claims: by number, those that expire first in front. num_claimed: blocks of all its claims.
    asks_for_evictions: whether it drops its own copies of evicted blocks. evicted_number, evicted: the last eviction
    that it has applied, and its report of that. has_flags: whether it leases known blocks by flags.
    """

    tenant: Tenant | None = None
    client: str = ""
    has_flags: bool = False
    leases: Counter[int] = field(default_factory=Counter)
    num_leases: int = 0
    num_fetching: int = 0
    reservations: dict[int, Reservation] = field(default_factory=dict)
    cursors: dict[int, Cursor] = field(default_factory=dict)
    cursor_bytes: int = 0
    claims: dict[int, Claim] = field(default_factory=dict)
    num_claimed: int = 0
    is_closed: bool = False
    asks_for_evictions: bool = False
    evicted_number: int = 0
    evicted: EngineEvicted | None = None

    def require_tenant(self) -> Tenant:
        """Return the namespace of this connection. Raises ProtocolError if it named none."""
        if self.tenant is None:
            raise ProtocolError("this connection named no namespace when it said hello")
        return self.tenant


class BlockIdentifier:
    """Computes the identities of blocks in the daemon's index, content digests included. Not thread-safe.

    A block that follows the one asked for before costs one digest; any other block costs one for each block before it.
    """

    def __init__(self) -> None:
        self._newest: tuple[Entry, ContentDigest] | None = None

    def identify(self, tenant: Tenant, entry: Entry) -> BlockInfo:
        """Return the identity of a block of this namespace, for reading or storing it."""
        return BlockInfo(
            block_hash=entry.block_hash,
            parent=entry.parent_hash if entry.depth > 1 else tenant.digest,  # the root's own hash is secret
            namespace=tenant.digest,
            content_digest=self._content_digest_of(tenant, entry),
            token_bytes=entry.token_bytes,
        )

    def _content_digest_of(self, tenant: Tenant, entry: Entry) -> ContentDigest:
        newest, digest = self._newest or (None, tenant.digest)
        chain: list[Entry] = []
        at = entry
        while at.depth > 0 and at is not newest:
            chain.append(at)
            at = at.parent
        if at is not newest:
            digest = tenant.digest
        for each in reversed(chain):
            digest = chain_content_digest(digest, each.token_bytes)
        self._newest = entry, digest
        return digest


def whole_hashes(tenant: Tenant, hashes: bytes, tokens: bytes, *, most: int) -> list[bytes]:
    """Return the hashes of a prompt's whole blocks. Raises ProtocolError unless they fit the tokens, `most` at most."""
    count = len(hashes) // HASH_BYTES
    if len(hashes) % HASH_BYTES or len(tokens) % TOKEN_BYTES or count != len(tokens) // tenant.step:
        raise ProtocolError(f"{len(hashes)} bytes of block hashes for {len(tokens)} bytes of token ids")
    if count > most:
        raise ProtocolError(f"a prompt of {count} blocks, {most} at most")
    return split_hashes(hashes)


def parent_hash(tenant: Tenant, hashes: Sequence[bytes], at: int) -> BlockHash:
    """Return the hash that block `at` of a prompt follows, as sources and clients know it."""
    return hashes[at - 1] if at and not tenant.has_rows else tenant.digest


def is_unknown(known: Sequence[Entry | None], at: int) -> bool:
    """Return whether the walk of a prompt ended at this block, or found no such row."""
    return known[at] is None if at < len(known) else at == len(known)


def is_in_some(
    sources: Sequence[BlockSource], block_hash: BlockHash, parent: BlockHash, num_tokens: int
) -> tuple[bool, bool]:
    """Return whether some source has a block of that hash, parent and length, and whether one failed."""
    has_failed = False
    for source in sources:
        try:
            stored = source.lookup(block_hash)
        except StoreError:
            has_failed = True
            continue
        if stored and stored.parent == parent and stored.num_tokens == num_tokens:
            return True, has_failed
    return False, has_failed


def has_hash(source: BlockSource, block_hash: BlockHash) -> bool:
    """Return whether a source has some block of that hash."""
    try:
        return source.lookup(block_hash) is not None
    except StoreError:
        return False


def holds(source: BlockSource, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes, at: int) -> bool:
    """Return whether a source has this very block: hash, parent and token ids are the same."""
    parent = parent_hash(tenant, hashes, at)
    try:
        stored = source.lookup(hashes[at])
        return (
            stored is not None
            and stored.parent == parent
            and source.read_tokens(hashes[at]) == tokens[at * tenant.step : (at + 1) * tenant.step]
        )
    except StoreError:
        return False
