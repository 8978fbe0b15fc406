"""Evict chosen blocks: those of a prompt, those of a certain age, or all.

A chosen block that is in use is marked. A marked block serves no request and is not written to a lower tier; it is
evicted after its last user has unpinned it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tierkv.index.index import Index
from tierkv.index.tree import Entry
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["CONTINUED", "IN_USE", "PINNED", "Choice", "ChosenEviction", "Evicted", "chosen_entries"]

PINNED = "pinned"
IN_USE = "in use"
CONTINUED = "continued by others that stay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The blocks that match every given condition; all blocks without a condition.

    tokens: blocks that begin with this prompt, and of the prompt's own blocks those that no other block continues.
    hashes: blocks with these hashes. unused_since: blocks last used before that time of the index's clock.
    """

    tokens: bytes = b""
    hashes: Collection[BlockHash] | None = None
    unused_since: float | None = None

    def has(self, entry: Entry) -> bool:
        """Return whether hash and age of an entry match."""
        return (self.hashes is None or entry.block_hash in self.hashes) and (
            self.unused_since is None or entry.last_access < self.unused_since
        )


@dataclass(frozen=True, slots=True)
class Evicted:
    """How many blocks were evicted, by tier, and how many stayed, by reason."""

    blocks: Counter[Tier]
    stayed: Counter[str]


def chosen_entries(root: Entry, choice: Choice, step: int) -> tuple[list[Entry], list[Entry]]:
    """Return the chosen entries below `root`, and the chosen blocks of the prompt itself: children first.

    step: bytes of the token ids of a whole block.
    """
    path: list[Entry] = []
    at = root
    tokens = choice.tokens
    while len(tokens) >= step:
        found = next((child for child in at.children if child.token_bytes == tokens[:step]), None)
        if found is None:
            return [], path[::-1]
        path.append(found)
        at, tokens = found, tokens[step:]
    if choice.tokens and not tokens:
        order = [path.pop()]
    else:
        order = [child for child in at.children if child.token_bytes.startswith(tokens)]
    for entry in order:  # the list grows in the loop
        order += entry.children
    return [entry for entry in reversed(order) if choice.has(entry)], [each for each in path[::-1] if choice.has(each)]


class ChosenEviction:
    """Evicts chosen entries of one index.

    lock: guards the index where threads share it. The caller of every method holds the lock.
    evict: makes a tier forget entries, children before parents, and returns the evicted ones.
    marked: entries that were in use when chosen; `retry` evicts them. on_mark: called with each.
    batch: returns a context for the entries that are tried one after the other in it.
    """

    def __init__(
        self,
        index: Index,
        tiers: Sequence[Tier],
        evict: Callable[[Sequence[Entry], Tier], Collection[Entry]],
        lock: Owned = NO_LOCK,
        *,
        on_mark: Callable[[Entry], None] = lambda _: None,
        batch: Callable[[Sequence[Entry]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._lock = lock
        self._on_mark = on_mark
        self._batch = batch
        self.marked: dict[Entry, None] = {}
        self._index = index
        self._tiers = tiers
        self._evict = evict

    def evict(self, root: Entry, choice: Choice, step: int) -> Evicted:
        """Evict the chosen entries below `root`; mark those in use."""
        assert self._lock.is_owned()
        wanted, path = chosen_entries(root, choice, step)
        blocks: Counter[Tier] = Counter()
        stayed: Counter[str] = Counter()
        own = set(path)
        chosen = (*wanted, *path)
        with self._batch(chosen):
            for entry in chosen:
                if entry in own and not entry.pinned and any(each not in self.marked for each in entry.children):
                    reason: str | None = CONTINUED
                else:
                    entry.in_cold = False
                    reason = self._evict_one(entry, blocks)
                if reason:
                    stayed[reason] += 1
                if reason == IN_USE:
                    self.marked[entry] = None
                    self._on_mark(entry)
        return Evicted(blocks, stayed)

    def retry(self) -> Counter[Tier]:
        """Evict the marked entries that are no longer in use; return how many blocks were evicted, by tier."""
        assert self._lock.is_owned()
        blocks: Counter[Tier] = Counter()
        if not self.marked:
            return blocks
        pending = list(self.marked)
        for entry in pending:  # no request can find a child of a marked block: mark it too
            for child in entry.children:
                if child not in self.marked and not child.pinned:
                    self.marked[child] = None
                    self._on_mark(child)
                    pending.append(child)
        with self._batch(pending):
            for entry in sorted(self.marked, key=lambda each: -each.depth):
                if self._evict_one(entry, blocks) != IN_USE:
                    del self.marked[entry]
        return blocks

    def spare(self, entry: Entry) -> None:
        """Unmark an entry: its block was computed again."""
        assert self._lock.is_owned()
        self.marked.pop(entry, None)

    def _evict_one(self, entry: Entry, blocks: Counter[Tier]) -> str | None:
        """Evict an entry from every tier. Return why one of them still has it, or None."""
        if entry.pinned:
            return PINNED
        reason = IN_USE if entry.awaited else None
        for tier in self._tiers:
            slot = entry.place(tier)
            if slot is None:
                continue
            if self._index.pool(tier).reference_count(slot):
                reason = IN_USE
            elif entry.tier_children(tier):
                held = (child for child in entry.children if child.place(tier) is not None)
                reason = reason or (IN_USE if any(child in self.marked for child in held) else CONTINUED)
            elif self._evict([entry], tier):
                blocks[tier] += 1
            elif self._index.pool(tier).reference_count(slot):  # the attempt has found a user of it
                reason = IN_USE
        return reason
