"""SingleFlight: of several processes that lack the same blocks one computes them, the others wait."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tierkv.daemon.messages import NO_SLOT, EndClaim, Found, Match, Release, Wait, Waited
from tierkv.daemon.protocol import split_numbers
from tierkv.transfer.daemon_connection import LinkKeeper
from tierkv.transfer.daemon_link import Link
from tierkv.values.block import BlockHash

__all__ = ["Claim", "SingleFlight"]

_MOST_VAIN_WAITS = 3
"""Waits in a row that bring no block. A few are in order: who computes dies, and another one takes over."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The promise to compute blocks that nobody has."""

    link: Link
    number: int


class SingleFlight:
    """Asks for prompts, waits for others, and ends the promises made to them.

    wait_s: how long a request waits for blocks that another process is computing; 0: it neither waits nor promises.
    num_waits: how often one has waited.
    """

    def __init__(self, keeper: LinkKeeper, *, wait_s: float) -> None:
        self.num_waits = 0
        self._keeper = keeper
        self._wait_s = wait_s

    @property
    def is_on(self) -> bool:
        """Whether a request asks for a claim."""
        return self._wait_s > 0

    def ask(self, link: Link, ask: Match, hashes: Sequence[BlockHash]) -> Found:
        """Ask for a prompt; while another process computes what is missing, wait and ask again.

        hashes: those of `ask`. What is missing is missing here: the blocks before `ask.start` are not, though the
        daemon may have lost them, and another process compute them. So what the daemon calls being computed need not
        be what this one waits for, and the wait for that ends at once: hence the bound on waits that bring nothing.
        Raises DaemonError.
        """
        deadline = time.monotonic() + self._wait_s
        most_found, num_vain = -1, 0
        while True:
            answer = self._keeper.call_on(link, ask, Found)
            num_found = ask.start + len(answer.slots) // 4
            num_vain = 0 if num_found > most_found else num_vain + 1
            most_found = max(most_found, num_found)
            if num_found >= len(hashes):
                return self._without_claim(link, answer)
            left = deadline - time.monotonic()
            if not answer.is_computing or left <= 0 or num_vain >= _MOST_VAIN_WAITS:
                return answer
            self._return_all(link, answer)
            self.num_waits += 1
            wait = Wait(block_hash=hashes[num_found], timeout_ms=int(left * 1e3) + 1)
            self._keeper.call_on(link, wait, Waited, timeout_s=left + self._keeper.timeout_s)

    def end(self, claim: Claim) -> None:
        """Promise nothing any more: what is written by now is all that will be."""
        if not claim.link.is_retired:
            self._keeper.post(claim.link, EndClaim(claim=claim.number))

    def _without_claim(self, link: Link, answer: Found) -> Found:
        """Promise nothing where nothing is to be computed: others would wait for blocks that are only hot here."""
        if answer.claim:
            self.end(Claim(link, answer.claim))
            answer.claim = 0
        return answer

    def _return_all(self, link: Link, answer: Found) -> None:
        """Hold nothing while waiting."""
        slots = array("I", (slot for slot in split_numbers(answer.slots) if slot != NO_SLOT))
        if answer.partial_block and answer.partial_block.slot != NO_SLOT:
            slots.append(answer.partial_block.slot)
        cursors = array("I", [answer.cursor] if answer.cursor else [])
        self._keeper.post(link, Release(slots=slots.tobytes(), cursors=cursors.tobytes()))
