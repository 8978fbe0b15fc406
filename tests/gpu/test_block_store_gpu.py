"""The block store with an engine's tensors on a GPU: asynchronous copies, layer by layer, never too early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace, Strided
from tierkv.block_store.load_or_compute import Origin
from tierkv.movers.nvcomp_zstd import has_nvcomp

LAYERS, TOKENS, HEADS, DIM, PAGES = 8, 16, 8, 128, 600
LAYOUT = BlockLayout.uniform(num_layers=LAYERS, block_size=256, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")
PER_BLOCK = 256 // TOKENS
NUM_BLOCKS = 32
TOKEN_IDS = list(range(NUM_BLOCKS * 256))


def tensors() -> list[list[torch.Tensor]]:
    return [[torch.randn(PAGES, HEADS, TOKENS, 2 * DIM, device="cuda").bfloat16()] for _ in range(LAYERS)]


def pages_from(first: int, *, scattered: bool = False) -> list[list[int]]:
    if scattered:  # as in an engine that has run for a while
        order = torch.randperm(NUM_BLOCKS * PER_BLOCK, generator=torch.Generator().manual_seed(7)) + first
        return order.view(NUM_BLOCKS, PER_BLOCK).tolist()
    return [[first + block * PER_BLOCK + at for at in range(PER_BLOCK)] for block in range(NUM_BLOCKS)]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("batches", [True, False])
def test_blocks_come_back_in_front_of_the_work_that_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool, batches: bool, scattered: bool
) -> None:
    if not batches:
        monkeypatch.setattr("tierkv.movers.engine_memory.copy_addresses", lambda *_: False)
        monkeypatch.setattr("tierkv.movers.engine_memory.page_mover", lambda *_: None)
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=80 * LAYOUT.block_bytes)
    namespace = Namespace(weights="w", layout=LAYOUT)
    layers = tensors()
    store = BlockStore(config, namespace=namespace)
    memory = store.register(layers, pages_per_block=PER_BLOCK)
    keys = store.keys(TOKEN_IDS)
    for (tensor,) in layers:  # long work, queued before the save: the save must see its result
        for _ in range(20):
            tensor.add_(1.0)
    sources = pages_from(0, scattered=scattered)
    save = store.save(keys, Strided(memory, sources))
    assert save.num_saved == NUM_BLOCKS
    save.wait()  # the next work on this stream overwrites the pages
    expected = []
    for (tensor,) in layers:
        expected.append(tensor[[page for block in sources for page in block]].clone())
        tensor.zero_()
    if restart:
        store.close()
        store = BlockStore(config, namespace=namespace)
        memory = store.register(layers, pages_per_block=PER_BLOCK)
    first = PAGES - NUM_BLOCKS * PER_BLOCK
    reservation = store.reserve(keys)
    targets = pages_from(first, scattered=scattered)
    targets[0][3] = -1
    load = store.load(reservation, Strided(memory, targets))
    places = [page for block in targets for page in block]
    for layer, (tensor,) in enumerate(layers):
        load.wait(layer)
        got = tensor[places].clone()  # -1 is the last page, which is another block's
        got[3] = expected[layer][3]
        assert torch.equal(got, expected[layer]), f"layer {layer} was read before it had arrived"
    load.synchronize()
    assert load.num_loaded == NUM_BLOCKS and load.is_done()
    store.close()


def test_slots_are_not_reused_while_copies_read_them(tmp_path: Path) -> None:
    config = BlockStoreConfig(warm_bytes=40 * LAYOUT.block_bytes)
    layers = tensors()
    with BlockStore(config, namespace=Namespace(weights="w", layout=LAYOUT)) as store:
        memory = store.register(layers, pages_per_block=PER_BLOCK)
        for round_ in range(6):
            keys = store.keys([round_, *TOKEN_IDS])
            half = keys[:16]
            for (tensor,) in layers:
                tensor.fill_(float(round_ + 1))
            assert store.save(half, Strided(memory, pages_from(0)[:16])).num_saved == 16
            memory_marks = torch.cuda.Event()
            memory_marks.record()
            load = store.load(store.reserve(half), Strided(memory, pages_from(256)[:16]))
            load.wait()
            for (tensor,) in layers:
                assert torch.all(tensor[256:512] == round_ + 1)


@pytest.mark.parametrize("batch_blocks", [5, 64])
@pytest.mark.parametrize("scattered", [True, False])
def test_cold_blocks_are_decoded_on_the_gpu_and_stay_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scattered: bool, batch_blocks: int
) -> None:
    if not has_nvcomp():
        pytest.skip("nvCOMP is not installed")
    monkeypatch.setattr("tierkv.movers.engine_frames._MOST_BLOCKS", batch_blocks)
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=80 * LAYOUT.block_bytes)
    namespace = Namespace(weights="w", layout=LAYOUT)
    layers = tensors()
    sources, targets = pages_from(0, scattered=scattered), pages_from(PAGES - NUM_BLOCKS * PER_BLOCK, scattered=True)
    expected = [tensor[[page for block in sources for page in block]].clone() for (tensor,) in layers]
    with BlockStore(config, namespace=namespace) as store:
        keys = store.keys(TOKEN_IDS)
        memory = store.register(layers, pages_per_block=PER_BLOCK)
        store.save(keys, Strided(memory, sources)).synchronize()
    places = [page for block in targets for page in block]
    with BlockStore(config, namespace=namespace) as store:
        memory = store.register(layers, pages_per_block=PER_BLOCK)
        slots = store._tiers.memory
        assert slots.num_decoded_at_once == batch_blocks
        for origin in (Origin.PAGE_CACHE, Origin.WARM, Origin.WARM):
            for (tensor,) in layers:
                tensor.zero_()
            reservation = store.reserve(keys)
            assert reservation.origin is origin
            load = store.load(reservation, Strided(memory, targets))
            load.wait()
            for (tensor,), want in zip(layers, expected, strict=True):
                assert torch.equal(tensor[places], want)
            load.synchronize()
            assert load.num_loaded == NUM_BLOCKS and not slots.coded
        with store._changed:
            slots.reap()
        assert store.reserve(keys).num_ready == NUM_BLOCKS


def test_decoding_waits_for_the_work_that_still_reads_the_pages(tmp_path: Path) -> None:
    if not has_nvcomp():
        pytest.skip("nvCOMP is not installed")
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=80 * LAYOUT.block_bytes)
    layers, namespace = tensors(), Namespace(weights="w", layout=LAYOUT)
    with BlockStore(config, namespace=namespace) as store:
        keys = store.keys(TOKEN_IDS)
        store.save(keys, Strided(store.register(layers, pages_per_block=PER_BLOCK), pages_from(0))).synchronize()
    with BlockStore(config, namespace=namespace) as store:
        memory = store.register(layers, pages_per_block=PER_BLOCK)
        reservation = store.reserve(keys)
        reservation.wait()
        (first,) = layers[0]
        first.fill_(1.0)
        torch.cuda._sleep(200_000_000)  # longer than decoding takes
        read = first.clone()
        store.load(reservation, Strided(memory, pages_from(0))).wait()
        assert bool((read == 1.0).all()), "a page was overwritten under its reader"
        assert not bool((first[: NUM_BLOCKS * PER_BLOCK] == 1.0).all())
