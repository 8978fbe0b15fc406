"""Which stored blocks belong to one prompt: what begins with it, and its own blocks in front of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tierkv.storage.cold_batch import WriteBatch, read_block_tokens
from tierkv.values.block import BlockHash

__all__ = ["StoredPrompt", "find_stored"]


@dataclass(frozen=True, slots=True)
class StoredPrompt:
    """A prompt as a store knows it. hashes: of its whole blocks. token_bytes: of all its tokens."""

    namespace: BlockHash
    hashes: Sequence[BlockHash]
    token_bytes: bytes


@dataclass(slots=True)
class Found:
    """Children before parents. behind: blocks that begin with the prompt. own: the prompt's blocks in front of them.

    num_pinned: blocks of both that are pinned, which are left out.
    """

    behind: list[BlockHash] = field(default_factory=list)
    own: list[BlockHash] = field(default_factory=list)
    num_pinned: int = 0


def find_stored(batch: WriteBatch, prompt: StoredPrompt) -> Found:
    """Return the stored blocks of a prompt; hash, parent and token ids of its own are compared."""
    own: list[BlockHash] = []
    parent, at = prompt.namespace, 0
    for block_hash in prompt.hashes:
        entry = batch.entry(block_hash)
        tokens = read_block_tokens(batch.txn, batch.databases, block_hash)
        end = at + len(tokens or b"")
        if entry is None or entry.parent != parent or not tokens or prompt.token_bytes[at:end] != tokens:
            break
        own.append(block_hash)
        parent, at = block_hash, end
    behind: list[BlockHash] = []
    if len(own) == len(prompt.hashes):
        rest = prompt.token_bytes[at:]
        behind = [own.pop()] if own and not rest else _children(batch, parent, rest)
    for block_hash in behind:  # grows while it is walked
        behind += _children(batch, block_hash, b"")
    found = Found()
    for hashes, kept in ((behind, found.behind), (own, found.own)):
        for block_hash in reversed(hashes):
            entry = batch.entry(block_hash)
            if entry is not None and entry.pinned:
                found.num_pinned += 1
            else:
                kept.append(block_hash)
    return found


def _children(batch: WriteBatch, parent: BlockHash, first_tokens: bytes) -> list[BlockHash]:
    """Return the stored blocks that continue one and begin with these tokens."""
    children = list(batch.children(parent))
    if not first_tokens:
        return children
    found = []
    for child in children:
        tokens = read_block_tokens(batch.txn, batch.databases, child)
        if tokens and tokens.startswith(first_tokens):
            found.append(child)
    return found
