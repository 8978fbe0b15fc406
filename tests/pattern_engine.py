"""A model that needs no model: K and V of a token are a pattern of all tokens up to it.

So every cached token can be checked byte for byte, and a wrong hit is seen whatever its cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from pattern_layout import tiny_layout
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.movers.windows import window_format
from tierkv.requests.sequence import Sequence
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["PatternEngine", "open_tiny", "record_passes", "store_prompt", "tiny_layout", "tiny_warm"]


def tiny_warm(num_blocks: int, warm_codec: str) -> tuple[BlockLayout, int]:
    """Return a tiny layout that such a warm tier takes, and the memory for that many blocks in it."""
    if warm_codec == "raw":
        return tiny_layout(), num_blocks * tiny_layout().block_bytes
    layout = tiny_layout(dtype="bfloat16")  # holds the pattern's numbers exactly
    num_staging = 24  # the most that there are
    return layout, num_blocks * window_format(layout).slot_bytes + num_staging * layout.block_bytes


def open_tiny(path: Path, *, hot: int = 32, warm: int = 8, **options: Any) -> TierCache:
    """Open a cache of blocks of four tokens with a cold tier in that folder. hot, warm: blocks."""
    layout = tiny_layout()
    options = {"cold_path": path / "store", "cold_bytes": 64 << 20, "min_free_bytes": 0, **options}
    config = CacheConfig(
        block_size=4, hot_bytes=hot * layout.block_bytes, warm_bytes=warm * layout.block_bytes, **options
    )
    return TierCache(config, namespace=Namespace(weights="w", layout=layout))


def pattern(token_ids: list[int], num_layers: int, seed: int = 0) -> torch.Tensor:
    """Return [tokens, layers, 2] values in [0, 256): each depends on every token up to its own."""
    rows: list[int] = []
    digest = seed
    for token in token_ids:
        digest = xxhash.xxh3_64_intdigest(token.to_bytes(4, "little"), seed=digest)
        rows.append(digest)
    base = np.array(rows, dtype=np.uint64)[:, None]
    lanes = (base >> np.arange(2 * num_layers, dtype=np.uint64)) & np.uint64(0xFF)
    return torch.from_numpy(lanes.astype(np.float32)).reshape(-1, num_layers, 2)


def record_passes(cache: TierCache, seconds: dict[int, float]) -> None:
    """Record what forward passes took, by their number of new tokens."""
    assert cache._acquirer._choice
    for num_tokens, took_s in seconds.items():
        cache._acquirer._choice.pass_costs.add(num_tokens, took_s)


def store_prompt(path: Path, token_ids: list[int]) -> Path:
    """Store a prompt's whole blocks in that folder, and return the folder: the cache that computed them is closed."""
    with open_tiny(path) as cache:
        cache.release(PatternEngine(cache).start([*token_ids, 99]))
    return path


class PatternEngine:
    """Drives a cache as an engine does: prefill what is missing, commit, decode, check what was cached.

    seed: engines with different ones have different K and V, as the ranks of a split model have.
    """

    def __init__(self, cache: TierCache, seed: int = 0) -> None:
        self.cache = cache
        self.seed = seed
        self.size = cache.config.block_size

    def start(self, token_ids: list[int], *, partial_block: bool = False, overlap: bool = False) -> Sequence:
        """Acquire, check every cached token, compute the rest, commit."""
        if overlap:  # as if a block took a millisecond
            record_passes(self.cache, {1: 1e-3, self.size * 100: 0.1})
        sequence = self.cache.acquire(token_ids, overlap=overlap)
        num_computed = sequence.num_cached_tokens
        assert num_computed < len(token_ids)
        self.check(sequence, num_computed)
        if was_loading := sequence.overlap.is_loading:
            num_computed = self.meet(sequence)
            self.check(sequence, num_computed)
        self.compute(sequence, num_computed)
        sequence.overlap.record(len(token_ids) / self.size * (0.4e-3 if was_loading else 0.8e-3))
        self.cache.commit(sequence, sequence.num_tokens, partial_block=partial_block)
        return sequence

    def meet(self, sequence: Sequence) -> int:
        """Compute from the front until the load has ended. Return how many tokens have K and V then."""
        assert sequence.overlap.is_loading
        while True:
            piece = sequence.overlap.next_piece()
            if not sequence.overlap.is_loading:
                return piece.start
            self.compute(sequence, piece.start, piece.stop)
            self.cache.commit(sequence, piece.stop)

    def decode(self, sequence: Sequence, token_ids: list[int], *, partial_block: bool = False) -> None:
        """Append tokens, compute them, commit."""
        first = sequence.num_tokens
        self.cache.append(sequence, token_ids)
        self.compute(sequence, first)
        self.cache.commit(sequence, sequence.num_tokens, partial_block=partial_block)

    def compute(self, sequence: Sequence, first: int, last: int | None = None) -> None:
        """Write K and V of the tokens from `first` on into their slots."""
        sequence.wait_all()
        for (keys, values), want in self._tokens(sequence, first, sequence.num_tokens if last is None else last):
            keys.copy_(want[0].expand_as(keys))
            values.copy_(want[1].expand_as(values))

    def check(self, sequence: Sequence, num_tokens: int | None = None) -> None:
        """Raise AssertionError unless the K and V of the leading tokens are this sequence's own."""
        sequence.wait_all()
        last = sequence.num_tokens if num_tokens is None else num_tokens
        for (keys, values), want in self._tokens(sequence, 0, last):
            assert torch.all(keys == want[0]), f"K is not its own: {keys.unique()} for {want[0]}"
            assert torch.all(values == want[1]), f"V is not its own: {values.unique()} for {want[1]}"

    def _tokens(self, sequence: Sequence, first: int, last: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Yield, for each token and layer, its K and V in the pool and the two values that belong there."""
        cache, hot = self.cache, self.cache.hot
        values = pattern(sequence.token_ids.tolist(), cache.layout.num_layers, self.seed).to(hot.device, hot.dtype)
        for position in range(first, last):
            block, offset = sequence.block_table[position // self.size], position % self.size
            for layer in range(cache.layout.num_layers):
                yield (
                    (hot.key_cache(layer)[block, offset], hot.value_cache(layer)[block, offset]),
                    values[position, layer],
                )
