"""CodedSlots: warm slots that hold payloads, as the store on disk has them, until a GPU decodes them into an engine.

Such a slot has one holder, and is in no index then: see `WarmMemory`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypedDict

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Placement, Strided
from tierkv.block_store.warm_memory import Payload, WarmMemory
from tierkv.movers.ready import DONE, Ready
from tierkv.readers.pool import ReaderPool
from tierkv.storage.codecs import EXPONENT16
from tierkv.storage.coded import CodedBlock
from tierkv.values.locks import OwnedCondition

__all__ = ["CodedSlots"]


class _HowToRead(TypedDict):
    coded: Sequence[CodedBlock] | None
    decoders: ReaderPool | None


class CodedSlots:
    """Reads payloads into the slots of a warm memory, and decodes them."""

    def __init__(self, memory: WarmMemory, changed: OwnedCondition) -> None:
        self._memory = memory
        self._changed = changed

    @contextlib.contextmanager
    def reading(self, group: Sequence[tuple[BlockKey, int]]) -> Iterator[_HowToRead]:
        """Say how blocks are read into slots that the caller holds; note at the end which of them are payloads."""
        memory, slots = self._memory, [slot for _, slot in group]
        if not memory.num_decoded_at_once:
            with self._changed:
                memory.forget_coded(slots)
            yield _HowToRead(coded=None, decoders=memory.readers)
            return
        coded = [CodedBlock() for _ in slots]
        yield _HowToRead(coded=coded, decoders=None)
        with self._changed:
            memory.forget_coded(slots)
            memory.coded.update(
                (slot, Payload(key, block))
                for (key, slot), block in zip(group, coded, strict=True)
                if block.frame_sizes
            )

    def runs_of(self, slots: Sequence[int]) -> list[tuple[bool, list[int]]]:
        """Split slots where payloads begin or end, and spare slots too.

        Return for each run whether it is of payloads, and its slots.
        """
        memory = self._memory
        with self._changed:
            runs = groupby(slots, key=lambda slot: (slot in memory.coded, slot in memory.spare))
            return [(is_coded, list(run)) for (is_coded, _), run in runs]

    def can_decode_into(self, targets: Placement) -> bool:
        """Return whether a GPU decodes payloads into these places."""
        return isinstance(targets, Strided) and bool(targets.memory.blocks_decoded_at_once(self._memory.slots))

    def copy(self, first: int, slots: Sequence[int], targets: Placement, after: Ready) -> tuple[Ready, Ready]:
        """Have the GPU decode payloads into the places from `first` on; see `EngineMemory.load_coded`.

        They become the blocks themselves, unless they are spare slots. Raises StoreError.
        """
        assert isinstance(targets, Strided)
        memory = self._memory
        is_kept = slots[0] not in memory.spare
        kept: Ready = DONE
        with self._changed:
            coded = [memory.coded[slot].block for slot in slots]
            memory.index.slots.pin_all(slots)
        try:
            loaded, kept = targets.load_coded(first, slots, coded, memory.slots, after=[after], keeps_decoded=is_kept)
        except BaseException:
            with self._changed:
                memory.forget_coded(slots)  # the first ones may hold decoded blocks
            raise
        finally:
            with self._changed:
                memory.unpin_after(kept, slots)
        return loaded, kept

    def decode_here(self, slots: Sequence[int]) -> None:
        """Decode payloads in their slots, by this thread. Raises StoreError."""
        memory = self._memory
        with self._changed:
            coded = [memory.coded[slot].block for slot in slots]
        layout = memory.layout
        try:
            for slot, block in zip(slots, coded, strict=True):
                out = memory.slots[slot]
                payload = out[: block.payload_bytes].copy()
                EXPONENT16.decode_runs(payload, block.frame_sizes, out, layout.runs, layout.block_size)
        except BaseException:
            with self._changed:
                memory.forget_coded(slots)
            raise

    def decode_for_nothing(self, slots: Sequence[int]) -> None:
        """Decode payloads and keep nothing, as a measurement wants it. Raises StoreError."""
        memory = self._memory
        with self._changed:
            coded = [(slot, memory.coded[slot].block) for slot in slots if slot in memory.coded]
        engine = memory.decoding
        if not coded or engine is None:
            return
        engine.decode_for_nothing([slot for slot, _ in coded], [block for _, block in coded], memory.slots)
