"""Finds whether all ranks of a split model compute the same state: then one of them stores it for all.

The latent of MLA is whole on every rank, and so are K and V where a plan leaves the attention unsplit (DeepSeek-V3 in
Transformers). That the ranks' numbers are equal is not concluded from the model's plan alone: a pass shows it.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import xxhash
from torch import Tensor

from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.model_support import context_of
from tierkv.ranks.group import RankGroup
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

__all__ = ["are_replicated"]

_log = logging.getLogger(__name__)
_TEST_TOKENS = 64


def are_replicated(
    model: Any, layout: BlockLayout, ranks: RankGroup, *, latent: AbstractContextManager[None] | None = None
) -> bool:
    """Return whether every rank computes the same blocks, to the bit; False for a model that is not split.

    layout: of this rank's blocks. latent: the model's `LatentAttention`, for blocks of latents. All ranks call this
    together; the answer is the same on each. Costs one pass over at most 64 tokens, if the layout allows it at all.
    """
    if ranks.size == 1:
        return False
    digest = _state_digest(model, layout, latent) if _is_whole(model, layout) else b"a slice"
    digests = ranks.gather(digest)
    is_same = len(set(digests)) == 1 and digest != b"a slice"
    if not is_same and digest != b"a slice":
        _log.warning("ranks hold the same state, but their numbers differ: each rank stores its own")
    return is_same


def _is_whole(model: Any, layout: BlockLayout) -> bool:
    """Return whether the blocks hold all heads of the model, not this rank's part of them."""
    if layout.is_latent:
        return True
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return all(layer.kv_heads == heads for layer in layout.layers)


def _state_digest(model: Any, layout: BlockLayout, latent: AbstractContextManager[None] | None) -> bytes:
    """Return a digest of what one pass over a fixed prompt writes into the cache."""
    length = min(layout.block_size, _TEST_TOKENS, context_of(model) or _TEST_TOKENS)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (length,), generator=generator).to(model.device)
    pool = HotPool(layout, 1, torch.device(model.device))
    batch = build_batch(
        pool,
        [SequenceStep(block_table=[0], num_past=0, num_new=length)],
        block_size=layout.block_size,
        device=torch.device(model.device),
    )
    with torch.inference_mode(), use_tierkv_attention(model), latent or nullcontext():
        forward(model, ids, batch)
    digest = xxhash.xxh3_128()
    for number, layer in enumerate(layout.layers):
        parts = [pool.key_cache(number)] + ([] if layer.is_latent else [pool.value_cache(number)])
        for part in parts:
            digest.update(_bytes_of(part[0, :length]))
    return digest.digest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data
