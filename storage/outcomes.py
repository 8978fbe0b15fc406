"""Reasons of misses, and outcomes of puts."""

from __future__ import annotations

from enum import Enum

__all__ = ["MissReason", "PutOutcome"]


class MissReason(Enum):
    """Why a block was not served. Every miss is counted under one of these."""

    ABSENT = "absent"
    EVICTED = "evicted"  # absent, and known to have been evicted since this process opened the store
    CORRUPT = "corrupt"  # its bytes do not match their checksum or header
    FORMAT = "format"  # whole, but in a version or codec that this code does not know; it stays where it is
    TRUNCATED = "truncated"  # its record ends before its header says
    NAMESPACE = "namespace"  # the same hash, stored for another model, dtype, layout or salt
    COLLISION = "collision"  # the same hash for other token ids, or for the same ids after other blocks
    TOO_SHORT = "too_short"  # too few tokens to be worth loading; counted by the caller that decides that
    NO_ROOM = "no_room"  # all blocks or slots that it could be promoted or copied to are in use or pinned
    RECOMPUTED = "recomputed"  # it was there, but computing it was faster than waiting for it
    IO_ERROR = "io_error"
    OTHER_RANK = "other_rank"  # this rank has it, but another rank of the model does not
    DAEMON = "daemon"  # the daemon that has the lower tiers could not be reached
    REMOTE = "remote"  # the remote tier that has it did not answer in time, or refused


class PutOutcome(Enum):
    """The outcome of putting one record."""

    STORED = "stored"
    EXISTS = "exists"  # the same block was there already
    COLLISION = "collision"  # another block with the same hash is there; it stays
    NO_PARENT = "no_parent"  # its parent is not in the store, though another with its hash may be
    FORMAT = "format"  # its hash belongs to a block that another version wrote; that block stays
    FULL = "full"  # no room even after evicting
    TENANT_LIMIT = "tenant_limit"  # its tenant has as much as it may, and none of that may be evicted
    BUSY = "busy"  # another process has kept the store's write lock for too long
    IO_ERROR = "io_error"
