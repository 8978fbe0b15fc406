"""LocalLeases: leases blocks that the daemon has named before, without asking it again; see `lease_flags`."""

from __future__ import annotations

import mmap
import os
import threading
import time
from array import array
from collections import Counter
from collections.abc import Sequence

from tierkv.daemon.lease_flags import map_flags, map_generations
from tierkv.daemon.membarrier import register
from tierkv.daemon.messages import NO_SLOT, Found, Match
from tierkv.daemon.protocol import split_hashes, split_numbers
from tierkv.index.tree import BlockTree, Entry
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash

__all__ = ["LocalLeases"]

_REPORT_S = 0.2
_MOST_ENTRIES = 8
"""For each slot, in this process's tree."""


class LocalLeases:
    """The blocks that the daemon has named on one connection, and this process's own leases of them. Thread-safe.

    A prompt is answered here if every whole block of it is known and has not been evicted, and no token is left over:
    the daemon alone knows which partial blocks there are, and which process computes what is missing. It is found by
    its token ids, block by block from the namespace's root, as the daemon does. most: slots that this client may lease.
    """

    def __init__(
        self,
        root: BlockHash,
        generations: memoryview,
        flags: mmap.mmap,
        *,
        block_size: int,
        most: int,
    ) -> None:
        self._block_size = block_size
        self._most = most
        self._generations = generations
        self._flags = flags
        self._num_slots = len(generations)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tree = BlockTree(root, time.monotonic)
        self._known: dict[int, tuple[Entry, int]] = {}  # by slot: the block and the slot's generation
        self._leases: Counter[int] = Counter()
        self._used: set[int] = set()
        self._reported_at = time.monotonic()

    @classmethod
    def open(
        cls, descriptors: Sequence[int], *, num_slots: int, root: BlockHash, block_size: int, most: int
    ) -> LocalLeases | None:
        """Map the memory that came with a greeting; None where this system has no barrier. Raises StoreError.

        descriptors: of the generations and of the flags; they stay the caller's.
        """
        if not register():
            return None
        generations, flags = descriptors
        return cls(
            root,
            map_generations(generations, num_slots),
            map_flags(flags, num_slots),
            block_size=block_size,
            most=most,
        )

    def match(self, asked: Match) -> Found | None:
        """Return what the daemon would answer, the slots leased if asked to; None where the daemon is to be asked."""
        step = self._block_size * TOKEN_BYTES
        num_blocks = len(asked.hashes) // HASH_BYTES
        if not num_blocks or num_blocks * step != len(asked.tokens) or os.getpid() != self._pid:
            return None
        with self._lock:
            entries = self._tree.walk(asked.tokens, self._block_size)
            if len(entries) < num_blocks or entries[-1].block_hash != asked.hashes[-HASH_BYTES:]:
                return None
            slots = [entry.warm_slot for entry in entries[asked.start :] if entry.warm_slot is not None]
            if len(slots) < num_blocks - asked.start or not self._hold(slots):
                return None
            if not asked.lease:
                self._drop(slots)
            self._used.update(slots)
            return Found(array("I", slots).tobytes(), None, 0, 0, False, "")

    def learn(self, asked: Match, answer: Found) -> None:
        """Remember what the daemon has named, with the generations that came with it."""
        generations = array("Q")
        generations.frombytes(answer.generations)
        slots = split_numbers(answer.slots)
        if not generations or not slots:
            return
        step, parent = self._block_size * TOKEN_BYTES, self._tree.root
        hashes = split_hashes(asked.hashes[: (asked.start + len(slots)) * HASH_BYTES])
        with self._lock:
            if len(self._tree) > _MOST_ENTRIES * self._num_slots:  # blocks without a slot, before those that have one
                self._tree, self._known = BlockTree(parent, time.monotonic), {}
            chain: list[Entry] = []
            for number, block_hash in enumerate(hashes):
                entry = self._tree.insert(block_hash, parent, asked.tokens[number * step : (number + 1) * step])
                if entry is None:  # a collision
                    break
                entry.awaited = True  # so that it stays until the chain is complete
                chain.append(entry)
                at = number - asked.start
                if at >= 0 and (slot := slots[at]) != NO_SLOT:
                    self._place(entry, slot, generations[at])
                parent = block_hash
            for entry in reversed(chain):
                entry.awaited = False
                self._tree.prune(entry)

    def end(self, slots: Sequence[int]) -> array[int]:
        """End leases, once for each time that a slot is named. Return the slots that the daemon has leased instead."""
        others = array("I")
        if os.getpid() != self._pid:  # a forked process: the flags are the parent's
            return others
        with self._lock:
            for slot in slots:
                if self._leases[slot] > 0:
                    self._drop((slot,))
                else:
                    others.append(slot)
        return others

    def take_used(self) -> array[int]:
        """Return the slots that were used lately, a few times a second: the daemon evicts by use."""
        now = time.monotonic()
        if not self._used or now - self._reported_at < _REPORT_S:
            return array("I")
        with self._lock:
            used, self._used, self._reported_at = array("I", self._used), set(), now
        return used

    def _hold(self, slots: Sequence[int]) -> bool:
        """Lease slots, all or none: flag each, then see whether it still holds the block that it is known for."""
        if len(self._leases) + len(slots) > self._most:
            return False
        leases, flags, generations, known = self._leases, self._flags, self._generations, self._known
        for slot in slots:
            leases[slot] += 1
            flags[slot] = 1
        for slot in slots:
            if generations[slot] != known[slot][1]:
                self._drop(slots)
                for each in slots:
                    if generations[each] != known[each][1]:
                        self._forget(each)
                return False
        return True

    def _drop(self, slots: Sequence[int]) -> None:
        leases = self._leases
        for slot in slots:
            left = leases[slot] - 1
            if left:
                leases[slot] = left
            else:
                del leases[slot]
                self._flags[slot] = 0

    def _place(self, entry: Entry, slot: int, generation: int) -> None:
        """Note that a slot holds a block."""
        if entry.warm_slot is not None and entry.warm_slot != slot:
            self._forget(entry.warm_slot)
        known = self._known.get(slot)
        if known and known[0] is not entry:
            self._forget(slot)
        entry.warm_slot = slot
        self._known[slot] = entry, generation

    def _forget(self, slot: int) -> None:
        entry, _ = self._known.pop(slot)
        entry.warm_slot = None
        self._tree.prune(entry)
