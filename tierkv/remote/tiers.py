"""Warm and cold tiers that the daemon has: lent slot by slot, copied to and from directly.

The daemon's slab is mapped here, and registered with CUDA. What the socket carries is hashes, token ids and slot
numbers. Nothing in here raises at a request: without the daemon the blocks are misses, and a thread of its own
looks for it again.

The daemon takes back what it lent when the connection ends. So a connection that has failed is closed only after
the last copy from or to a lent slot has ended: until then nobody else can get that slot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierkv.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, iter_chain
from tierkv.daemon.client import Answer, DaemonClient
from tierkv.daemon.messages import (
    NO_SLOT,
    Abandon,
    Chain,
    ChainAnswer,
    Count,
    Done,
    EndTicket,
    Evict,
    Fetch,
    Fetched,
    Flush,
    Found,
    Hello,
    LoadState,
    Match,
    Message,
    Pin,
    Prefetch,
    Publish,
    Published,
    Release,
    Reserve,
    Reserved,
    Saved,
    SaveState,
    Status,
    StatusReport,
    Wait,
    Waited,
)
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError, DaemonGoneError, StoreError
from tierkv.events import EventKind
from tierkv.index import Entry
from tierkv.layout import BlockLayout
from tierkv.lookup import Hit, Lookup
from tierkv.movers.mover import Move
from tierkv.namespace import Namespace
from tierkv.remote.link import Link
from tierkv.stats import TierStats
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.tiers import Job, Place, Tiers

__all__ = ["DaemonTiers", "Ticket"]

_log = logging.getLogger(__name__)

_RECONNECT_S = 1.0
_TICK_S = 0.1
_READ_TIMEOUT_S = 30.0
_UPKEEP_TIMEOUT_S = 600.0  # of flush, save and load, which write to disks


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

    def delete(self, block_hash: BlockHash) -> int:
        """Delete nothing: the daemon does, if it must."""
        return 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """The promise to compute blocks that nobody has."""

    link: Link
    number: int


class DaemonTiers:
    """The daemon's tiers as one cache sees them. Thread-safe; satisfies `LowerTiers`.

    num_waits: how often a request has waited for another process.

    wait_s: how long a request waits for blocks that another process is computing. timeout_s: of short calls.
    Raises DaemonError if the daemon refuses this namespace or speaks another version; one that cannot be reached is
    no error: it is looked for in the background.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        path: Path,
        namespace: Namespace,
        block_size: int,
        hash_function: HashFunction,
        wait_s: float,
        timeout_s: float,
        min_tail_tokens: int,
    ) -> None:
        self.path = path
        self._tiers = tiers
        self._namespace = namespace
        self._step = block_size * TOKEN_BYTES
        self._hash = hash_function
        self._wait_s = wait_s
        self._timeout_s = timeout_s
        self._min_tail_tokens = min_tail_tokens
        self._link: Link | None = None
        self._boot = 0
        self.num_waits = 0
        self._is_closing = threading.Event()
        try:
            self._connect()
        except (DaemonGoneError, StoreError) as exc:
            _log.warning("working without the daemon until it is there: %s", exc)
        self._keeper = threading.Thread(target=self._keep, name="tierkv-daemon-link", daemon=True)
        self._keeper.start()

    @property
    def is_connected(self) -> bool:
        """Whether the daemon could be asked just now."""
        return self._link is not None

    @property
    def socket_bytes(self) -> tuple[int, int]:
        """Bytes (sent, received) over the present connection."""
        link = self._link
        return (link.client.bytes_sent, link.client.bytes_received) if link else (0, 0)

    # -- for the facade --------------------------------------------------------------------------------

    def look_further(
        self, found: Lookup, token_bytes: bytes, pinned: dict[int, Place] | None
    ) -> tuple[Lookup, Ticket | None]:
        """Return a lookup in the hot tier with what the daemon knows of the rest of the prompt.

        token_bytes: the part of the prompt that may be found. pinned: places by position in `Lookup.rest`, which
        gets those of warm hits, which are lent; None for a caller who only wants to know. The ticket, if there is
        one, is for `end_ticket`.
        The caller does not hold the lock. Waits while another process computes what is missing.
        """
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
            min_tail_tokens=self._min_tail_tokens,
            lease=pinned is not None,
            wants_ticket=pinned is not None and self._wait_s > 0,
        )
        link = self._link
        if link is None:
            return replace(found, miss=MissReason.DAEMON), None
        try:
            answer = self._ask_until_computed(link, ask, hashes)
            lookup = self._extended(link, found, answer, hashes, token_bytes, pinned)
        except DaemonError as exc:
            _log.debug("the daemon was of no help: %s", exc)
            return replace(found, miss=MissReason.DAEMON), None
        return lookup, Ticket(link, answer.ticket) if answer.ticket else None

    def end_ticket(self, ticket: Ticket) -> None:
        """Promise nothing any more: what is written by now is all that will be."""
        if not ticket.link.is_retired:
            self._post(ticket.link, EndTicket(ticket=ticket.number))

    def end_lookup(self, lookup: Lookup) -> None:
        """Nothing more of a lookup will be read: tell the daemon what is no longer needed, without the lock."""
        for hit in lookup.rest():
            if isinstance(hit.source, _DaemonBlock):
                hit.source.link.end_cursor(hit.source.cursor)
                break
        self._settle()

    def _settle(self) -> None:
        link = self._link
        if link:
            try:
                link.settle()
            except DaemonGoneError as exc:
                self._lost(link, exc)

    def set_pinned(self, token_bytes: bytes, pinned: bool) -> int:
        """Pin or unpin a prompt's blocks there. Raises DaemonError if the tenant's share is used up."""
        hashes, tokens = self._chain(token_bytes)
        return self._call(Pin(hashes=hashes, tokens=tokens, pinned=pinned), Count, _READ_TIMEOUT_S).count

    def prefetch(self, token_bytes: bytes) -> int:
        """Announce a prompt. Return how many blocks the daemon will look for; 0 if it cannot."""
        hashes, tokens = self._chain(token_bytes)
        try:
            return self._call(Prefetch(hashes=hashes, tokens=tokens), Count, self._timeout_s).count
        except DaemonError:
            return 0

    def evict(self, count: int | None) -> int:
        """Evict blocks of this namespace from the warm tier. Raises DaemonError."""
        return self._call(Evict(count=-1 if count is None else count), Count, _READ_TIMEOUT_S).count

    def flush(self) -> None:
        """Wait until everything written down is on the disk; without the daemon there is nothing to wait for."""
        try:
            self._call(Flush(), Done, _UPKEEP_TIMEOUT_S)
        except DaemonError as exc:
            _log.warning("not flushed: %s", exc)

    def save(self, path: Path) -> Saved:
        """Have the namespace's blocks written into a state file. Raises DaemonError."""
        return self._call(SaveState(path=os.fspath(path.absolute())), Saved, _UPKEEP_TIMEOUT_S)

    def load(self, path: Path) -> int:
        """Have a state file's blocks found from now on. Raises DaemonError."""
        return self._call(LoadState(path=os.fspath(path.absolute())), Count, _UPKEEP_TIMEOUT_S).count

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers; of the warm one, what this namespace has of it."""
        try:
            report = self._call(Status(), StatusReport, self._timeout_s)
        except DaemonError:
            return {Tier.WARM: TierStats(), Tier.COLD: TierStats()}
        mine = [tenant for tenant in report.tenants if tenant.namespace == self._namespace.digest.hex()]
        blocks = sum(tenant.warm_blocks for tenant in mine)
        used = blocks * self._tiers.layout.block_bytes
        warm = TierStats(blocks=blocks, used_bytes=used, stored_bytes=used, capacity_bytes=report.warm_bytes)
        if not report.cold:
            return {Tier.WARM: warm}
        cold = TierStats(
            blocks=report.cold["blocks"],
            stored_bytes=report.cold["live_bytes"],
            capacity_bytes=report.cold["quota_bytes"],
        )
        return {Tier.WARM: warm, Tier.COLD: cold}

    def close(self) -> None:
        """End the connection when copies in flight have ended. May be called twice."""
        self._is_closing.set()
        self._keeper.join()
        link, self._link = self._link, None
        if link:
            link.retire()

    # -- LowerTiers ------------------------------------------------------------------------------------

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Have cold hits, neighbours of one lookup, brought into the warm tier, and borrow them there."""
        first = hits[0].source
        assert isinstance(first, _DaemonBlock), "without the daemon there are no cold hits"
        link = first.link
        ask = Fetch(cursor=first.cursor, first=first.position, count=len(hits))
        try:
            answer = self._call_on(link, ask, Fetched, _READ_TIMEOUT_S)
            slots = split_numbers(answer.slots)
            link.lend(len(slots))
        except DaemonError:
            return [], MissReason.DAEMON
        with self._tiers.changed:
            for hit, _ in zip(hits, slots, strict=False):
                num_tokens = len(hit.token_bytes) // TOKEN_BYTES
                self._tiers.stats.bytes_out[Tier.COLD] += self._tiers.layout.packed_bytes(num_tokens)
        return [Place(Tier.WARM, slot, link) for slot in slots], _reason(answer.miss)

    def write(self, jobs: Sequence[Job]) -> None:
        """Reserve slots for the blocks that the daemon lacks, fill them, publish them.

        With each block goes its chain, and the daemon also gets those ancestors that it has lost or never had, as
        long as they are hot here.
        """
        link = self._link
        if link is None:
            self._skip(jobs)
            return
        try:
            self._write(link, jobs)
        except DaemonError as exc:
            _log.debug("%d blocks were not written to the daemon: %s", len(jobs), exc)
            self._skip(jobs)
        except StoreError as exc:
            _log.warning("%d blocks were not written to the daemon: %s", len(jobs), exc)
            self._skip(jobs)

    # -- writing ---------------------------------------------------------------------------------------

    def _write(self, link: Link, jobs: Sequence[Job]) -> None:
        paths = _paths(jobs)
        held: list[Place] = []
        try:
            with self._tiers.changed:
                offers = [self._offer(path, held) for path in paths]
            chains = [_chain_of(path, offer) for path, offer in zip(paths, offers, strict=True)]
            answer = self._call_on(link, Reserve(chains=chains), Reserved, self._timeout_s)
            for path, offer, given in zip(paths, offers, answer.chains, strict=True):
                self._fill_and_publish(link, path, offer, given)
        finally:
            self._tiers.unpin(held)

    def _offer(self, path: list[Job | Entry], held: list[Place]) -> dict[int, Job]:
        """Return the blocks of a path that can be brought: the jobs, and what is hot anyway, which is pinned.

        The caller holds the lock.
        """
        index = self._tiers.index
        written = next(each.written for each in reversed(path) if isinstance(each, Job))
        offers: dict[int, Job] = {}
        for at, each in enumerate(path):
            if isinstance(each, Job):
                offers[at] = each
            elif each.block_id is not None and index.peek(each.block_hash) is each:
                index.hot.pin(each.block_id)
                held.append(Place(Tier.HOT, each.block_id))
                ready = self._tiers.arriving.get(each.block_id, written)
                offers[at] = Job.of(each, index.seal_of(each), ready)
        return offers

    def _fill_and_publish(
        self, link: Link, path: list[Job | Entry], offers: dict[int, Job], given: ChainAnswer
    ) -> None:
        """Copy blocks into the slots that were given for them, and let everybody find them."""
        slots = split_numbers(given.slots)
        link.lend(len(slots))
        copied = [(offers[at], slot) for at, slot in zip(split_numbers(given.numbers), slots, strict=True)]
        try:
            try:
                for job, slot in copied:
                    done = link.mover.demote([Move(job.block_id, slot)], after=job.written)
                if copied:
                    done.synchronize()
            except StoreError:
                self._post(link, Abandon(slots=given.slots))
                raise
            if copied:
                self._call_on(link, Publish(slots=given.slots), Published, self._timeout_s)
        finally:
            for _ in slots:
                link.end_loan()
        self._note_written(path, copied, given)

    def _note_written(self, path: list[Job | Entry], copied: list[tuple[Job, int]], given: ChainAnswer) -> None:
        """Remember what the daemon has now. Where others write some of it too, only what was copied is certain."""
        tiers = self._tiers
        jobs = [each for each in path if isinstance(each, Job)]
        is_all_there = not (given.num_busy or given.refusal)
        certain = {job.block_hash for job, _ in copied} | ({job.block_hash for job in jobs} if is_all_there else set())
        with tiers.changed:
            for job, _ in copied:
                tiers.stats.bytes_in[Tier.WARM] += tiers.layout.packed_bytes(len(job.token_bytes) // TOKEN_BYTES)
                tiers.watch.block(EventKind.DEMOTE, Tier.WARM, job)
            for job in [*jobs, *(job for job, _ in copied)]:
                entry = tiers.index.get(job.block_hash, job.parent_hash, job.token_bytes)
                if entry and job.block_hash in certain:
                    entry.in_cold = True
            for job in jobs if given.refusal else ():
                if job.block_hash not in certain:
                    tiers.skip(job, "refused")

    def _skip(self, jobs: Iterable[Job]) -> None:
        with self._tiers.changed:
            for job in jobs:
                self._tiers.skip(job, "daemon")

    # -- reading ---------------------------------------------------------------------------------------

    def _ask_until_computed(self, link: Link, ask: Match, hashes: list[BlockHash]) -> Found:
        """Ask for a prompt; while another process computes what is missing, wait and ask again."""
        deadline = time.monotonic() + self._wait_s
        while True:
            answer = self._call_on(link, ask, Found, self._timeout_s)
            left = deadline - time.monotonic()
            if not answer.is_computing or left <= 0:
                return answer
            self._return_all(link, answer)
            self.num_waits += 1
            missing = hashes[ask.start + len(answer.slots) // 4]
            wait = Wait(block_hash=missing, timeout_ms=int(left * 1e3) + 1)
            self._call_on(link, wait, Waited, left + self._timeout_s)

    def _return_all(self, link: Link, answer: Found) -> None:
        """Hold nothing while waiting."""
        slots = array("I", (slot for slot in split_numbers(answer.slots) if slot != NO_SLOT))
        if answer.tail and answer.tail.slot != NO_SLOT:
            slots.append(answer.tail.slot)
        cursors = array("I", [answer.cursor] if answer.cursor else [])
        self._post(link, Release(slots=slots.tobytes(), cursors=cursors.tobytes()))

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
        tail, theirs = None if slots else found.tail, answer.tail
        end = start + len(slots)
        is_better = theirs is not None and (tail is None or theirs.num_tokens > tail.num_tokens)
        if theirs and is_better:
            parent = hashes[end - 1] if end else root
            tail = _hit(
                link, answer.cursor, end, theirs.slot, theirs.block_hash, parent, theirs.tokens, theirs.num_tokens
            )
        if pinned is not None:
            if tail is not found.tail:
                self._tiers.unpin(pinned.values())  # of the tail that is not used
                pinned.clear()
            if theirs and is_better:
                slots.append(theirs.slot)
            elif theirs and theirs.slot != NO_SLOT:
                link.lend(1)
                link.give_back(theirs.slot)
            lent = {at: Place(Tier.WARM, slot, link) for at, slot in enumerate(slots) if slot != NO_SLOT}
            link.lend(len(lent))
            pinned.update(lent)
        miss = _reason(answer.miss) or (None if answer.slots else found.miss)
        return Lookup(found.hot, blocks, tail, miss)

    # -- the connection --------------------------------------------------------------------------------

    def _chain(self, token_bytes: bytes) -> tuple[bytes, bytes]:
        size = self._step // TOKEN_BYTES
        chain = iter_chain(self._tiers.index.root, token_bytes, size, self._hash)
        return b"".join(block_hash for block_hash, _ in chain), token_bytes

    def _call(self, message: Message, expected: type[Answer], timeout_s: float) -> Answer:
        link = self._link
        if link is None:
            raise DaemonGoneError(f"no daemon answers at {self.path}")
        return self._call_on(link, message, expected, timeout_s)

    def _call_on(self, link: Link, message: Message, expected: type[Answer], timeout_s: float) -> Answer:
        try:
            return link.client.call(message, expected, timeout_s=timeout_s)
        except DaemonGoneError as exc:
            self._lost(link, exc)
            raise

    def _post(self, link: Link, message: Message) -> None:
        try:
            link.client.post(message)
        except DaemonGoneError as exc:
            self._lost(link, exc)

    def _lost(self, link: Link, why: DaemonError) -> None:
        with self._tiers.changed:
            if self._link is link:
                self._link = None
                _log.warning("working without the daemon until it is back: %s", why)
        link.retire()

    def _connect(self) -> None:
        hello = Hello(
            namespace=self._namespace.digest,
            description=self._namespace.describe(),
            block_bytes=self._tiers.layout.block_bytes,
            client=f"{self._namespace.name or 'model'}, process {os.getpid()}",
        )
        client = DaemonClient(self.path, hello, timeout_s=self._timeout_s)
        try:
            link = Link(client, self._tiers)
        except BaseException:
            client.close()
            raise
        with self._tiers.changed:
            if client.boot != self._boot:  # it may have forgotten everything
                for entry in self._tiers.index:
                    entry.in_cold = False
            self._boot = client.boot
            self._link = link

    def _keep(self) -> None:
        """Give back what copies on a GPU have ended with, and look for a daemon that is not there."""
        next_try = 0.0
        while not self._is_closing.wait(_TICK_S):
            with self._tiers.changed:
                self._tiers.reap()
            self._settle()
            link = self._link
            if link and link.client.has_hung_up():
                self._lost(link, DaemonGoneError(f"the daemon at {self.path} has ended"))
            if self._link is not None or time.monotonic() < next_try:
                continue
            try:
                self._connect()
                _log.info("the daemon at %s is there", self.path)
            except (DaemonError, StoreError) as exc:
                _log.debug("still without the daemon: %s", exc)
                next_try = time.monotonic() + _RECONNECT_S


def _paths(jobs: Sequence[Job]) -> list[list[Job | Entry]]:
    """Return the chains, from their first blocks on, that hold all jobs: one for those that follow each other."""
    waiting = {job.block_hash: job for job in jobs}
    paths: list[list[Job | Entry]] = []
    for job in reversed(jobs):
        if waiting.pop(job.block_hash, None) is None:
            continue
        path: list[Job | Entry] = [job]
        entry = job.parent
        while entry and entry.parent is not entry:  # the trunk's parent is itself
            path.append(waiting.pop(entry.block_hash, entry))
            entry = entry.parent
        paths.append(path[::-1])
    return paths[::-1]


def _chain_of(path: Sequence[Job | Entry], offers: dict[int, Job]) -> Chain:
    return Chain(
        b"".join(each.block_hash for each in path),
        b"".join(each.token_bytes for each in path),
        array("I", sorted(offers)).tobytes(),
    )


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
