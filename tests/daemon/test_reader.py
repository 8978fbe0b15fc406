"""What a request reads through the daemon when the connection ends in the midst of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tierkv.daemon.messages import Found, FoundPartial
from tierkv.errors import DaemonGoneError
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.daemon_blocks import DaemonBlocks
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.tiers import Place
from tierkv.values.block import HASH_BYTES, Tier, hash_block
from tierkv.values.locks import OwnedCondition

ROOT = bytes(HASH_BYTES)
TOKENS = bytes(16)
PARTIAL = Hit(b"h" * HASH_BYTES, ROOT, TOKENS, 1, Tier.HOT, None, None)


def test_a_hot_partial_block_stays_pinned_if_the_connection_is_closed_before_a_better_one_is_leased() -> None:
    def lease(count: int) -> None:
        raise DaemonGoneError("the connection to the daemon was closed")

    theirs = FoundPartial(b"d" * HASH_BYTES, TOKENS, num_tokens=3, slot=5)
    answer = Found(slots=b"", partial_block=theirs, cursor=0, claim=0, is_computing=False, miss="")
    unpinned: list[Place] = []
    tiers: Any = SimpleNamespace(index=SimpleNamespace(root=ROOT), unpin=unpinned.extend, changed=OwnedCondition())
    connection: Any = SimpleNamespace(lease=lease, match=lambda _: answer)
    blocks = DaemonBlocks(
        tiers,
        lambda: connection,
        block_size=4,
        hash_function=hash_block,
        wait_s=0,
        timeout_s=1,
        min_partial_tokens=1,
    )
    pinned = {0: Place(Tier.HOT, 7)}
    lookup, _ = blocks.look_further(Lookup([], [], PARTIAL, None), TOKENS, pinned)
    assert (lookup.partial_block, lookup.miss) == (PARTIAL, MissReason.DAEMON)
    assert pinned == {0: Place(Tier.HOT, 7)} and not unpinned
