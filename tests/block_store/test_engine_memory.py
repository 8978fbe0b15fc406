"""Blocks in an engine's own tensors: whatever their strides, the bytes come back where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace, ShapeError, Strided

LAYERS, TOKENS, HEADS, DIM, PAGES = 3, 4, 2, 8, 12
LAYOUT = BlockLayout.uniform(num_layers=LAYERS, block_size=2 * TOKENS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")


def split_tensors() -> list[list[torch.Tensor]]:
    """nano-vLLM: K and V of all layers in one tensor [2, layers, pages, tokens, heads, dim]."""
    whole = torch.randn(2, LAYERS, PAGES, TOKENS, HEADS, DIM).bfloat16()
    return [[whole[0, layer], whole[1, layer]] for layer in range(LAYERS)]


def joined_tensors() -> list[list[torch.Tensor]]:
    """vLLM: a tensor for each layer, [pages, heads, tokens, K|V]."""
    return [[torch.randn(PAGES, HEADS, TOKENS, 2 * DIM).bfloat16()] for _ in range(LAYERS)]


def permuted_tensors() -> list[list[torch.Tensor]]:
    """The same, tokens before heads in memory."""
    return [[torch.randn(PAGES, TOKENS, HEADS, 2 * DIM).bfloat16().transpose(1, 2)] for _ in range(LAYERS)]


def padded_tensors() -> list[list[torch.Tensor]]:
    """Pages that lie further apart than they are long."""
    size = HEADS * TOKENS * 2 * DIM
    return [
        [torch.randn(PAGES, size + 16).bfloat16()[:, :size].unflatten(1, (HEADS, TOKENS, -1))] for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("make", [split_tensors, joined_tensors, permuted_tensors, padded_tensors])
def test_pages_come_back_at_other_places(tmp_path: Path, make) -> None:
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=32 * LAYOUT.block_bytes)
    namespace = Namespace(weights="w", layout=LAYOUT, architecture={"strides": make.__name__})
    layers = make()
    before = [[tensor.clone() for tensor in layer] for layer in layers]
    with BlockStore(config, namespace=namespace) as store:
        memory = store.register(layers, pages_per_block=2)
        keys = store.keys(range(5 * 8))
        assert store.save(keys, Strided(memory, [[0, 7], [1, 8], [2, 9], [3, 4], [11, 10]])).num_saved == 5
    for layer in layers:
        for tensor in layer:
            tensor.zero_()
    with BlockStore(config, namespace=namespace) as store:
        memory = store.register(layers, pages_per_block=2)
        targets = [[5, 6], [0, 1], [-1, 3]]
        load = store.load(store.reserve(keys, 1), Strided(memory, targets))
        load.wait(0)
        load.synchronize()
        assert load.num_loaded == 3 and load.failed_keys == []
    for now, old in zip(layers, before, strict=True):
        for tensor, then in zip(now, old, strict=True):
            for target, source in ((5, 1), (6, 8), (0, 2), (1, 9), (3, 4)):
                assert torch.equal(tensor[target], then[source])
            for other in (2, 4, 7, 8, 9, 10, 11):
                assert not tensor[other].any(), "a page that was not named was written to"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=32 * LAYOUT.block_bytes)
    with BlockStore(config, namespace=Namespace(weights="w", layout=LAYOUT)) as store:
        for layers, pages_per_block in (
            (joined_tensors(), 1),
            (joined_tensors()[:2], 2),
            ([[tensor[:, :, :, ::2]] for (tensor,) in joined_tensors()], 4),
            ([[tensor.expand(2, *tensor.shape).transpose(0, 1)] for (tensor,) in joined_tensors()], 1),
            ([], 2),
        ):
            with pytest.raises(ShapeError):
                store.register(layers, pages_per_block=pages_per_block)
        memory = store.register(joined_tensors(), pages_per_block=2)
        keys = store.keys(range(8))
        for pages in ([[0]], [[0, 12]], [[-1, 0]], [[0, -2]]):
            with pytest.raises(ShapeError):
                store.save(keys, Strided(memory, pages))
        with store._changed:
            assert store._tiers.memory.index.slots.referenced_count == len(store._tiers.memory.spare), (
                "a slot is still held"
            )
