"""RemoteWriter: writes blocks into slots that the daemon gives for them."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence

from tierkv.daemon.messages import Abandon, Chain, ChainAnswer, Publish, Published, Reserve, Reserved
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError, StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move
from tierkv.transfer.daemon_connection import LinkKeeper
from tierkv.transfer.daemon_link import Link
from tierkv.transfer.tiers import Job, Place, Tiers
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.events import EventKind

__all__ = ["RemoteWriter"]

_log = logging.getLogger(__name__)


class RemoteWriter:
    """Reserves slots, fills them, publishes them. A block that cannot be written is skipped and counted."""

    def __init__(self, tiers: Tiers, keeper: LinkKeeper) -> None:
        self._tiers = tiers
        self._keeper = keeper

    def write(self, jobs: Sequence[Job]) -> None:
        """Reserve slots for the blocks that the daemon lacks, fill them, publish them.

        With each block goes its chain, and the daemon also gets those ancestors that it has lost or never had, as
        long as they are hot here.
        """
        link = self._keeper.link
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

    def _write(self, link: Link, jobs: Sequence[Job]) -> None:
        paths = _paths(jobs)
        held: list[Place] = []
        try:
            with self._tiers.changed:
                offers = [self._offer(path, held) for path in paths]
            chains = [_chain_of(path, offer) for path, offer in zip(paths, offers, strict=True)]
            answer = self._keeper.call_on(link, Reserve(chains=chains), Reserved)
            for path, offer, given in zip(paths, offers, answer.chains, strict=True):
                self._fill_and_publish(link, path, offer, given)
        finally:
            self._tiers.unpin(held)

    def _offer(self, path: list[Job | Entry], held: list[Place]) -> dict[int, Job]:
        """Return the blocks of a path that can be brought: the jobs, and what is hot anyway, which is pinned.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        index, marked = self._tiers.index, self._tiers.chosen.marked
        written = next(each.written for each in reversed(path) if isinstance(each, Job))
        offers: dict[int, Job] = {}
        for at, each in enumerate(path):
            if isinstance(each, Job):
                offers[at] = each
            elif each in marked:
                continue
            elif each.block_id is not None and index.peek(each.block_hash) is each:
                index.hot.pin(each.block_id)
                held.append(Place(Tier.HOT, each.block_id))
                ready = self._tiers.copies.arriving.get(each.block_id, written)
                offers[at] = self._tiers.job_of(each, ready)
        return offers

    def _fill_and_publish(
        self, link: Link, path: list[Job | Entry], offers: dict[int, Job], given: ChainAnswer
    ) -> None:
        """Copy blocks into the slots that were given for them, and let everybody find them."""
        slots = split_numbers(given.slots)
        link.begin_writing(slots)
        copied = [(offers[at], slot) for at, slot in zip(split_numbers(given.numbers), slots, strict=True)]
        try:
            try:
                for job, slot in copied:
                    done = link.mover.demote([Move(job.block_id, slot)], after=job.written)
                if copied:
                    done.synchronize()
            except StoreError:
                link.end_writing(slots)
                self._keeper.post(link, Abandon(slots=given.slots))
                raise
        finally:
            link.end_writing(slots)
        if copied:
            self._keeper.call_on(link, Publish(slots=given.slots), Published)
        self._note_written(link, path, copied, given)

    def _note_written(
        self, link: Link, path: list[Job | Entry], copied: list[tuple[Job, int]], given: ChainAnswer
    ) -> None:
        """Remember what the daemon has now. Where others write some of it too, only what was copied is certain."""
        tiers = self._tiers
        jobs = [each for each in path if isinstance(each, Job)]
        is_all_there = not (given.num_busy or given.refusal)
        certain = {job.block_hash for job, _ in copied} | ({job.block_hash for job in jobs} if is_all_there else set())
        with tiers.changed:
            for job, _ in copied:
                tiers.stats.bytes_in[Tier.WARM] += tiers.layout.packed_bytes(len(job.token_bytes) // TOKEN_BYTES)
                tiers.observers.block(EventKind.DEMOTE, Tier.WARM, job)
            for job in [*jobs, *(job for job, _ in copied)]:
                entry = tiers.index.get(job.block_hash, job.parent_hash, job.token_bytes)
                if entry and job.block_hash in certain and self._keeper.link is link:  # or it is another daemon by now
                    entry.in_cold = True
            for job in jobs if given.refusal else ():
                if job.block_hash not in certain:
                    tiers.skip(job, "refused")

    def _skip(self, jobs: Iterable[Job]) -> None:
        with self._tiers.changed:
            for job in jobs:
                self._tiers.skip(job, "daemon")


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
