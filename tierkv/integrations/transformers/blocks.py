"""BlockCopier: moves K and V between the block store and the tensors of a Transformers cache.

A cache holds [rows, kv_heads, slots, dim], and other tensors after every token. So blocks go through a few pages of
fixed memory on the model's device, which the store knows: a part at a time, in the order of the device's stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from tierkv.block_store.keys import BlockKey, BlockKeys
from tierkv.block_store.load_or_compute import LoadOrCompute
from tierkv.block_store.misses import log_recomputed
from tierkv.block_store.placement import Strided
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.store import BlockStore
from tierkv.integrations.transformers.rows import Row
from tierkv.movers.ready import Done, Ready
from tierkv.values.locks import OwnedLock

__all__ = ["BlockCopier", "ComputingIsFaster", "Prefix"]

_STAGING_BYTES = 128 << 20
_MOST_PAGES = 64

KeysAndValues = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""Returns K and V of a layer from one slot to another: [kv_heads, slots, dim] each."""


@dataclass(slots=True)
class Prefix:
    """K and V of the first slots of some rows, for each layer: [rows, kv_heads, slots, dim] each, zeros as padding."""

    num_slots: int
    layers: list[tuple[Tensor, Tensor]]

    def cut(self, num_slots: int) -> None:
        """Keep only so many slots."""
        self.num_slots = num_slots
        self.layers = [(keys[:, :, :num_slots], values[:, :, :num_slots]) for keys, values in self.layers]


class ComputingIsFaster(Exception):  # noqa: N818 - a choice, not an error
    """The prefix is there, but computing it was measured to take less time."""


@dataclass(slots=True)
class _Plan:
    """What one row takes: its first `shared` blocks from row `source`, the others up to `num_blocks` from the store.

    num_arrived: leading blocks that are in its place.
    """

    row: Row
    num_blocks: int
    source: int = -1
    shared: int = 0
    num_arrived: int = 0


