"""The kernels write and read the bytes that storage/windows.py defines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this machine")

from test_windows import UNEVEN, normal_block

from tierkv.errors import ShapeError
from tierkv.kernels.windows import compress_section, decompress_section, section_tiles
from tierkv.storage.windows import WindowFormat
from tierkv.values.layout import BlockLayout, LayerLayout

FORM = WindowFormat(UNEVEN, (1, 3))


def make_pool(num_blocks: int, device: str) -> torch.Tensor:
    blocks = np.stack([normal_block(UNEVEN, seed) for seed in range(num_blocks)])
    blocks.view(np.uint16)[:, ::300] = 0  # zeros are escapes, in every tile
    return torch.from_numpy(blocks).view(torch.bfloat16).to(device)


@pytest.mark.parametrize("num_tokens", [UNEVEN.block_size, 7])
def test_the_kernels_bytes_are_those_of_the_definition(device: str, num_tokens: int) -> None:
    pool = make_pool(4, device)
    ids = torch.tensor([3, 1], device=device)
    counts = torch.full((2,), num_tokens, dtype=torch.int32, device=device)
    slots = np.zeros((2, FORM.slot_bytes), np.uint8)
    for slot, block_id in zip(slots, ids.tolist(), strict=True):
        assert FORM.compress(pool[block_id].view(torch.uint8).cpu().numpy(), slot, num_tokens=num_tokens)
    for group, section in enumerate(FORM.sections):
        tiles = section_tiles(section, device)
        out = torch.zeros((2, section.capacity_bytes), dtype=torch.uint8, device=device)
        totals = torch.zeros(2, dtype=torch.int32, device=device)
        compress_section(pool, ids, counts, section, tiles, out, totals)
        assert totals.tolist() == out.view(torch.int32)[:, 0].tolist()
        for row, slot in zip(out.cpu().numpy(), slots, strict=True):
            length = FORM.section_bytes(slot, group)
            want = slot[section.offset : section.offset + length]
            assert np.array_equal(row[: section.rest_at], want[: section.rest_at])
            assert np.array_equal(row[:length], want)


def test_what_the_definition_wrote_the_kernel_reads_into_the_named_blocks_only(device: str) -> None:
    pool = make_pool(4, device)
    slots = np.zeros((2, FORM.slot_bytes), np.uint8)
    for slot, block_id in zip(slots, (2, 0), strict=True):
        assert FORM.compress(pool[block_id].view(torch.uint8).cpu().numpy(), slot)
    target = torch.zeros_like(pool)
    for section in FORM.sections:
        part = torch.from_numpy(slots[:, section.offset : section.offset + section.capacity_bytes].copy()).to(device)
        ids = torch.tensor([1, 3], device=device)
        decompress_section(part, ids, section, section_tiles(section, device), target)
    assert torch.equal(target[1].view(torch.int16), pool[2].view(torch.int16))
    assert torch.equal(target[3].view(torch.int16), pool[0].view(torch.int16))
    assert not target[[0, 2]].any()


def test_a_block_that_does_not_fit_says_so_and_writes_nothing_behind_its_section(device: str) -> None:
    pool = (
        torch.randint(-(2**15), 2**15, (1, UNEVEN.block_bytes // 2), dtype=torch.int16).view(torch.bfloat16).to(device)
    )
    section = FORM.sections[0]
    out = torch.full((1, section.capacity_bytes + 64), 0xA5, dtype=torch.uint8, device=device)
    counts = torch.tensor([UNEVEN.block_size], dtype=torch.int32, device=device)
    totals = torch.zeros(1, dtype=torch.int32, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    compress_section(pool, ids, counts, section, section_tiles(section, device), out, totals)
    assert int(totals) > section.max_escapes
    assert int(out[0, :4].cpu().view(torch.int32)) > section.max_escapes
    assert bool((out[0, section.capacity_bytes :] == 0xA5).all())


def test_sections_of_another_size_are_refused(device: str) -> None:
    section = FORM.sections[0]
    tiles = section_tiles(section, device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ShapeError, match="capacity"):
        decompress_section(
            torch.zeros(1, 64, dtype=torch.uint8, device=device), ids, section, tiles, make_pool(1, device)
        )


def test_latents_go_through_the_kernels_as_through_the_definition(device: str) -> None:
    """One plane a layer, of a number of channels that is no power of two."""
    layout = BlockLayout(block_size=16, dtype="bfloat16", layers=(LayerLayout.of_latent(288),) * 3)
    form = WindowFormat(layout, (1, 3))
    pool = torch.from_numpy(np.stack([normal_block(layout, seed) for seed in range(2)])).view(torch.bfloat16).to(device)
    slot = np.zeros(form.slot_bytes, np.uint8)
    assert form.compress(pool[1].view(torch.uint8).cpu().numpy(), slot)
    target = torch.zeros_like(pool)
    for group, section in enumerate(form.sections):
        tiles = section_tiles(section, device)
        out = torch.zeros((1, section.capacity_bytes), dtype=torch.uint8, device=device)
        counts, totals = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (16, 0))
        compress_section(pool, torch.tensor([1], device=device), counts, section, tiles, out, totals)
        length = form.section_bytes(slot, group)
        assert np.array_equal(out[0, :length].cpu().numpy(), slot[section.offset : section.offset + length])
        decompress_section(out, torch.tensor([0], device=device), section, tiles, target)
    assert torch.equal(target[0].view(torch.int16), pool[1].view(torch.int16))
