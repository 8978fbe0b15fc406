"""A model over a cache, driven step by step, so that every logit can be compared with the plain model's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.mla.model import latent_attention
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import probe_layout
from tierkv.requests.sequence import Sequence

__all__ = ["CachedModel"]


class CachedModel:
    """One model, one cache of `hot` and `warm` blocks over a store; context manager."""

    def __init__(
        self, model: Any, store: Path, *, block_size: int, hot: int, warm: int, mla: str = "auto", **options: Any
    ) -> None:
        self.model = model
        self.latent = latent_attention(model, mla)
        layout = probe_layout(model, block_size=block_size, latent=self.latent)
        config = CacheConfig(
            cold_path=store,
            block_size=block_size,
            hot_bytes=hot * layout.block_bytes,
            warm_bytes=warm * layout.block_bytes,
            cold_bytes=1 << 30,
            min_free_bytes=0,
        )
        self.cache = TierCache(config, namespace=namespace_of(model, layout, **options), device=model.device)

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cache.close()

    def start(self, prompts: list[list[int]]) -> tuple[list[Sequence], list[Tensor]]:
        """Acquire prompts and compute what is missing, all in one packed pass; logits of the computed tokens."""
        sequences = [self.cache.acquire(prompt) for prompt in prompts]
        return sequences, self._compute(sequences, [s.num_cached_tokens for s in sequences])

    def decode(self, sequences: list[Sequence], tokens: list[list[int]]) -> list[Tensor]:
        """Append tokens to each sequence and compute them in one packed pass."""
        past = [s.num_tokens for s in sequences]
        for sequence, new in zip(sequences, tokens, strict=True):
            self.cache.append(sequence, new)
        return self._compute(sequences, past)

    def release(self, sequences: list[Sequence]) -> None:
        """End sequences and check every invariant of the cache."""
        for sequence in sequences:
            self.cache.release(sequence)
        self.cache.check()

    def _compute(self, sequences: list[Sequence], past: list[int]) -> list[Tensor]:
        steps = [
            SequenceStep(block_table=s.block_table, num_past=n, num_new=s.num_tokens - n, loads=s)
            for s, n in zip(sequences, past, strict=True)
        ]
        size, device = self.cache.config.block_size, self.model.device
        ids = [t for s, n in zip(sequences, past, strict=True) for t in s.token_ids[n:].tolist()]
        batch = build_batch(self.cache.hot, steps, block_size=size, device=device)
        with torch.inference_mode(), use_tierkv_attention(self.model), self.latent or nullcontext():
            logits = forward(self.model, torch.tensor(ids, device=device), batch)
        for sequence in sequences:
            self.cache.commit(sequence, sequence.num_tokens, partial_block=True)
        return list(logits.split([step.num_new for step in steps]))
