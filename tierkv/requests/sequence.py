"""Sequence: one running request's tokens and blocks. RunningSequences: all of a cache, and which use which block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError
from tierkv.movers.mover import Move, Ready
from tierkv.requests.consensus import Consensus
from tierkv.transfer.daemon_blocks import Claim
from tierkv.transfer.offload import Offloader
from tierkv.transfer.overlapped_load import OverlappedLoad
from tierkv.transfer.recompute_or_load import ColdLoad
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["BlockUsers", "Overlap", "RunningSequences", "Sequence", "SequenceOwner"]


class SequenceOwner(Protocol):
    """What a sequence needs of its cache. Each method raises ClosedError once the cache is closed."""

    def release(self, sequence: Sequence) -> None: ...
    def next_piece(self, sequence: Sequence, *, wait: bool) -> range: ...
    def record(self, sequence: Sequence, seconds: float, *, num_tokens: int | None) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and the blocks that hold their K and V; made by `TierCache.acquire`, ended by `release`.

    As a context manager it releases itself:

        with cache.acquire(token_ids) as sequence: ...

    block_table: block ids in order, enough for every token so far.
    num_cached_tokens: leading tokens whose K and V were found; the engine computes the rest.
    cached_tokens: the same, by the tier that answered.
    overlapped_load: cold blocks that load while the engine computes those in front of them; see `overlap`.
    cold_load: how `Overlap.record` counts the time of the first token.
    piece_end: tokens that `Overlap.next_piece` has given out, or that needed no computing.
    claim: announced to other processes: this one computes the rest.
    exact_tokens: leading tokens whose K and V are exact, and alone may be cached; None: all. See `mark_inexact`.

    >>> with cache.acquire(token_ids) as sequence:
    ...     sequence.num_tokens, sequence.num_cached_tokens, len(sequence.block_table)
    (9, 8, 3)
    """

    owner: SequenceOwner
    token_bytes: bytearray
    block_table: list[int]
    num_cached_tokens: int
    cached_tokens: dict[Tier, int]
    chain: list[BlockHash]
    piece_end: int
    loads: list[Ready] = field(default_factory=list)
    overlapped_load: OverlappedLoad | None = None
    cold_load: ColdLoad | None = None
    claim: Claim | None = None
    is_cacheable: bool = True
    is_released: bool = False
    exact_tokens: int | None = None

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.owner.release(self)

    @property
    def overlap(self) -> Overlap:
        """What to compute next while cold blocks load, and where to record what that took."""
        return Overlap(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, computed or not."""
        return len(self.token_bytes) // TOKEN_BYTES

    @property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        """A copy of the token ids."""
        return np.frombuffer(bytes(self.token_bytes), dtype="<u4")

    def mark_inexact(self, num_exact: int) -> None:
        """Keep nothing behind the first `num_exact` tokens: their K and V, and so all later ones, are approximate.

        `TierCache.commit` registers no token behind them, in no tier and in no partial block. It cannot be undone.
        """
        before = self.exact_tokens
        self.exact_tokens = num_exact if before is None else min(before, num_exact)

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait until the cached K and V of a layer have arrived.

        Copies that are done are forgotten, or every decode step would wait for them again, layer by layer.
        """
        if self.loads:
            self.loads = [ready for ready in self.loads if not ready.is_done()]
        for ready in self.loads:
            ready.wait(layer)

    def wait_all(self) -> None:
        """Make the current stream wait until everything cached has arrived."""
        for ready in self.loads:
            ready.wait()
        self.loads.clear()


class Overlap:
    """The overlap of loading and recomputing in one sequence: what the engine computes next, and what that took.

    `acquire(..., overlap=True)` lets the cold blocks at the end of the prefix load while the engine computes the first
    ones, piece by piece. An engine computes whatever this says, and commits it before it asks again:

        while piece := sequence.overlap.next_piece():
            compute(sequence, piece.start, piece.stop)
            cache.commit(sequence, piece.stop)
    """

    __slots__ = ("_sequence",)

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence

    @property
    def is_loading(self) -> bool:
        """Whether cold blocks of the sequence still load: `next_piece` then gives a part of what is left."""
        return self._sequence.overlapped_load is not None

    def next_piece(self, *, wait: bool = True) -> range:
        """Return the positions of the tokens to compute next. Tokens before them have K and V, loaded or computed.

        While cold blocks load, the piece is of a size that lets both sides end together. Once they are loaded, the
        piece is all the rest, and `num_cached_tokens` counts the loaded tokens too. An empty range: nothing is left to
        compute, or, with `wait=False`, the loader has to end first.
        """
        return self._sequence.owner.next_piece(self._sequence, wait=wait)

    def record(self, seconds: float, *, num_tokens: int | None = None) -> None:
        """Record what a step took; later requests load or recompute by that.

        num_tokens: new tokens of a forward pass, from its launch until its result was there. None: the time is from
        `acquire` to the first token, of a sequence that had the engine to itself.
        """
        self._sequence.owner.record(self._sequence, seconds, num_tokens=num_tokens)


class RunningSequences:
    """The sequences that are acquired and not yet released, and their references to hot blocks.

    users: how many of them use each block; code that changes a running sequence's block table updates it.
    """

    def __init__(
        self,
        tiers: Tiers,
        offloader: Offloader,
        consensus: Consensus | None,
        users: BlockUsers,
    ) -> None:
        self._tiers = tiers
        self._offloader = offloader
        self._consensus = consensus
        self._users = users
        self._sequences: set[Sequence] = set()
        self._ending: list[OverlappedLoad] = []  # of released sequences; each pins its blocks until it ends

    def require(self, sequence: Any) -> None:
        """Raise ConfigError unless this is a running sequence of this cache.

        The blocks of a released sequence may hold other K and V by now, and another cache's blocks lie elsewhere.
        """
        if isinstance(sequence, Sequence) and sequence in self._sequences:
            return
        if not isinstance(sequence, Sequence):
            raise ConfigError(f"a sequence is wanted, as acquire returns it, got {type(sequence).__name__}")
        if sequence.is_released:
            raise ConfigError("the sequence has been released")
        raise ConfigError("the sequence belongs to another cache", hint="use it with the cache that acquired it")

    def require_all(self, running: Iterable[Any]) -> list[Sequence]:
        """Return running sequences of this cache, each once. Raises ConfigError unless all of them are."""
        try:
            sequences = list(dict.fromkeys(running))
        except TypeError as exc:
            raise ConfigError(f"running must be sequences: {exc}") from exc
        for sequence in sequences:
            self.require(sequence)
        return sequences

    def add(self, sequence: Sequence) -> None:
        """Add a sequence whose blocks are pinned for it."""
        with self._tiers.changed:
            self._sequences.add(sequence)
            self._users.add(sequence.block_table)

    def append(self, sequence: Sequence, token_bytes: bytes) -> None:
        """Add tokens to a sequence and take the blocks that they need. Raises CapacityError, nothing added."""
        num_tokens = sequence.num_tokens + len(token_bytes) // TOKEN_BYTES
        missing = -(-num_tokens // self._tiers.layout.block_size) - len(sequence.block_table)
        if missing > 0:
            fresh = self._take_hot(missing, topic=token_bytes)
            with self._tiers.changed:
                sequence.block_table.extend(fresh)
                self._users.add(fresh)
        sequence.token_bytes += token_bytes

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a second sequence with the same tokens, for parallel sampling.

        Whole blocks are shared; the partly filled last block is copied. Raises CapacityError where there is no room for
        that copy, StoreError where it fails.
        """
        size = self._tiers.layout.block_size
        num_shared = sequence.num_tokens // size
        own = self._take_hot(len(sequence.block_table) - num_shared, topic=b"fork")
        forked = Sequence(
            owner=sequence.owner,
            token_bytes=bytearray(sequence.token_bytes),
            block_table=[*sequence.block_table[:num_shared], *own],
            num_cached_tokens=sequence.num_cached_tokens,
            cached_tokens=dict(sequence.cached_tokens),
            chain=list(sequence.chain),
            piece_end=sequence.piece_end,
            is_cacheable=sequence.is_cacheable,
            exact_tokens=sequence.exact_tokens,
        )
        with self._tiers.changed:
            self._tiers.index.hot.pin_all(sequence.block_table[:num_shared])
            self.add(forked)
        try:
            sequence.wait_all()
            moves = [Move(s, t) for s, t in zip(sequence.block_table[num_shared:], own, strict=True)]
            forked.loads.append(self._tiers.memory.mover.copy(moves))
        except BaseException:
            self.release(forked)
            raise
        return forked

    def _take_hot(self, count: int, *, topic: bytes) -> list[int]:
        consensus = self._consensus
        return consensus.take_hot(count, topic=topic) if consensus and count else self._offloader.take_hot(count)

    def release(self, sequence: Sequence) -> None:
        """End a sequence: registered blocks stay cached, the others are free. May be called twice."""
        with self._tiers.changed:
            if sequence.is_released:
                return
            sequence.is_released = True
            if sequence in self._sequences:  # an interrupted acquire has not added it
                self._sequences.remove(sequence)
                self._users.remove(sequence.block_table)
            self._ending = [load for load in self._ending if not load.is_done]
            if sequence.overlapped_load:
                sequence.overlapped_load.cancel()
                self._ending.append(sequence.overlapped_load)
        self._tiers.copies.leave(sequence.block_table)
        self._tiers.unpin_all(Tier.HOT, sequence.block_table)
        try:
            self._offloader.keep_room()
        finally:  # a policy may fail, but other processes wait for the claim
            self.end_claim(sequence.claim)

    def end_claim(self, claim: Claim | None) -> None:
        """End the claim to compute blocks, once the computed ones have been written down."""
        if claim and not self._offloader.after_writes(claim.end):
            claim.end()

    def wait_for_loads(self) -> None:
        """Wait until no overlapped load runs, those of released sequences included."""
        with self._tiers.changed:
            loads = [*self._ending, *self._overlapped_loads()]
        for load in loads:
            load.wait_ended()

    def cancel_loads(self) -> None:
        """Ask all overlapped loads to end soon."""
        with self._tiers.changed:
            loads = self._overlapped_loads()
        for load in loads:
            load.cancel()

    def _overlapped_loads(self) -> list[OverlappedLoad]:
        return [sequence.overlapped_load for sequence in self._sequences if sequence.overlapped_load]

    def release_all(self) -> bool:
        """End every sequence. Return whether there was none: an engine may still compute with what there was."""
        with self._tiers.changed:
            running = list(self._sequences)
        for sequence in running:
            self.release(sequence)
        return not running

    def avg_shared_blocks(self) -> float:
        """Return how many of its blocks a sequence shares with others, on average; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        return self._users.num_shared / len(self._sequences) if self._sequences else 0.0

    def check(self) -> None:
        """Raise AssertionError unless every hot block has as many references as sequences that use it.

        The caller holds the lock, and has waited for writes, loads and copies in flight: they hold references too.
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


class BlockUsers:
    """Users by block id. num_shared: the sum over all sequences of their blocks that another sequence uses too.

    Callers guard it with the cache's lock, and a sequence uses a block once.
    """

    def __init__(self) -> None:
        self.num_shared: int = 0
        self._users: dict[int, int] = {}

    def add(self, block_ids: Collection[int]) -> None:
        """Count one more user of each block."""
        users, num_shared = self._users, 0
        if users.keys().isdisjoint(block_ids):  # usually
            users.update(dict.fromkeys(block_ids, 1))
            return
        for block_id in block_ids:
            count = users[block_id] = users.get(block_id, 0) + 1
            if count > 1:
                num_shared += 2 if count == 2 else 1
        self.num_shared += num_shared

    def remove(self, block_ids: Collection[int]) -> None:
        """Count one user less of each block."""
        users, num_shared = self._users, 0
        counts = [users.pop(block_id) for block_id in block_ids]
        if counts.count(1) == len(counts):  # usually
            return
        for block_id, before in zip(block_ids, counts, strict=True):
            if count := before - 1:
                users[block_id] = count
                num_shared += 2 if count == 1 else 1
        self.num_shared -= num_shared

    def replace(self, old: int, new: int) -> None:
        """Let one user of a block use another block instead."""
        self.remove((old,))
        self.add((new,))

    def rename(self, moved: Mapping[int, int]) -> None:
        """Count the users of blocks under their new ids, old id -> new, from now on."""
        counts = {new: self._users.pop(old) for old, new in moved.items() if old in self._users}
        self._users.update(counts)

    def counted(self) -> Counter[int]:
        """Return the users by block id."""
        return Counter(self._users)
