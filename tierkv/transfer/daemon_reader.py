"""RemoteReader: looks further for prompts in the daemon's tiers, and borrows the blocks that are there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tierkv.daemon.messages import NO_SLOT, Fetch, Fetched, Found, Match
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.transfer.daemon_connection import LinkKeeper
from tierkv.transfer.daemon_link import Link
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.single_flight import Claim, SingleFlight
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, iter_chain
from tierkv.values.layout import BlockLayout

__all__ = ["RemoteReader"]

_log = logging.getLogger(__name__)

_READ_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class _DaemonBlock:
    """The number under which the daemon has a block. Satisfies `ColdSource`, as one that has nothing itself."""

    link: Link
    cursor: int
    position: int

    def lookup(self, block_hash: BlockHash) -> None:
        """Return None: only the daemon can look."""

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> None:
        """Return None: only the daemon can look."""

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Do nothing: the daemon does."""

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Return True: what the daemon must fetch only it knows."""
        return True

    def read_into(
        self,
        expected: BlockInfo,
        out: npt.NDArray[np.uint8],
        *,
        layout: BlockLayout,
        coded: CodedBlock | None = None,
    ) -> MissReason | None:
        """Return that it cannot be read from here."""
        return MissReason.DAEMON

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Do nothing: the daemon does."""


class RemoteReader:
    """Reads through the daemon: no byte travels, what is found is lent slot by slot. Raises nothing at a request."""

    def __init__(
        self,
        tiers: Tiers,
        keeper: LinkKeeper,
        flight: SingleFlight,
        *,
        block_size: int,
        min_partial_tokens: int,
        hash_function: HashFunction,
    ) -> None:
        self._tiers = tiers
        self._keeper = keeper
        self._flight = flight
        self._step = block_size * TOKEN_BYTES
        self._min_partial_tokens = min_partial_tokens
        self._hash = hash_function

    def look_further(
        self, found: Lookup, token_bytes: bytes, pinned: dict[int, Place] | None
    ) -> tuple[Lookup, Claim | None]:
        """Return a lookup in the hot tier with what the daemon knows of the rest of the prompt.

        token_bytes: the part of the prompt that may be found. pinned: places by position in `Lookup.rest`, which
        gets those of warm hits, which are lent; None for a caller who only wants to know. The claim, if there is
        one, is for `end_claim`.
        The caller does not hold the lock. Waits while another process computes what is missing.
        """
        assert not self._tiers.changed.is_owned()
        if found.num_tokens * TOKEN_BYTES >= len(token_bytes):
            return found, None
        hashes = [entry.block_hash for entry in found.hot]
        start = len(hashes)
        parent = hashes[-1] if hashes else self._tiers.index.root
        rest = token_bytes[start * self._step :]
        hashes += [block_hash for block_hash, _ in iter_chain(parent, rest, self._step // TOKEN_BYTES, self._hash)]
        ask = Match(
            hashes=b"".join(hashes),
            tokens=token_bytes,
            start=start,
            min_partial_tokens=self._min_partial_tokens,
            lease=pinned is not None,
            wants_claim=pinned is not None and self._flight.is_on,
        )
        link = self._keeper.link
        if link is None:
            return replace(found, miss=MissReason.DAEMON), None
        try:
            answer = self._flight.ask(link, ask, hashes)
            lookup = self._extended(link, found, answer, hashes, token_bytes, pinned)
        except DaemonError as exc:
            _log.debug("the daemon was of no help: %s", exc)
            return replace(found, miss=MissReason.DAEMON), None
        return lookup, Claim(link, answer.claim) if answer.claim else None

    def end_lookup(self, lookup: Lookup) -> None:
        """Nothing more of a lookup will be read: tell the daemon what is no longer needed.

        The caller does not hold the lock.
        """
        assert not self._tiers.changed.is_owned()
        for hit in lookup.rest():
            if isinstance(hit.source, _DaemonBlock):
                hit.source.link.end_cursor(hit.source.cursor)
                break
        self._keeper.settle()

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Have cold hits, neighbours of one lookup, brought into the warm tier, and borrow them there."""
        first = hits[0].source
        assert isinstance(first, _DaemonBlock), "without the daemon there are no cold hits"
        link = first.link
        ask = Fetch(cursor=first.cursor, first=first.position, count=len(hits))
        try:
            answer = self._keeper.call_on(link, ask, Fetched, timeout_s=_READ_TIMEOUT_S)
            slots = split_numbers(answer.slots)
            link.lend(slots)
        except DaemonError:
            return [], MissReason.DAEMON
        with self._tiers.changed:
            for hit, _ in zip(hits, slots, strict=False):
                num_tokens = len(hit.token_bytes) // TOKEN_BYTES
                self._tiers.stats.bytes_out[Tier.COLD] += self._tiers.layout.packed_bytes(num_tokens)
        return [Place(Tier.WARM, slot, link) for slot in slots], _reason(answer.miss)

    def _extended(
        self,
        link: Link,
        found: Lookup,
        answer: Found,
        hashes: list[BlockHash],
        token_bytes: bytes,
        pinned: dict[int, Place] | None,
    ) -> Lookup:
        """Return what the hot tier and the daemon have together, and note what is lent."""
        start, root = len(found.hot), self._tiers.index.root
        assert not found.blocks, "without own lower tiers there is nothing behind the hot blocks"
        blocks: list[Hit] = []
        slots = split_numbers(answer.slots)
        for at, slot in enumerate(slots, start):
            tokens = token_bytes[at * self._step : (at + 1) * self._step]
            parent = hashes[at - 1] if at else root
            blocks.append(_hit(link, answer.cursor, at, slot, hashes[at], parent, tokens, len(tokens) // TOKEN_BYTES))
        partial_block, theirs = None if slots else found.partial_block, answer.partial_block
        end = start + len(slots)
        is_better = theirs is not None and (partial_block is None or theirs.num_tokens > partial_block.num_tokens)
        if theirs and is_better:
            parent = hashes[end - 1] if end else root
            partial_block = _hit(
                link, answer.cursor, end, theirs.slot, theirs.block_hash, parent, theirs.tokens, theirs.num_tokens
            )
        if pinned is not None:
            if theirs and is_better:
                slots.append(theirs.slot)
            elif theirs and theirs.slot != NO_SLOT:
                link.lend([theirs.slot])
                link.give_back(theirs.slot)
            lent = {at: Place(Tier.WARM, slot, link) for at, slot in enumerate(slots) if slot != NO_SLOT}
            link.lend(
                [place.slot for place in lent.values()]
            )  # raises where the connection was closed meanwhile: then all stays as it was found
            if partial_block is not found.partial_block:
                self._tiers.unpin(pinned.values())  # of the partial block that is not used
                pinned.clear()
            pinned.update(lent)
        miss = _reason(answer.miss) or (None if answer.slots else found.miss)
        return Lookup(found.hot, blocks, partial_block, miss)


def _hit(
    link: Link,
    cursor: int,
    at: int,
    slot: int,
    block_hash: BlockHash,
    parent: BlockHash,
    tokens: bytes,
    num_tokens: int,
) -> Hit:
    tier = Tier.COLD if slot == NO_SLOT else Tier.WARM
    return Hit(block_hash, parent, tokens, num_tokens, tier, None, _DaemonBlock(link, cursor, at))


def _reason(miss: str) -> MissReason | None:
    try:
        return MissReason(miss) if miss else None
    except ValueError:
        return MissReason.DAEMON
