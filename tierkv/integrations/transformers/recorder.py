"""Recorder: the tokens and the K and V of every slot of a Transformers cache, while `generate` fills it.

A cache layer with a sliding window drops old K and V, beam search reorders rows, and no attribute of a cache says which
tokens it holds. So the recorder sees each forward pass: its tokens, its positions, and K and V of windowed layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tierkv.values.layout import BlockLayout

__all__ = ["Recorder", "is_windowed"]


class Recorder:
    """Records one cache from its first slot on. Not thread-safe.

    Slot `s` of row `b` is position `s` of the padded batch. Tensors are in the rows' present order.
    `attach` puts functions of the recorder into the cache and its windowed layers, `detach` removes them.
    """

    def __init__(self, cache: Any, device: torch.device) -> None:
        """device: of the model, which may not be the prompt's."""
        self.cache = cache
        self._device = device
        self._tokens: list[Tensor] = []  # of each pass: [rows, new slots]
        self._positions: list[Tensor] = []
        self._orders: list[Tensor | None] = []  # the reordering that followed each pass
        self._windows: dict[int, list[tuple[Tensor, Tensor]]] = {
            layer: [] for layer, held in enumerate(cache.layers) if is_windowed(held)
        }
        self._first_pass = 0  # the first part in `_windows` is of all passes up to this one,
        self._first_slot = 0  # from this slot on
        self._merged: dict[int, tuple[Tensor, Tensor]] = {}

    def attach(self) -> None:
        """Begin to record."""
        for layer, chunks in self._windows.items():
            held = self.cache.layers[layer]
            held.update = self._recording(held.update, chunks)
        reorder = self.cache.reorder_cache

        def reorder_and_record(beam_idx: Tensor) -> Any:
            if self._orders:
                before = self._orders[-1]
                self._orders[-1] = beam_idx if before is None else before[beam_idx]
            self._merged.clear()
            return reorder(beam_idx)

        self.cache.reorder_cache = reorder_and_record

    def detach(self) -> None:
        """Leave the cache as Transformers made it. May be called twice."""
        for held in [self.cache, *(self.cache.layers[layer] for layer in self._windows)]:
            for name in ("reorder_cache", "update"):
                vars(held).pop(name, None)

    def add_pass(self, tokens: Tensor, positions: Tensor) -> None:
        """Record the tokens of a pass that follows: [rows, new slots]. positions: the same, or one row for all."""
        self._tokens.append(tokens.to(self._device))
        self._positions.append(positions.to(self._device).expand(len(tokens), -1))
        self._orders.append(None)
        self._merged.clear()

    @property
    def num_slots(self) -> int:
        """Slots that are recorded."""
        return sum(each.shape[1] for each in self._tokens)

    @property
    def has_windows(self) -> bool:
        """Whether the cache drops old K and V of some layers."""
        return bool(self._windows)

    def is_complete(self, layout: BlockLayout) -> bool:
        """Return whether every layer has exactly the recorded slots, in the layout's shape and dtype."""
        slots, dtype = self.num_slots, f"torch.{layout.dtype}"
        if len(self.cache.layers) != layout.num_layers:
            return False
        for held, want in zip(self.cache.layers, layout.layers, strict=True):
            for tensor, dim in ((held.keys, want.k_dim), (held.values, want.v_dim)):
                if str(tensor.dtype) != dtype or (tensor.shape[1], tensor.shape[3]) != (want.kv_heads, dim):
                    return False
            if held.get_seq_length() != slots:
                return False
        widths = self._widths()
        return all([keys.shape[-2] for keys, _ in parts] == widths for parts in self._windows.values())

    def tokens(self) -> Tensor:
        """Return the tokens of all slots, [rows, slots], on the CPU."""
        return torch.cat(self._reordered(self._tokens, 0), dim=1).cpu()

    def positions(self) -> Tensor:
        """Return the positions of all slots, [rows, slots], on the CPU."""
        return torch.cat(self._reordered(self._positions, 0), dim=1).cpu()

    def keys_and_values(self, layer: int, row: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return K and V of some slots of a row: [kv_heads, slots, dim] each, views."""
        if layer in self._windows:
            if layer not in self._merged:
                parts = zip(*self._windows[layer], strict=True)
                keys, values = (torch.cat(self._reordered(list(each), self._first_pass), dim=-2) for each in parts)
                self._merged[layer] = keys, values
            keys, values = self._merged[layer]
            start, stop = start - self._first_slot, stop - self._first_slot
            assert start >= 0, "slots that were dropped"
        else:
            keys, values = self.cache.layers[layer].keys, self.cache.layers[layer].values
        return keys[row, :, start:stop], values[row, :, start:stop]

    def keep_last(self, num_slots: int) -> None:
        """Drop K and V of windowed layers but for the last slots; the cache holds those of the others anyway.

        To be called before any reordering.
        """
        slots = self.num_slots
        num_slots = min(num_slots, slots - self._first_slot)
        for layer, chunks in self._windows.items():
            self.keys_and_values(layer, 0, slots, slots)
            keys, values = self._merged[layer]
            start = keys.shape[-2] - num_slots
            chunks[:] = [(keys[:, :, start:].clone(), values[:, :, start:].clone())]
        self._merged.clear()
        self._first_slot = slots - num_slots
        self._first_pass = max(0, len(self._tokens) - 1)

    def _recording(self, update: Any, chunks: list[tuple[Tensor, Tensor]]) -> Any:
        def update_and_record(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            chunks.append((key_states, value_states))
            return update(key_states, value_states, *args, **kwargs)

        return update_and_record

    def _widths(self) -> list[int]:
        """Return how many slots each chunk of a windowed layer has."""
        widths = [each.shape[1] for each in self._tokens]
        rest = self._first_pass + 1
        return [sum(widths[:rest]) - self._first_slot, *widths[rest:]] if widths else []

    def _reordered(self, parts: list[Tensor], first_pass: int) -> list[Tensor]:
        """Return the rows of each pass's part in their present order. parts: from a pass on."""
        order: Tensor | None = None
        found: list[Tensor] = []
        for part, after in zip(reversed(parts), reversed(self._orders[first_pass:]), strict=True):
            if after is not None:
                order = after if order is None else after[order]
            found.append(part if order is None else part.index_select(0, order.to(part.device)))
        return found[::-1]


def is_windowed(layer: Any) -> bool:
    """Return whether a cache layer keeps only a window of its K and V."""
    return bool(getattr(layer, "is_sliding", False))
