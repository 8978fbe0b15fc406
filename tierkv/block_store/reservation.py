"""A reservation: blocks that are held for one request, so that a scheduler can act on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from itertools import takewhile

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import Origin
from tierkv.storage.codec import Bytes
from tierkv.values.locks import OwnedCondition

__all__ = ["Reservation"]


class Reservation:
    """Leading blocks that were found, held until they are loaded or released. Context manager; thread-safe.

    Blocks in the warm memory are held at once. Cold ones are read into it in the background, as long as there is room;
    a block that cannot be read ends the reservation there. A reservation never holds more than half of the warm memory:
    the blocks after that are *unread*, still in `keys`, and `BlockStore.load` reads them a few at a time.
    """

    def __init__(
        self,
        keys: Iterable[BlockKey],
        slots: Sequence[int | None],
        memory: Bytes,
        *,
        changed: OwnedCondition,
        unpin: Callable[[Iterable[int]], None],
        origin: Origin = Origin.WARM,
        num_at_once: int = 1,
    ) -> None:
        """slots: the held warm slot of each key; None for one that is not there yet. unpin: holds slots no more.

        memory: where the slots lie, [slots, block bytes]. origin: where the blocks were when they were found.
        num_at_once: how many of them are read side by side.
        """
        self.memory = memory
        self.origin = origin
        self.num_at_once = num_at_once
        self._keys = list(keys)
        self._slots = list(slots)
        self._changed = changed
        self._unpin = unpin
        self._reading: Future[None] | None = None
        self._has_ended_reading = False
        self._is_released = False
        self._is_taken = False

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def keys(self) -> Sequence[BlockKey]:
        """What is held, from `start` on. It may become shorter while blocks are read."""
        return self._keys

    @property
    def num_blocks(self) -> int:
        """How many blocks are held, unread ones included."""
        return len(self._keys)

    @property
    def num_ready(self) -> int:
        """How many leading blocks lie in the warm memory, verified: a promise until the reservation is released."""
        with self._changed:
            return next((at for at, slot in enumerate(self._slots) if slot is None), len(self._slots))

    @property
    def num_held(self) -> int:
        """How many blocks lie in the warm memory, wherever in `keys` they are."""
        with self._changed:
            return sum(slot is not None for slot in self._slots)

    @property
    def is_reading(self) -> bool:
        """Whether cold blocks are still being read. If not, `num_ready` stays as it is."""
        return self._reading is not None and not self._reading.done()

    @property
    def is_ready(self) -> bool:
        """Whether all blocks lie in the warm memory, verified."""
        return self.num_ready == self.num_blocks

    @property
    def is_released(self) -> bool:
        """Whether nothing is held any more."""
        return self._is_released

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being read any more, at most `timeout_s` seconds. Return whether that is so."""
        if self._reading is not None:
            wait([self._reading], timeout_s)
        return not self.is_reading

    def cut(self, num_blocks: int) -> None:
        """Hold only so many leading blocks from now on. Does nothing once a load has taken the reservation over."""
        with self._changed:
            if not self._is_taken:
                self.drop(num_blocks)

    def release(self) -> None:
        """Hold nothing any more. May be called twice; a load that has taken the reservation over goes on."""
        with self._changed:
            self._is_released = True
            self.cut(0)

    # for the store

    def start_reading(self, reading: Future[None]) -> None:
        """Remember the work that reads the cold blocks."""
        self._reading = reading

    def end_reading(self) -> None:
        """Record that no further block will be read. The caller holds the lock."""
        assert self._changed.is_owned()
        self._has_ended_reading = True
        self._changed.notify_all()

    def wait_for_more(self, num_known: int, least: int) -> tuple[bool, list[int]]:
        """Wait until at least so many blocks are ready behind the first `num_known`, or nothing is being read any more.

        Return whether more may follow, and the slots of the blocks that are ready behind those.
        """
        with self._changed:
            if self._reading is not None:
                ready = num_known  # blocks before it stay ready

                def has_more() -> bool:
                    nonlocal ready
                    while ready < len(self._slots) and self._slots[ready] is not None:
                        ready += 1
                    return self._has_ended_reading or ready - num_known >= least

                self._changed.wait_for(has_more)
            return self._reading is not None and not self._has_ended_reading, self.ready_slots()[num_known:]

    def take_over(self) -> None:
        """Let a load hold the blocks from now on. The caller holds the lock."""
        assert self._changed.is_owned()
        self._is_released = self._is_taken = True

    def drop(self, num_blocks: int) -> None:
        """Hold only so many leading blocks from now on. The caller holds the lock."""
        assert self._changed.is_owned()
        dropped = [slot for slot in self._slots[num_blocks:] if slot is not None]
        del self._keys[num_blocks:], self._slots[num_blocks:]
        self._unpin(dropped)
        self._changed.notify_all()

    def release_slots(self) -> None:
        """Hold no slot any more; the keys stay, unread. The caller holds the lock."""
        assert self._changed.is_owned()
        held = [slot for slot in self._slots if slot is not None]
        self._slots = [None] * len(self._slots)
        self._unpin(held)
        self._changed.notify_all()

    def wanted(self) -> list[tuple[int, BlockKey]]:
        """Return the positions and keys of the blocks that are not in the warm memory; the caller holds the lock."""
        assert self._changed.is_owned()
        return [(at, key) for at, (key, slot) in enumerate(zip(self._keys, self._slots, strict=True)) if slot is None]

    def put(self, at: int, key: BlockKey, slot: int) -> bool:
        """Hold a slot, pinned, in which a block lies now. Return False if it is not wanted any more.

        The caller holds the lock.
        """
        assert self._changed.is_owned()
        if at >= len(self._keys) or self._keys[at] is not key:
            return False
        self._slots[at] = slot
        self._changed.notify_all()
        return True

    def ready_slots(self) -> list[int]:
        """Return the slots of the leading blocks that are ready; the caller holds the lock."""
        assert self._changed.is_owned()
        return list(takewhile(lambda slot: slot is not None, self._slots))  # type: ignore[arg-type]
