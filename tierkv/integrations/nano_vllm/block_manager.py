"""nano-vLLM's scheduler and block manager with tiers below: blocks that are in neither are computed as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler

from tierkv.block_store.transfers import Load
from tierkv.integrations.nano_vllm.load_planner import LoadPlanner
from tierkv.integrations.nano_vllm.save_queue import SaveQueue
from tierkv.movers.engine_memory import LEFT_OUT

__all__ = ["BlockCounts", "TieredBlockManager", "TieredScheduler"]


@dataclass(slots=True)
class BlockCounts:
    """Whole blocks of prompts, by where they came from: the engine's own memory, the tiers, a forward pass."""

    own: int = 0
    loaded: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _StepLoad:
    """A load that this step waits for. block_ids: of the engine, one for each block promised; LEFT_OUT if it has it."""

    seq: Any
    load: Load
    block_ids: list[int]


class TieredBlockManager(BlockManager):  # type: ignore[misc]
    """Finds blocks in the tiers where the engine's own end, and remembers new ones for the tiers.

    is_busy: whether the engine has sequences to decode, so that a waiting one need not be waited for.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, planner: LoadPlanner, saves: SaveQueue, is_busy: Callable[[], bool]
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.counts: BlockCounts = BlockCounts()
        self.loads: list[_StepLoad] = []
        self.on_load: Callable[[Load], None] = lambda load: None
        self._planner = planner
        self._saves = saves
        self._is_busy = is_busy
        self._num_own: dict[int, int] = {}
        self._compute_only: WeakSet[Any] = WeakSet()

    def can_allocate(self, seq: Any) -> int:
        if self._is_busy() and self._planner.is_reading(seq):
            return -1
        num_own: int = super().can_allocate(seq)
        if num_own < 0:
            return num_own
        self._num_own[seq.seq_id] = num_own
        if num_own >= seq.num_blocks - 1 or seq in self._compute_only:
            self._planner.forget(seq)
            return num_own
        promised = self._planner.promise(seq, num_own, may_wait=not self._is_busy())
        return -1 if promised is None else promised

    def allocate(self, seq: Any, num_cached_blocks: int) -> None:
        num_own = self._num_own.pop(seq.seq_id)
        super().allocate(seq, num_own)
        self.counts.own += num_own
        self.counts.loaded += num_cached_blocks - num_own
        self.counts.computed += seq.num_tokens // self.block_size - num_cached_blocks
        if num_own:
            self._saves.add_used(seq, num_own)
        if num_cached_blocks > num_own:
            load, block_ids = self._planner.load(seq, num_own, num_cached_blocks)
            self.loads.append(_StepLoad(seq, load, block_ids))
            self._set_hashes(seq, num_own, num_cached_blocks)
            self.on_load(load)
        seq.num_cached_tokens = num_cached_blocks * self.block_size

    def hash_blocks(self, seq: Any) -> None:
        first = seq.num_cached_tokens // self.block_size
        end = (seq.num_cached_tokens + seq.num_scheduled_tokens) // self.block_size
        if first == end:
            return
        super().hash_blocks(seq)
        self._saves.add(seq, first, seq.block_table[first:end])

    def take_failed(self) -> set[int]:
        """Return the blocks that this step's loads did not fill, and forget these loads.

        No other sequence finds the blocks any more, and the sequences of these loads are computed from now on.
        """
        failed: set[int] = set()
        for each in list(self.loads):
            has_failed = bool(each.load.failed_keys)  # waits for reads that go on
            missing = each.block_ids[each.load.num_loaded :]
            if has_failed or missing:
                each.load.synchronize()  # what did come is used without waiting from now on
                failed.update(missing)
                self._compute_only.add(each.seq)
                self.loads.remove(each)
        failed.discard(LEFT_OUT)
        for block_id in failed:
            block = self.blocks[block_id]
            if self.hash_to_block_id.get(block.hash) == block_id:
                del self.hash_to_block_id[block.hash]
            block.hash = -1
            block.token_ids = []
        return failed

    def _set_hashes(self, seq: Any, first: int, end: int) -> None:
        """Make loaded blocks known to other sequences, as `hash_blocks` does for computed ones."""
        parent = self.blocks[seq.block_table[first - 1]].hash if first else -1
        for index in range(first, end):
            token_ids = seq.block(index)
            block = self.blocks[seq.block_table[index]]
            parent = self.compute_hash(token_ids, parent)
            block.update(parent, token_ids)
            self.hash_to_block_id[parent] = block.block_id

    def _allocate_block(self) -> int:
        block_id: int = super()._allocate_block()
        self._saves.release(block_id)
        return block_id


class TieredScheduler(Scheduler):  # type: ignore[misc]
    """Computes the sequences whose load failed, instead of running them over blocks that did not come."""

    def schedule(self) -> tuple[list[Any], bool]:
        seqs, is_prefill = super().schedule()
        while self.block_manager.loads and (failed := self.block_manager.take_failed()):
            seqs = self._without(seqs, failed)
            if not seqs:
                seqs, is_prefill = super().schedule()
        return seqs, is_prefill

    def _without(self, seqs: Sequence[Any], failed: set[int]) -> list[Any]:
        """Preempt the sequences that use failed blocks; return the others."""
        for seq in reversed(seqs):
            if not failed.isdisjoint(seq.block_table):
                (self.running if seq in self.running else self.waiting).remove(seq)
                self.preempt(seq)
        return [seq for seq in seqs if seq.block_table]
