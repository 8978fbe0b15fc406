"""How far a prompt is stored under one namespace, in which tier, and what is stored where it parts."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import NO_SLOT, Found, Hello, Match
from tierkv.daemon.protocol import split_numbers
from tierkv.storage.cold import ColdStore
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier, iter_chain
from tierkv.values.namespace import parse_description

__all__ = ["Parting", "StoredMatch", "match_in_daemon", "match_in_store"]

_MOST_CHILDREN = 256  # of one block, of which the last used one is shown


@dataclass(frozen=True, slots=True)
class Parting:
    """What is stored where a prompt parts from it.

    token_bytes: of the block that shares most tokens, from the parting token on, as little-endian uint32. num_others:
    further blocks that follow the same block.
    """

    token_bytes: bytes
    num_others: int


@dataclass(frozen=True, slots=True)
class StoredMatch:
    """How far a prompt is stored. parent: the last whole block that is, or the namespace. num_whole: such blocks.

    num_tokens: of the prompt, from the first. by_tier: the same tokens by the fastest tier that has them.
    parting: None where nothing is stored that follows `parent` in another way.
    """

    parent: BlockHash
    num_whole: int
    num_tokens: int
    by_tier: Counter[Tier] = field(default_factory=Counter)
    parting: Parting | None = None


def match_in_store(store: ColdStore, namespace: BlockHash, token_bytes: bytes, *, block_size: int) -> StoredMatch:
    """Return how far a prompt is stored. token_bytes: the tokens that may be found: all of a prompt but the last.

    Entries are compared, as a request does before it reads; the records are not read, so damage is not seen.
    """
    parent, num_whole = namespace, 0
    for block_hash, _ in iter_chain(namespace, token_bytes, block_size):
        entry = store.lookup(block_hash)
        if entry is None or entry.parent != parent or entry.num_tokens != block_size:
            break
        parent, num_whole = block_hash, num_whole + 1
    rest = token_bytes[num_whole * block_size * TOKEN_BYTES :]
    found = store.find_longest_run(parent, rest) if rest else None
    run = found[2] if found else 0
    num_tokens = num_whole * block_size + run
    return StoredMatch(
        parent, num_whole, num_tokens, Counter({Tier.COLD: num_tokens}), _parting(store, parent, found, run)
    )


def match_in_daemon(socket: Path, description: bytes, token_bytes: bytes, matched: StoredMatch | None) -> StoredMatch:
    """Return how far a daemon has a prompt, its warm tier first. matched: what its store has, where it has one.

    description: the namespace's, as it is stored. The daemon leases nothing and notes no use. Raises DaemonError.
    """
    described = parse_description(description)
    size = described.layout.block_size
    hello = Hello(
        namespace=described.digest,
        description=description,
        block_bytes=described.layout.block_bytes,
        client=f"explain, process {os.getpid()}",
    )
    hashes = [block_hash for block_hash, _ in iter_chain(described.digest, token_bytes, size)]
    with DaemonClient(socket, hello) as client:
        found = client.call(Match(hashes=b"".join(hashes), tokens=token_bytes), Found)
    slots = split_numbers(found.slots)
    by_tier: Counter[Tier] = Counter()
    for slot in slots:
        by_tier[Tier.COLD if slot == NO_SLOT else Tier.WARM] += size
    rest = b""
    if partial := found.partial_block:
        by_tier[Tier.COLD if partial.slot == NO_SLOT else Tier.WARM] += partial.num_tokens
        rest = partial.tokens[partial.num_tokens * TOKEN_BYTES :]
    if matched and by_tier.total() <= matched.num_tokens:
        by_tier[Tier.COLD] += matched.num_tokens - by_tier.total()
        return replace(matched, by_tier=by_tier)
    parting = Parting(rest, 0) if rest else None  # of what is in its memory, and not in its store yet
    parent = hashes[len(slots) - 1] if slots else described.digest
    return StoredMatch(parent, len(slots), by_tier.total(), by_tier, parting)


def _parting(
    store: ColdStore, parent: BlockHash, found: tuple[BlockHash, bytes, int] | None, run: int
) -> Parting | None:
    """Return what is stored after the common tokens, from the block that shares most or the last used of others."""
    children = store.children(parent)
    if found is None:
        shown = children[:_MOST_CHILDREN]
        entries = zip(shown, store.lookup_many(shown), strict=True)
        known = [(entry.last_access, child) for child, entry in entries if entry]
        if not known:
            return None
        child = max(known)[1]
        token_bytes = store.read_tokens(child) or b""
    else:
        child, token_bytes, _ = found
    rest = token_bytes[run * TOKEN_BYTES :]
    if not rest and found:  # the stored block ends here, and is no whole one of this prompt's
        return None
    return Parting(rest, len(children) - 1)
