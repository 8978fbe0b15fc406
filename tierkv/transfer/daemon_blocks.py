"""DaemonBlocks: finds, reads and writes the blocks of one cache in the daemon's tiers."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tierkv.daemon.messages import (
    NO_SLOT,
    Abandon,
    ChainAnswer,
    EndClaim,
    Fetch,
    Fetched,
    Found,
    Match,
    Publish,
    Published,
    Release,
    Reserve,
    Reserved,
    Wait,
    Waited,
)
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError, StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move, Mover, Ready
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.transfer.daemon_connection import DaemonConnection, miss_reason
from tierkv.transfer.daemon_paths import chain_of, paths_of
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.tiers import Job, Place, Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, iter_chain
from tierkv.values.events import EventKind
from tierkv.values.layout import BlockLayout

__all__ = ["Claim", "DaemonBlocks"]

Connection: TypeAlias = DaemonConnection[Mover]

_log = logging.getLogger(__name__)

_READ_TIMEOUT_S = 30.0
_MOST_VAIN_WAITS = 3
"""Waits in a row without a new block. A few are normal: the process that computes ends, and another one takes over."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The promise of this process to compute blocks that no tier has. Other processes wait for them."""

    connection: Connection
    number: int

    def end(self) -> None:
        """Compute the blocks no more. The blocks that are written by now are all that will be."""
        if not self.connection.is_retired:
            self.connection.post(EndClaim(claim=self.number))


