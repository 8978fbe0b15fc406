"""The keys of nano-vLLM's sequences, computed when they are first needed and extended as the sequences grow."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from tierkv.block_store.keys import BlockKey, BlockKeys
from tierkv.block_store.store import BlockStore

__all__ = ["SequenceKeys"]


class SequenceKeys:
    """Keys of whole blocks, for each sequence as long as it lives.

    nano-vLLM's own key is a 64-bit hash that it compares with tokens in memory. It is too short to be kept on disk:
    these keys are made of the token ids.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._known: WeakKeyDictionary[Any, BlockKeys] = WeakKeyDictionary()

    def of(self, seq: Any, num_blocks: int) -> list[BlockKey]:
        """Return the keys of the first `num_blocks` blocks of a sequence, which it must have in full."""
        keys = self._known.get(seq)
        if keys is None:
            keys = self._known[seq] = self._store.keys()
        if len(keys) < num_blocks:
            keys.extend(seq.token_ids[keys.num_tokens : num_blocks * self._store.block_size])
        return keys[:num_blocks]
