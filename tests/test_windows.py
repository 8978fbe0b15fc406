"""The compressed format of the warm tier: exact for every bit pattern, and never longer than its slot."""

from __future__ import annotations

import numpy as np
import pytest
from pattern_layout import iter_packed

from tierkv.errors import ConfigError
from tierkv.storage.codec import Bytes
from tierkv.storage.windows import WindowFormat
from tierkv.values.layout import BlockLayout, LayerLayout

UNEVEN = BlockLayout(
    block_size=24,
    dtype="bfloat16",
    layers=(
        LayerLayout(kv_heads=2, k_dim=20, v_dim=12),
        LayerLayout(kv_heads=5, k_dim=64, v_dim=64),
        LayerLayout(kv_heads=1, k_dim=8, v_dim=8),
    ),
)


def normal_block(layout: BlockLayout, seed: int = 0) -> Bytes:
    values = np.random.default_rng(seed).standard_normal(layout.block_bytes // 2, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def compressed(form: WindowFormat, block: Bytes, num_tokens: int | None = None) -> Bytes:
    slot = np.full(form.slot_bytes, 0xA5, np.uint8)
    assert form.compress(block, slot, num_tokens=num_tokens)
    return slot


@pytest.mark.parametrize("groups", [(3,), (1, 3), (1, 2, 3)])
def test_a_compressed_block_comes_back_bit_for_bit(groups: tuple[int, ...]) -> None:
    form = WindowFormat(UNEVEN, groups)
    block = normal_block(UNEVEN)
    back = np.zeros_like(block)
    form.decompress(compressed(form, block), back)
    assert np.array_equal(back, block)


def test_nan_infinity_zero_and_denormal_values_come_back_bit_for_bit() -> None:
    form = WindowFormat(UNEVEN, (3,))
    block = normal_block(UNEVEN)
    words = block.view(np.uint16)
    words[::40] = np.resize(
        np.array([0x7FC0, 0xFFFF, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x8001], np.uint16), words[::40].size
    )
    back = np.zeros_like(block)
    slot = np.empty(form.slot_bytes, np.uint8)
    if form.compress(block, slot):
        form.decompress(slot, back)
        assert np.array_equal(back, block)
    tame = normal_block(UNEVEN)
    tame.view(np.uint16)[::400] = 0x7FC0  # each takes its channel's whole window away
    back = np.zeros_like(tame)
    form.decompress(compressed(form, tame), back)
    assert np.array_equal(back, tame)


def test_of_a_partial_block_the_tokens_that_count_come_back() -> None:
    form = WindowFormat(UNEVEN, (1, 3))
    block = normal_block(UNEVEN)
    back = np.zeros_like(block)
    form.decompress(compressed(form, block, num_tokens=5), back)
    for offset, _, length in iter_packed(UNEVEN, 5):
        assert np.array_equal(back[offset : offset + length], block[offset : offset + length])


def test_random_bits_do_not_fit_and_are_refused() -> None:
    form = WindowFormat(UNEVEN, (3,))
    block = np.random.default_rng(0).integers(0, 256, UNEVEN.block_bytes, dtype=np.uint8)
    assert not form.compress(block, np.empty(form.slot_bytes, np.uint8))


def test_normal_values_take_11_and_a_quarter_bits_and_a_slot_takes_12() -> None:
    layout = BlockLayout.uniform(num_layers=2, block_size=256, kv_heads=4, head_dim=64, dtype="bfloat16")
    form = WindowFormat(layout, (1, 2))
    slot = compressed(form, normal_block(layout))
    assert 1.40 < layout.block_bytes / sum(form.section_bytes(slot, group) for group in range(2)) < 1.44
    assert 1.32 < layout.block_bytes / form.slot_bytes < 1.34


def test_other_types_than_bfloat16_are_refused() -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=16, kv_heads=1, head_dim=8, dtype="float16")
    with pytest.raises(ConfigError, match="bfloat16"):
        WindowFormat(layout, (1,))
