"""Which prefixes fill a cache: the tree of its blocks, summed up by runs of blocks without a branch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierkv.values.block import BlockHash, Tier
from tierkv.values.events import BlockEvent, EventKind, MemoryRegion, RequestEvent, Span

__all__ = ["PrefixTable", "PrefixUse"]

_ARRIVALS = (EventKind.REGISTER, EventKind.PROMOTE, EventKind.DEMOTE)


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """A run of blocks without a branch: a prefix that prompts share until they differ, or the rest of one prompt.

    block_hash: of its last block. first_token: tokens before the run. hits: of blocks of the run.
    num_bytes: of its blocks in the tiers of the table; a block in two tiers counts twice.
    """

    block_hash: BlockHash
    first_token: int
    num_tokens: int
    blocks: dict[Tier, int]
    num_bytes: int
    hits: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "block": self.block_hash.hex(),
            "first_token": self.first_token,
            "tokens": self.num_tokens,
            "blocks": {tier.value: count for tier, count in self.blocks.items()},
            "bytes": self.num_bytes,
            "hits": self.hits,
        }


@dataclass(slots=True, eq=False)
class _Node:
    """A block that some tier holds. first_token: tokens before it."""

    block_hash: BlockHash
    parent: _Node | None
    first_token: int
    num_tokens: int
    num_bytes: int
    tiers: set[Tier] = field(default_factory=set)
    children: list[_Node] = field(default_factory=list)
    hits: int = 0


class PrefixTable:
    """The blocks that some tiers hold, by default the tiers in memory. Satisfies `CacheObserver`; thread-safe."""

    def __init__(self, tiers: Collection[Tier] = (Tier.HOT, Tier.WARM)) -> None:
        self._tiers = tiers
        self._nodes: dict[BlockHash, _Node] = {}
        self._lock = threading.Lock()

    def largest(self, count: int) -> list[PrefixUse]:
        """Return up to `count` runs, most bytes first. Linear in the number of blocks."""
        with self._lock:
            heads = [node for node in self._nodes.values() if _begins_a_run(node)]
            uses = [_use_of(head, self._tiers) for head in heads]
        return sorted(uses, key=lambda use: (-use.num_bytes, -use.hits))[:count]

    def count_hits(self, block_hash: BlockHash, count: int) -> None:
        """Add earlier hits of a block, if the table has it."""
        with self._lock:
            if node := self._nodes.get(block_hash):
                node.hits += count

    def on_memory(self, region: MemoryRegion) -> None:
        """Ignore it."""

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Ignore it."""

    def on_span(self, span: Span) -> None:
        """Ignore it."""

    def on_block(self, event: BlockEvent) -> None:
        """Add or remove a block."""
        if event.tier not in self._tiers:
            return
        assert event.tier
        with self._lock:
            node = self._nodes.get(event.block_hash)
            if event.kind in _ARRIVALS and (
                event.slot is not None or event.tier is Tier.COLD
            ):  # else a daemon holds it
                (node or self._add(event)).tiers.add(event.tier)
            elif event.kind is EventKind.EVICT and node:
                node.tiers.discard(event.tier)
                self._prune(node)

    def on_request(self, event: RequestEvent) -> None:
        """Count the hits."""
        with self._lock:
            for block in event.blocks:
                node = self._nodes.get(block.block_hash)
                if node and block.kind is EventKind.HIT:
                    node.hits += 1

    def _add(self, event: BlockEvent) -> _Node:
        parent = self._nodes.get(event.parent_hash)
        first_token = parent.first_token + parent.num_tokens if parent else 0
        node = _Node(event.block_hash, parent, first_token, event.num_tokens, event.num_bytes)
        if parent:
            parent.children.append(node)
        self._nodes[event.block_hash] = node
        return node

    def _prune(self, node: _Node | None) -> None:
        """Remove nodes that no tier holds and that have no children, from a leaf up."""
        while node and not node.tiers and not node.children:
            del self._nodes[node.block_hash]
            if node.parent:
                node.parent.children.remove(node)
            node = node.parent


def _begins_a_run(node: _Node) -> bool:
    return node.parent is None or len(node.parent.children) > 1


def _use_of(head: _Node, tiers: Iterable[Tier]) -> PrefixUse:
    run = [head]
    while len(run[-1].children) == 1:
        run.append(run[-1].children[0])
    blocks: Counter[Tier] = Counter(tier for node in run for tier in node.tiers)
    return PrefixUse(
        block_hash=run[-1].block_hash,
        first_token=head.first_token,
        num_tokens=sum(node.num_tokens for node in run),
        blocks={tier: blocks[tier] for tier in tiers},
        num_bytes=sum(node.num_bytes * len(node.tiers) for node in run),
        hits=sum(node.hits for node in run),
    )
