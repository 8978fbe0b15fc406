"""Lease flags: a client leases blocks that it knows without asking the daemon, and the daemon can evict all the same.

Every slot has a generation, in memory that the daemon writes and the clients read. Every connection has a byte for each
slot, its flag, that the client writes and the daemon reads. An answer of the daemon names a block's slot and the slot's
generation. To lease the block again the client sets its flag, then reads the generation. If it is that of the answer,
the slot holds that block still, and will until the flag is cleared. If not, the client clears the flag and asks the
daemon. To evict a block the daemon raises the generation, orders the memory accesses of all clients (`order_all`), then
reads the flags. If one is set, the block stays. So of a client and the daemon at least one sees the other, wherever
either of them is stopped or killed. Flags end with their connection, as leases do. Source: hazard pointers (Michael,
2004), with the asymmetric fence of Linux's membarrier.

A generation never comes back. A block that may not be found any more gets a new one at once.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from array import array
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tierkv.daemon.membarrier import order_all, register
from tierkv.daemon.messages import NO_SLOT
from tierkv.errors import StoreError

__all__ = ["GENERATION_BYTES", "LeaseFlags", "map_flags", "map_generations"]

GENERATION_BYTES = 8
_FIXED_SIZE = 0x0006  # Linux's F_SEAL_SHRINK and F_SEAL_GROW
_SEALED, _READ_ONLY = 0x0001, 0x0010  # F_SEAL_SEAL; F_SEAL_FUTURE_WRITE: no other process may map it to write


class LeaseFlags:
    """The generations of the slots of one size class, and the flags of its clients. Only the daemon's loop uses it."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.descriptor, memory = _make("tierkv-generations", num_slots * GENERATION_BYTES, _READ_ONLY)
        self._generations: npt.NDArray[np.uint64] = np.frombuffer(memory, dtype=np.uint64)
        self._generations[:] = 1
        self._flags: dict[Hashable, npt.NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, num_slots: int) -> LeaseFlags | None:
        """Return flags for so many slots, or None where this system has no barrier between processes."""
        if not hasattr(os, "memfd_create") or not (register() and order_all()):
            return None
        try:
            return cls(num_slots)
        except OSError:  # no memory, no descriptor, or a kernel that knows no such seal
            return None

    def connect(self, client: Hashable) -> int | None:
        """Return a descriptor of a client's flags, which the caller closes. None if there is no memory for them."""
        try:
            descriptor, memory = _make("tierkv-lease-flags", self.num_slots, 0)
        except OSError:
            return None
        self._flags[client] = np.frombuffer(memory, dtype=np.uint8)
        return descriptor

    def disconnect(self, client: Hashable) -> None:
        """End the flags of a client that has ended. May be called twice, and for a client without flags."""
        self._flags.pop(client, None)

    def try_disconnect(self, client: Hashable) -> bool:
        """End the flags of a client that may still use them, unless one is set. Return whether they have ended.

        The client may not notice soon, so nothing that it knows may be leased by a flag any more: the generations of
        all slots are raised, and every client asks again.
        """
        flags = self._flags.get(client)
        if flags is None:
            return True
        if flags.any():
            return False
        self._generations += np.uint64(1)
        if not order_all() or flags.any():
            return False
        del self._flags[client]
        return True

    def close(self) -> None:
        """Close the descriptor, and end all flags."""
        self._flags.clear()
        os.close(self.descriptor)

    def generations(self, slots: array[int]) -> bytes:
        """Return the generations of slots, u64 each; 0 for NO_SLOT."""
        generations = self._generations
        return array("Q", [int(generations[slot]) if slot != NO_SLOT else 0 for slot in slots]).tobytes()

    def renew(self, slots: Sequence[int]) -> None:
        """Raise the generations of slots: no client leases what it knows of them any more."""
        self._generations[np.asarray(slots, dtype=np.int64)] += np.uint64(1)

    def try_end(self, slots: Iterable[int]) -> set[int]:
        """Renew slots, and return those that a client has flagged: their bytes must stay. The other ones may go."""
        ending = np.fromiter(slots, dtype=np.int64)
        if not len(ending):
            return set()
        self.renew(ending)  # type: ignore[arg-type]
        if not order_all():  # cannot fail where it has worked once; if it does, nothing may go
            return set(ending.tolist())
        flagged = self.flagged_of(ending.tolist())
        order_all()  # a processor may clear a flag before it has read the bytes: now it has read them
        return flagged

    def flagged_of(self, slots: Sequence[int]) -> set[int]:
        """Return those of the slots that a client has flagged."""
        wanted = np.asarray(slots, dtype=np.int64)
        flagged: set[int] = set()
        for flags in self._flags.values():
            flagged.update(wanted[flags[wanted] != 0].tolist())
        return flagged

    def count(self, client: Hashable) -> int:
        """Return how many slots a client has flagged."""
        found = self._flags.get(client)
        return 0 if found is None else int(np.count_nonzero(found))


def map_generations(descriptor: int, num_slots: int) -> memoryview:
    """Map a daemon's generations, to read only; the descriptor stays the caller's. Raises StoreError."""
    return memoryview(_map(descriptor, num_slots * GENERATION_BYTES, mmap.PROT_READ)).cast("Q")


def map_flags(descriptor: int, num_slots: int) -> mmap.mmap:
    """Map this client's flags; the descriptor stays the caller's. Raises StoreError."""
    return _map(descriptor, num_slots, mmap.PROT_READ | mmap.PROT_WRITE)


def _make(name: str, num_bytes: int, seals: int) -> tuple[int, mmap.mmap]:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _FIXED_SIZE | _SEALED | seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, memory


def _map(descriptor: int, num_bytes: int, protection: int) -> mmap.mmap:
    """Map memory of another process, whose size must be sealed: else a cut would end this one."""
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _FIXED_SIZE != _FIXED_SIZE:
            raise OSError("its size is not sealed")
        if os.fstat(descriptor).st_size != num_bytes:  # compared after the seals: it cannot change any more
            raise OSError(f"it has {os.fstat(descriptor).st_size} bytes, not {num_bytes}")
        return mmap.mmap(descriptor, num_bytes, prot=protection)
    except (OSError, ValueError, OverflowError) as exc:
        raise StoreError(f"the memory of the slots' leases cannot be mapped: {exc}") from exc
