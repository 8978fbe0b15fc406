"""RunningSequences: who uses which hot block, from a request's admission to its release."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tierkv.errors import ConfigError
from tierkv.movers.mover import Move
from tierkv.requests.block_users import BlockUsers
from tierkv.requests.consensus import Accord
from tierkv.requests.sequence import Sequence
from tierkv.transfer.daemon_blocks import Claim
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.offload import Demoter
from tierkv.transfer.split_load import SplitLoad
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, Tier

__all__ = ["RunningSequences"]


class RunningSequences:
    """The sequences that have been admitted and not yet released, and their references to hot blocks.

    users: how many of them use each block; who changes a running sequence's block table changes it too.
    """

    def __init__(
        self, tiers: Tiers, demoter: Demoter, accord: Accord, daemon: DaemonTiers | None, users: BlockUsers
    ) -> None:
        self._tiers = tiers
        self._demoter = demoter
        self._accord = accord
        self._daemon = daemon
        self._users = users
        self._sequences: set[Sequence] = set()
        self._ending: list[SplitLoad] = []  # cancelled, of released sequences; each holds its blocks until it has ended

    def require(self, sequence: Any) -> None:
        """Raise ConfigError unless this is a running sequence of this cache.

        The blocks of a released one may hold another one's K and V by now, and those of another cache lie elsewhere.
        """
        if isinstance(sequence, Sequence) and sequence in self._sequences:
            return
        if not isinstance(sequence, Sequence):
            raise ConfigError(f"a sequence is wanted, as acquire returns it, got {type(sequence).__name__}")
        if sequence.is_released:
            raise ConfigError("the sequence has been released")
        raise ConfigError("the sequence belongs to another cache", hint="use it with the cache that acquired it")

    def add(self, sequence: Sequence) -> None:
        """Take a sequence whose blocks are pinned for it."""
        with self._tiers.changed:
            self._sequences.add(sequence)
            self._users.add(sequence.block_table)

    def append(self, sequence: Sequence, token_bytes: bytes) -> None:
        """Add tokens to a sequence and take the blocks that they need. Raises CapacityError, nothing added."""
        num_tokens = sequence.num_tokens + len(token_bytes) // TOKEN_BYTES
        missing = -(-num_tokens // self._tiers.layout.block_size) - len(sequence.block_table)
        if missing > 0:
            fresh = self._accord.take_hot(missing, topic=token_bytes)
            with self._tiers.changed:
                sequence.block_table.extend(fresh)
                self._users.add(fresh)
        sequence.token_bytes += token_bytes

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a second sequence with the same tokens, for parallel sampling.

        Whole blocks are shared; the partly filled last block is copied, so that the two may part ways.
        Raises CapacityError where there is no room for that copy, StoreError where it fails.
        """
        size = self._tiers.layout.block_size
        num_shared = sequence.num_tokens // size
        own = self._accord.take_hot(len(sequence.block_table) - num_shared, topic=b"fork")
        forked = Sequence(
            token_bytes=bytearray(sequence.token_bytes),
            block_table=[*sequence.block_table[:num_shared], *own],
            num_cached_tokens=sequence.num_cached_tokens,
            cached_tokens=dict(sequence.cached_tokens),
            chain=list(sequence.chain),
            is_cacheable=sequence.is_cacheable,
        )
        with self._tiers.changed:
            self._tiers.index.hot.pin_all(sequence.block_table[:num_shared])
            self.add(forked)
        try:
            sequence.wait_all()
            moves = [Move(s, t) for s, t in zip(sequence.block_table[num_shared:], own, strict=True)]
            forked.loads.append(self._tiers.mover.copy(moves))
        except BaseException:
            self.release(forked)
            raise
        return forked

    def release(self, sequence: Sequence) -> None:
        """End a sequence: registered blocks stay cached, the others are free. May be called twice."""
        with self._tiers.changed:
            if sequence.is_released:
                return
            sequence.is_released = True
            if sequence in self._sequences:  # one that was never admitted for good is not
                self._sequences.remove(sequence)
                self._users.remove(sequence.block_table)
            self._ending = [split for split in self._ending if not split.is_done]
            if sequence.split:
                sequence.split.cancel()
                self._ending.append(sequence.split)
        self._tiers.leave(sequence.block_table)
        self._tiers.unpin_all(Tier.HOT, sequence.block_table)
        try:
            self._demoter.keep_room()
        finally:  # a policy may fail, but others wait for the promise
            self.end_claim(sequence.claim)

    def end_claim(self, claim: Claim | None) -> None:
        """End the promise to compute blocks, once those that were computed have been written down."""
        if claim and not self._demoter.after_writes(claim.end):
            claim.end()

    def wait_for_splits(self) -> None:
        """Wait until no cold block is on its way up behind a sequence, released ones included."""
        with self._tiers.changed:
            splits = [*self._ending, *(sequence.split for sequence in self._sequences if sequence.split)]
        for split in splits:
            split.wait_ended()

    def cancel_splits(self) -> None:
        """Ask the loads behind sequences to end soon."""
        with self._tiers.changed:
            splits = [sequence.split for sequence in self._sequences if sequence.split]
        for split in splits:
            split.cancel()

    def release_all(self) -> None:
        """End every sequence. Nobody else does anything with them any more."""
        with self._tiers.changed:
            running = list(self._sequences)
        for sequence in running:
            self.release(sequence)

    def avg_shared_blocks(self) -> float:
        """Return how many of its blocks a sequence shares with others, on average; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        return self._users.num_shared / len(self._sequences) if self._sequences else 0.0

    def check(self) -> None:
        """Raise AssertionError unless every hot block has as many references as sequences that use it.

        The caller holds the lock, and has waited for writes, splits and copies in flight: they hold references too.
        """
        assert self._tiers.changed.is_owned()
        users: Counter[int] = Counter()
        for sequence in self._sequences:
            users.update(sequence.block_table)
        num_shared = sum(count for count in users.values() if count > 1)
        assert self._users.counted() == users, "the users of a block are not those that are counted"
        assert self._users.num_shared == num_shared, f"{num_shared} shared blocks, {self._users.num_shared} counted"
        hot = self._tiers.index.hot
        for block_id in range(hot.capacity):
            held, count = hot.reference_count(block_id), users[block_id]
            assert held == count, f"block {block_id} has {count} users but a reference count of {held}"