class BlockCopier:
    """Copies blocks of one store for one model. Thread-safe.

    choice: what loading and computing took so far. device: of the model. compute_or_load: False always loads.
    """

    def __init__(self, store: BlockStore, device: torch.device, *, compute_or_load: bool = True) -> None:
        self._store = store
        self._device = device
        self._size = store.block_size
        self._lock = OwnedLock()
        self.choice: LoadOrCompute = LoadOrCompute(block_size=self._size)
        self._compute_or_load = compute_or_load
        layout = store.layout
        self._num_pages = min(_MOST_PAGES, max(1, _STAGING_BYTES // layout.block_bytes))
        dtype = getattr(torch, layout.dtype)
        with torch.inference_mode(False):  # else nothing could be written to them outside of it
            self._pages = [
                tuple(
                    torch.empty(self._num_pages, self._size, layer.kv_heads, dim, dtype=dtype, device=device)
                    for dim in (layer.k_dim, layer.v_dim)
                )
                for layer in layout.layers
            ]
        self._memory = store.register(self._pages)
        store.keep_costs(self.choice)  # measures with what decodes from now on
        self._pages_are_read: Ready = Done()

    def find(self, rows: Sequence[Row], num_slots: int) -> int:
        """Note how many blocks the store has of each row. Return how many leading slots of the batch they cover.

        num_slots: of the prompts, padding included; the last one is always left to compute.
        """
        for row in rows:
            row.num_known = self._store.contains(row.keys)
        return min(num_slots - 1, *(row.pad + row.num_known * self._size for row in rows))

    def load(self, rows: Sequence[Row], num_slots: int, *, num_prompt_slots: int) -> Prefix | None:
        """Return K and V of the first slots, of as many as came; None for none. Raises ComputingIsFaster.

        num_slots: what `find` returned. num_prompt_slots: of the prompts.
        A row's `num_known` is lowered where a block did not come: so it is saved anew.
        """
        plans = self._plan(rows, num_slots)
        num_blocks = sum(plan.num_blocks - plan.shared for plan in plans)
        if not num_blocks:
            return None
        with self._lock, torch.no_grad(), ExitStack() as held:
            start = time.perf_counter()
            waves = [self._reserve(plan, held) for plan in plans]
            origin = max(each.reservation.origin for parts in waves for each in parts)
            num_rest = sum(num_prompt_slots - max(plan.row.pad, num_slots) for plan in plans)
            if self._compute_or_load and not self.choice.worth_loading(
                num_blocks, origin=origin, num_rest_tokens=num_rest
            ):
                log_recomputed(num_blocks)
                raise ComputingIsFaster
            prefix = self._allocate(len(rows), num_slots)
            for at, plan in enumerate(plans):
                self._copy_shared(prefix, at, plan, plans)
                self._load_row(prefix, at, plan, waves[at])
            self._pages_are_read = self._memory.mark()
            prefix.cut(min(num_slots, *(plan.row.pad + plan.num_arrived * self._size for plan in plans)))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self.choice.record_load(num_blocks, origin=origin, seconds=time.perf_counter() - start)
        return prefix if prefix.num_slots > min(row.pad for row in rows) else None

    def save(self, keys: BlockKeys, start: int, stop: int, keys_and_values: KeysAndValues) -> int:
        """Save blocks `start` to `stop` of a row; return how many were new. Returns before they are on the disk.

        keys_and_values: of the row, by its own token numbers.
        """
        num_saved = 0
        size = self._size
        with self._lock, torch.no_grad():
            for first in range(start, stop, self._num_pages):
                end = min(first + self._num_pages, stop)
                count = end - first
                self._wait_for_pages()
                for layer, pages in enumerate(self._pages):
                    for page, each in zip(pages, keys_and_values(layer, first * size, end * size), strict=True):
                        page[:count].flatten(0, 1).copy_(each.transpose(0, 1))
                places = Strided(self._memory, [[page] for page in range(count)])
                saved = self._store.save(keys[:end], places, start=first)
                self._pages_are_read = saved
                num_saved += saved.num_saved
        return num_saved

    def _plan(self, rows: Sequence[Row], num_slots: int) -> list[_Plan]:
        """Return where the blocks of each row come from: blocks that an earlier row has are copied from it."""
        plans: list[_Plan] = []
        for row in rows:
            plan = _Plan(row, -(-max(0, num_slots - row.pad) // self._size))
            for at, other in enumerate(plans):
                num_whole = max(0, num_slots - other.row.pad) // self._size
                shared = _num_equal(row.keys[: plan.num_blocks], other.row.keys[:num_whole])
                if shared > plan.shared:
                    plan.source, plan.shared = at, shared
            plans.append(plan)
        return plans

    def _reserve(self, plan: _Plan, held: ExitStack) -> list[_Wave]:
        """Reserve the blocks of a row, as many at a time as there are pages."""
        waves = []
        for first in range(plan.shared, plan.num_blocks, self._num_pages):
            end = min(first + self._num_pages, plan.num_blocks)
            reservation = held.enter_context(self._store.reserve(plan.row.keys[:end], start=first))
            waves.append(_Wave(first, end, reservation))
        return waves

    def _allocate(self, num_rows: int, num_slots: int) -> Prefix:
        shapes = [[(page.shape[2], page.shape[3]) for page in pages] for pages in self._pages]
        dtype = self._pages[0][0].dtype
        layers = [
            tuple(torch.zeros(num_rows, heads, num_slots, dim, dtype=dtype, device=self._device) for heads, dim in pair)
            for pair in shapes
        ]
        return Prefix(num_slots, [(keys, values) for keys, values in layers])

    def _copy_shared(self, prefix: Prefix, at: int, plan: _Plan, plans: Sequence[_Plan]) -> None:
        """Copy the leading blocks that an earlier row has."""
        if not plan.shared:
            return
        other = plans[plan.source]
        plan.num_arrived = min(plan.shared, other.num_arrived)
        count, pad, from_pad = plan.num_arrived * self._size, plan.row.pad, other.row.pad
        count = min(count, prefix.num_slots - pad, prefix.num_slots - from_pad)
        for pair in prefix.layers:
            for target in pair:
                target[at, :, pad : pad + count] = target[plan.source, :, from_pad : from_pad + count]

    def _load_row(self, prefix: Prefix, at: int, plan: _Plan, waves: Sequence[_Wave]) -> None:
        """Load the other blocks of a row, up to the first that does not come."""
        size = self._size
        for wave in waves:
            if plan.num_arrived != wave.first:
                break
            places = Strided(self._memory, [[page] for page in range(wave.end - wave.first)])
            self._wait_for_pages()
            load = self._store.load(wave.reservation, places)
            load.wait()
            num_failed = len(load.failed_keys)
            count = len(load.keys) - num_failed
            start = plan.row.pad + wave.first * size
            stop = min(start + count * size, prefix.num_slots)
            for pages, pair in zip(self._pages, prefix.layers, strict=True):
                for page, target in zip(pages, pair, strict=True):
                    tokens = page[:count].flatten(0, 1)[: stop - start]  # [tokens, kv_heads, dim]
                    target[at, :, start:stop] = tokens.transpose(0, 1)
            self._pages_are_read = self._memory.mark()
            plan.num_arrived += count
        if plan.num_arrived < plan.num_blocks:
            plan.row.num_known = min(plan.row.num_known, plan.num_arrived)

    def _wait_for_pages(self) -> None:
        """Make the current stream wait until the pages may be written to again."""
        self._pages_are_read.wait()


@dataclass(frozen=True, slots=True)
class _Wave:
    """Blocks `first` to `end` of a row, reserved: they go through the pages together."""

    first: int
    end: int
    reservation: Reservation


def _num_equal(left: Sequence[BlockKey], right: Sequence[BlockKey]) -> int:
    """Return how many leading keys are equal."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
