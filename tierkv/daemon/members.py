"""Members: the processes of a group that may read from a daemon of another user, and what they may ask.

A member gets a descriptor of the slab that cannot be written through, and no slot to write into: K and V in the slab
are not checked again, so each process that writes decides what all others compute with. The kernel says which process
is a member: by its group ids when it connected. Where the kernel does not say so, it is none.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct

from tierkv.daemon.eviction_messages import EvictionDone, EvictionsSince
from tierkv.daemon.messages import (
    EndClaim,
    Fetch,
    Flush,
    Hello,
    Match,
    Message,
    Prefetch,
    Release,
    Status,
    Wait,
)

__all__ = [
    "groups_of_peer",
    "is_for_members",
    "read_only_descriptor",
]

_SO_PEERGROUPS = 59  # Linux 4.13
_MAX_GROUPS = 65_536
_CREDENTIALS = struct.Struct("iII")

_FOR_MEMBERS = (Hello, Match, Fetch, Release, Wait, EndClaim, Prefetch, Flush, Status, EvictionsSince, EvictionDone)


def is_for_members(message: Message) -> bool:
    """Return whether a member may send a message: it changes no block, names no file and stops nothing."""
    return isinstance(message, _FOR_MEMBERS)


def groups_of_peer(connection: socket.socket) -> frozenset[int]:
    """Return the group ids of the process at the other end, as the kernel noted them when it connected.

    Where the system does not have the supplementary groups, only the effective group.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    groups = (ctypes.c_uint32 * _MAX_GROUPS)()
    length = ctypes.c_uint32(ctypes.sizeof(groups))
    arguments = connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(length)
    count = 0
    if ctypes.CDLL(None).getsockopt(*arguments) == 0:  # Python's own reads 1 KiB at most
        count = length.value // ctypes.sizeof(ctypes.c_uint32)
    return frozenset((_CREDENTIALS.unpack(packed)[2], *groups[:count]))


def read_only_descriptor(fd: int) -> int:
    """Return another descriptor of anonymous memory, through which no process can write. Raises OSError.

    The memory is made private to its owner first: else a process could open it for writing by the descriptor's name in
    /proc. Its owner and root can; other users cannot.
    """
    os.fchmod(fd, stat.S_IRUSR | stat.S_IWUSR)
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
