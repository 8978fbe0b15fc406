"""Copies in flight, their places, and the blocks that are to be written down."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tierkv.index.index import Entry
from tierkv.movers.mover import Mover, Ready
from tierkv.values.block import BlockHash, ContentDigest, Tier
from tierkv.values.locks import OwnedCondition

__all__ = ["Copies", "Job", "Place", "PlaceOwner"]


class PlaceOwner(Protocol):
    """The owner of a leased warm place, such as a connection to the daemon."""

    @property
    def mover(self) -> Mover:
        """What copies to and from such places."""

    def return_lease(self, slot: int) -> None:
        """End one lease. Never blocks."""


class Place(NamedTuple):
    """One block's place in the hot or the warm tier; tier None: a staging slot. owner: None for this cache's own."""

    tier: Tier | None
    slot: int
    owner: PlaceOwner | None = None


class Job(NamedTuple):
    """A hot block to write down, pinned for this. Its K and V are computed once `written` has passed.

    content_digest: None until the write thread computes it; a request does not wait for that. parent: the parent's
    entry, None for a first block; the chain of entries outlives their stay in the index. entry: the block's own, None
    for a partial block, which has a digest from the start.
    """

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes
    content_digest: ContentDigest | None
    parent: Entry | None
    block_id: int
    written: Ready
    entry: Entry | None = None


class Copies:
    """Copies and computations in flight, and the blocks that wait for them.

    in_flight: asynchronous copies and the warm places that they still read.
    arriving: by block id, the copy or the computation that writes it; a user of the block waits for that.
    """

    def __init__(self, mover: Mover, lock: OwnedCondition) -> None:
        self.in_flight: deque[tuple[Ready, list[Place]]] = deque()
        self.arriving: dict[int, Ready] = {}
        self._mover = mover
        self._lock = lock
        self._leaving: dict[int, Ready] = {}  # when the last user of a released sequence's block is through
        self._computing: deque[tuple[Ready, list[int]]] = deque()  # in order of their commits

    def leave(self, block_ids: Sequence[int]) -> None:
        """Note that what the current stream does with blocks so far must end before they are written again."""
        if self._mover.is_cuda:
            used = self._mover.mark()
            with self._lock:
                self._leaving.update(dict.fromkeys(block_ids, used))

    def wait_for_users(self, block_ids: Sequence[int]) -> None:
        """Make the current stream wait for all streams that still use evicted blocks; the caller holds the lock."""
        assert self._lock.is_owned()
        if self.arriving or self._leaving:
            users = [self.arriving.pop(block_id, None) for block_id in block_ids]
            users += [self._leaving.pop(block_id, None) for block_id in block_ids]
            for ready in {id(each): each for each in users if each}.values():
                ready.wait()

    def note_computing(self, block_ids: list[int], written: Ready) -> None:
        """Let users of blocks that were just committed wait until they are written: they may run on another stream.

        The caller holds the lock. On a CPU there is nothing to wait for.
        """
        assert self._lock.is_owned()
        if block_ids and not written.is_done():
            self._computing.append((written, block_ids))
            self.arriving.update(dict.fromkeys(block_ids, written))

    def written(self, entry: Entry) -> Ready:
        """Return when the bytes of a hot entry are there; the caller holds the lock."""
        assert self._lock.is_owned()
        arriving = None if entry.block_id is None else self.arriving.get(entry.block_id)
        return arriving or self._mover.mark()

    def reap(self) -> list[Place]:
        """Forget copies and computations that are done. Return the places that they read; the caller holds the lock."""
        assert self._lock.is_owned()
        while self._computing and self._computing[0][0].is_done():
            done, block_ids = self._computing.popleft()
            for block_id in block_ids:
                if self.arriving.get(block_id) is done:
                    del self.arriving[block_id]
        read: list[Place] = []
        while self.in_flight and self.in_flight[0][0].is_done():
            done, places = self.in_flight.popleft()
            self.arriving = {slot: ready for slot, ready in self.arriving.items() if ready is not done}
            read += places
        return read
