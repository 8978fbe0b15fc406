"""Saves of nano-vLLM's new blocks, queued while its GPU computes a step, so that the step takes no longer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Strided
from tierkv.block_store.store import BlockStore
from tierkv.block_store.transfers import Save
from tierkv.integrations.nano_vllm.keys import SequenceKeys
from tierkv.movers.engine_memory import EngineMemory

__all__ = ["SaveQueue"]


class SaveQueue:
    """The blocks that the engine has computed and the store does not have yet. Used by the engine's thread only.

    A step of the engine ends with a wait for the GPU, so the bytes of a finished block are complete. `idle_stream`
    returns a context in which the current stream has no work: copies start at once, beside the running step.
    """

    def __init__(
        self,
        store: BlockStore,
        memory: EngineMemory,
        keys: SequenceKeys,
        *,
        idle_stream: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._store = store
        self._memory = memory
        self._keys = keys
        self._idle_stream = idle_stream
        self._pending: dict[int, tuple[Any, int]] = {}  # by the engine's block id: the sequence and the position in it
        self._used: list[tuple[Any, int]] = []
        self._saves: dict[int, Save] = {}

    @property
    def num_pending(self) -> int:
        """Blocks that have not been given to the store yet."""
        return len(self._pending)

    def add(self, seq: Any, first: int, block_ids: list[int]) -> None:
        """Remember new blocks of a sequence: its blocks from `first` on lie in the engine's `block_ids`."""
        for index, block_id in enumerate(block_ids, first):
            self._pending[block_id] = (seq, index)

    def add_used(self, seq: Any, num_blocks: int) -> None:
        """Remember that the engine had the first blocks of a sequence itself, so that the store keeps them too."""
        self._used.append((seq, num_blocks))

    def save(self, max_blocks: int) -> None:
        """Save at most `max_blocks` blocks, as far as the store has room. Returns before they are copied."""
        for seq, num_blocks in self._used:
            self._store.touch(self._keys.of(seq, num_blocks))
        self._used.clear()
        if not self._pending:
            return
        self._saves = {block_id: save for block_id, save in self._saves.items() if not save.is_done()}
        with self._idle_stream():
            while self._pending and max_blocks > 0 and (num_taken := self._save_run(max_blocks)):
                max_blocks -= num_taken

    def release(self, block_id: int) -> None:
        """Prepare a block for being overwritten by work on the current stream."""
        if block_id in self._pending:
            self.save(len(self._pending))
            self._pending.pop(block_id, None)  # there was no room for it
        save = self._saves.pop(block_id, None)
        if save is not None and not save.is_done():
            save.wait()

    def _save_run(self, max_blocks: int) -> int:
        """Save the oldest pending blocks that follow each other in one sequence.

        Return how many the store took over or has. If it has no room for all, the others stay pending, because blocks
        after a gap would never be found.
        """
        seq, first = next(iter(self._pending.values()))
        block_ids: list[int] = []
        for block_id, (owner, index) in self._pending.items():
            if owner is not seq or index != first + len(block_ids) or len(block_ids) == max_blocks:
                break
            block_ids.append(block_id)
        keys: list[BlockKey] = self._keys.of(seq, first + len(block_ids))
        save = self._store.save(keys, Strided(self._memory, [[each] for each in block_ids]), start=first)
        if save.num_skipped:
            del block_ids[save.num_saved :]
        for block_id in block_ids:
            del self._pending[block_id]
            self._saves[block_id] = save
        return len(block_ids)
