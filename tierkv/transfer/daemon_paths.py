"""Paths: the chains of blocks that the daemon is asked to take, made of the blocks that are to be written."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tierkv.daemon.messages import Chain
from tierkv.index.index import Entry
from tierkv.transfer.tiers import Job

__all__ = ["chain_of", "paths_of"]


def paths_of(jobs: Sequence[Job]) -> list[list[Job | Entry]]:
    """Return chains, from their first blocks on, that hold all jobs: jobs that follow each other share a chain."""
    pending = {job.block_hash: job for job in jobs}
    paths: list[list[Job | Entry]] = []
    for job in reversed(jobs):
        if pending.pop(job.block_hash, None) is None:
            continue
        path: list[Job | Entry] = [job]
        entry = job.parent
        while entry and entry.parent is not entry:  # the root's parent is itself
            path.append(pending.pop(entry.block_hash, entry))
            entry = entry.parent
        paths.append(path[::-1])
    return paths[::-1]


def chain_of(path: Sequence[Job | Entry], proposed: dict[int, Job]) -> Chain:
    """Return a path as the message has it. proposed: the blocks that this process has, by their number in the path."""
    return Chain(
        b"".join(each.block_hash for each in path),
        b"".join(each.token_bytes for each in path),
        array("I", sorted(proposed)).tobytes(),
    )