@dataclass(frozen=True, slots=True)
class _DaemonBlock:
    """The number of a block in a cursor of the daemon. Satisfies `ColdSource`: the daemon alone looks and reads."""

    connection: Connection
    cursor: int
    position: int
    is_remote = False  # only the daemon knows what it must fetch, also from beyond this machine

    def lookup(self, block_hash: BlockHash) -> None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> None: ...
    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None: ...
    def note_damaged(self, block_hash: BlockHash) -> None: ...

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Return True: only the daemon knows."""
        return True

    def read_into(
        self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None:
        """Return that it cannot be read from here."""
        return MissReason.DAEMON


class DaemonBlocks:
    """Leases blocks to read, reserves slots to write. No block's bytes travel. Thread-safe; satisfies `LowerTiers`.

    Nothing here raises for a block that cannot be had or written: it is a miss, or is skipped and counted.
    connected: returns the present connection. wait_s: how long a request waits for blocks that another process
    computes; 0: it neither waits nor claims. num_waits: how often a request has waited.
    """

    def __init__(
        self,
        tiers: Tiers,
        connected: Callable[[], Connection | None],
        *,
        block_size: int,
        hash_function: HashFunction,
        wait_s: float,
        timeout_s: float,
        min_partial_tokens: int,
    ) -> None:
        self.num_waits: int = 0
        self._tiers = tiers
        self._connected = connected
        self._step = block_size * TOKEN_BYTES
        self._hash = hash_function
        self.wait_s = wait_s
        self._timeout_s = timeout_s
        self._min_partial_tokens = min_partial_tokens

    def look_further(
        self, found: Lookup, token_bytes: bytes, pinned: dict[int, Place] | None, *, wait: bool = True
    ) -> tuple[Lookup, Claim | None]:
        """Return a lookup in the hot tier with what the daemon has of the rest of the prompt.

        token_bytes: the part of the prompt that may be found. pinned: places by position in `Lookup.rest`; those of
        warm hits, which are leased, are added. None: lease and claim nothing. The claim, if there is one, is for the
        caller to end.
        The caller does not hold the lock. With `wait` it waits while another process computes what is missing.
        """
        assert not self._tiers.changed.is_owned()
        if found.num_tokens * TOKEN_BYTES >= len(token_bytes):
            return found, None
        ask, hashes = self._question(found, token_bytes, lease=pinned is not None)
        connection = self._connected()
        if connection is None:
            return replace(found, miss=MissReason.DAEMON), None
        try:
            answer = self.match(connection, ask, hashes, wait=wait)
            lookup = self._extended(connection, found, answer, hashes, token_bytes, pinned)
        except DaemonError as exc:
            _log.debug("the daemon's blocks are misses: %s", exc)
            return replace(found, miss=MissReason.DAEMON), None
        return lookup, Claim(connection, answer.claim) if answer.claim else None

    def match(self, connection: Connection, ask: Match, hashes: Sequence[BlockHash], *, wait: bool = True) -> Found:
        """Match a prompt; while another process computes what is missing, wait and match again. Raises DaemonError.

        hashes: those of `ask`. The blocks before `ask.start` are hot here. The daemon may have lost them, and another
        process may compute them: the wait for such a block ends at once. Hence the bound on waits without a new block.
        """
        deadline = time.monotonic() + (self.wait_s if wait else 0)
        most_found, num_vain = -1, 0
        while True:
            answer = connection.match(ask)
            num_found = ask.start + len(answer.slots) // 4
            num_vain = 0 if num_found > most_found else num_vain + 1
            most_found = max(most_found, num_found)
            if num_found >= len(hashes):
                if answer.claim:  # nothing is to be computed: others would wait for blocks that are only hot here
                    Claim(connection, answer.claim).end()
                    answer.claim = 0
                return answer
            left = deadline - time.monotonic()
            if not answer.is_computing or left <= 0 or num_vain >= _MOST_VAIN_WAITS:
                return answer
            _return_all(connection, answer)
            self.num_waits += 1
            question = Wait(block_hash=hashes[num_found], timeout_ms=int(left * 1e3) + 1)
            connection.call(question, Waited, timeout_s=left + self._timeout_s)

    def computed_elsewhere(self, found: Lookup, token_bytes: bytes) -> int | None:
        """Return how many leading tokens there are, here or there, if another process computes the block after them.

        found, token_bytes: as for `look_further`. None if no other process computes it, and if the daemon is gone. A
        process that itself has claims gets the answer too: its caller does not block, so no two processes wait for
        each other.
        """
        ask, hashes = self._question(found, token_bytes, lease=False)
        connection = self._connected()
        if connection is None or ask.start >= len(hashes):
            return None
        try:
            num_found = ask.start + len(connection.match(ask).slots) // 4
            if num_found >= len(hashes):
                return None
            waited = connection.call(Wait(block_hash=hashes[num_found], timeout_ms=0), Waited)
        except DaemonError:
            return None
        return num_found * (self._step // TOKEN_BYTES) if waited.is_over else None

    def _question(self, found: Lookup, token_bytes: bytes, *, lease: bool) -> tuple[Match, list[BlockHash]]:
        """Return the question what the daemon has after the hot blocks, and the hashes of the prompt's whole blocks."""
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
            lease=lease,
            wants_claim=lease and self.wait_s > 0,
        )
        return ask, hashes

    def end_lookup(self, lookup: Lookup) -> None:
        """Notify the daemon which cursor and leases of a lookup have ended.

        The caller does not hold the lock.
        """
        assert not self._tiers.changed.is_owned()
        for hit in lookup.rest():
            if isinstance(hit.source, _DaemonBlock):
                hit.source.connection.end_cursor(hit.source.cursor)
                break
        if connection := self._connected():
            connection.send_returned()

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Have cold hits, neighbours of one lookup, loaded into the warm tier, and lease them there."""
        first = hits[0].source
        assert isinstance(first, _DaemonBlock), "without the daemon there are no cold hits"
        connection = first.connection
        ask = Fetch(cursor=first.cursor, first=first.position, count=len(hits))
        try:
            answer = connection.call(ask, Fetched, timeout_s=_READ_TIMEOUT_S)
            slots = split_numbers(answer.slots)
            connection.lease(slots)
        except DaemonError:
            return [], MissReason.DAEMON
        with self._tiers.changed:
            for hit, _ in zip(hits, slots, strict=False):
                num_tokens = len(hit.token_bytes) // TOKEN_BYTES
                self._tiers.stats.bytes_out[Tier.COLD] += self._tiers.layout.token_bytes * num_tokens
        return [Place(Tier.WARM, slot, connection) for slot in slots], miss_reason(answer.miss)

    def write(self, jobs: Sequence[Job]) -> None:
        """Reserve slots for the blocks that the daemon lacks, fill and publish them.

        The daemon also gets those ancestors of the blocks that it lacks and that are hot here.
        """
        connection = self._connected()
        if connection is None or connection.is_reader:
            self._skip(jobs, "daemon" if connection is None else "read_only")
            return
        try:
            self._write(connection, jobs)
        except (DaemonError, StoreError) as exc:
            level = logging.DEBUG if isinstance(exc, DaemonError) else logging.WARNING
            _log.log(level, "%d blocks were not written to the daemon: %s", len(jobs), exc)
            self._skip(jobs)

    def _extended(
        self,
        connection: Connection,
        found: Lookup,
        answer: Found,
        hashes: list[BlockHash],
        token_bytes: bytes,
        pinned: dict[int, Place] | None,
    ) -> Lookup:
        """Return what the hot tier and the daemon have together, and note what is leased."""
        start, root = len(found.hot), self._tiers.index.root
        assert not found.blocks, "without own lower tiers only hot blocks are found"

        def hit(at: int, slot: int, block_hash: BlockHash, tokens: bytes, num_tokens: int) -> Hit:
            parent = hashes[at - 1] if at else root
            tier = Tier.COLD if slot == NO_SLOT else Tier.WARM
            source = _DaemonBlock(connection, answer.cursor, at)
            return Hit(block_hash, parent, tokens, num_tokens, tier, None, source)

        slots = split_numbers(answer.slots)
        blocks: list[Hit] = []
        for at, slot in enumerate(slots, start):
            tokens = token_bytes[at * self._step : (at + 1) * self._step]
            blocks.append(hit(at, slot, hashes[at], tokens, len(tokens) // TOKEN_BYTES))
        partial_block, theirs = None if slots else found.partial_block, answer.partial_block
        is_better = theirs is not None and (partial_block is None or theirs.num_tokens > partial_block.num_tokens)
        if theirs and is_better:
            partial_block = hit(start + len(slots), theirs.slot, theirs.block_hash, theirs.tokens, theirs.num_tokens)
        if pinned is not None:
            if theirs and is_better:
                slots.append(theirs.slot)
            elif theirs and theirs.slot != NO_SLOT:
                connection.lease([theirs.slot])
                connection.return_lease(theirs.slot)
            leased = {at: Place(Tier.WARM, slot, connection) for at, slot in enumerate(slots) if slot != NO_SLOT}
            connection.lease([place.slot for place in leased.values()])  # where it raises, `pinned` is as before
            if partial_block is not found.partial_block:
                self._tiers.unpin(pinned.values())  # of the partial block that is not used
                pinned.clear()
            pinned.update(leased)
        miss = miss_reason(answer.miss) or (None if answer.slots else found.miss)
        return Lookup(found.hot, blocks, partial_block, miss)

    def _write(self, connection: Connection, jobs: Sequence[Job]) -> None:
        paths = paths_of(jobs)
        held: list[Place] = []
        try:
            with self._tiers.changed:
                proposed = [self._propose(path, held) for path in paths]
            chains = [chain_of(path, proposal) for path, proposal in zip(paths, proposed, strict=True)]
            answer = connection.call(Reserve(chains=chains), Reserved)
            unused = list(answer.chains)
            try:
                for path, proposal in zip(paths, proposed, strict=True):
                    self._fill_and_publish(connection, path, proposal, unused.pop(0))
            finally:
                for given in unused:  # after a failure
                    connection.post(Abandon(slots=given.slots))
        finally:
            self._tiers.unpin(held)

    def _propose(self, path: list[Job | Entry], held: list[Place]) -> dict[int, Job]:
        """Return the blocks of a path that this process has: the jobs, and other hot blocks, which are pinned.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        index, marked = self._tiers.index, self._tiers.chosen.marked
        written = next(each.written for each in reversed(path) if isinstance(each, Job))
        proposed: dict[int, Job] = {}
        for at, each in enumerate(path):
            if isinstance(each, Job):
                proposed[at] = each
            elif each in marked:
                continue
            elif each.block_id is not None and index.peek(each.block_hash) is each:
                index.hot.pin(each.block_id)
                held.append(Place(Tier.HOT, each.block_id))
                ready = self._tiers.copies.arriving.get(each.block_id, written)
                proposed[at] = self._tiers.job_of(each, ready)
        return proposed

    def _fill_and_publish(
        self, connection: Connection, path: list[Job | Entry], proposed: dict[int, Job], given: ChainAnswer
    ) -> None:
        """Copy blocks into the slots that were given for them, then publish them."""
        slots = split_numbers(given.slots)
        connection.begin_writing(slots)
        copied = [(proposed[at], slot) for at, slot in zip(split_numbers(given.numbers), slots, strict=True)]
        done: Ready | None = None
        try:
            try:
                for job, slot in copied:
                    done = connection.mover.demote([Move(job.block_id, slot)], after=job.written)
            finally:
                if done:
                    done.synchronize()
        except StoreError:
            connection.end_writing(slots)
            connection.post(Abandon(slots=given.slots))
            raise
        finally:
            connection.end_writing(slots)
        if copied:
            connection.call(Publish(slots=given.slots), Published)
        self._note_written(connection, path, copied, given)

    def _note_written(
        self, connection: Connection, path: list[Job | Entry], copied: list[tuple[Job, int]], given: ChainAnswer
    ) -> None:
        """Note which blocks the daemon has now. Where another process writes some, only copied blocks are certain."""
        tiers = self._tiers
        jobs = [each for each in path if isinstance(each, Job)]
        is_all_there = not (given.num_busy or given.refusal)
        certain = {job.block_hash for job, _ in copied} | ({job.block_hash for job in jobs} if is_all_there else set())
        with tiers.changed:
            for job, _ in copied:
                tiers.stats.bytes_in[Tier.WARM] += tiers.layout.token_bytes * (len(job.token_bytes) // TOKEN_BYTES)
                tiers.observers.block(EventKind.DEMOTE, Tier.WARM, job)
            is_present = self._connected() is connection  # else it may be another daemon by now
            for job in [*jobs, *(job for job, _ in copied)]:
                entry = tiers.index.get(job.block_hash, job.parent_hash, job.token_bytes)
                if entry and job.block_hash in certain and is_present:
                    entry.in_cold = True
            for job in jobs if given.refusal else ():
                if job.block_hash not in certain:
                    tiers.skip(job, "refused")

    def _skip(self, jobs: Iterable[Job], reason: str = "daemon") -> None:
        with self._tiers.changed:
            for job in jobs:
                self._tiers.skip(job, reason)


def _return_all(connection: Connection, answer: Found) -> None:
    """Return what an answer has leased: hold nothing while waiting."""
    slots = array("I", (slot for slot in split_numbers(answer.slots) if slot != NO_SLOT))
    if answer.partial_block and answer.partial_block.slot != NO_SLOT:
        slots.append(answer.partial_block.slot)
    cursors = array("I", [answer.cursor] if answer.cursor else [])
    connection.post(Release(slots=slots.tobytes(), cursors=cursors.tobytes()))
