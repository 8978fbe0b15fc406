"""What must hold of an index at any time, found out by looking at all of it."""

from __future__ import annotations

from collections.abc import Mapping

from tierkv.index.entry import Entry
from tierkv.index.slots import SlotPool
from tierkv.values.block import BlockHash, Tier

__all__ = ["check_places", "check_tree"]


def check_places(tier: Tier, pool: SlotPool[Entry], known: Mapping[BlockHash, Entry]) -> None:
    """Raise AssertionError unless the tier's places and the entries agree on who lies where."""
    pool.check()
    for slot, owner in enumerate(pool.owners):
        assert owner is None or (owner.place(tier) == slot and known.get(owner.block_hash) is owner), (
            f"{tier} slot {slot} has a stale owner"
        )
    for entry in known.values():
        place = entry.place(tier)
        assert place is None or pool.owners[place] is entry, "an entry does not own its place"


def check_tree(trunk: Entry, known: Mapping[BlockHash, Entry]) -> None:
    """Raise AssertionError unless the entries are one tree below the trunk, each wanted and counted by its parent."""
    num_children = 0
    for parent in (trunk, *known.values()):
        children = list(parent.children)
        num_children += len(children)
        tokens = [child.token_bytes for child in children]
        assert tokens == sorted(set(tokens)), "children are out of order"
        for child in children:
            assert child.parent is parent and child.depth == parent.depth + 1
            assert known.get(child.block_hash) is child, "a child is not in the table"
        for tier in (Tier.HOT, Tier.WARM):
            held = sum(child.place(tier) is not None for child in children)
            assert parent.tier_children(tier) == held, "child count is off"
        has_bytes = parent.block_id is not None or parent.warm_slot is not None
        is_wanted = has_bytes or children or parent.awaited or parent is trunk
        assert is_wanted, "an entry without bytes and children stayed"
    assert num_children == len(known), "an entry is not its parent's child"
