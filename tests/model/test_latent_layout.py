"""The layout of blocks that hold the latent of multi-latent attention (MLA) in place of K and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pattern_layout import iter_packed

from tierkv.errors import ConfigError
from tierkv.movers.mover import layer_groups
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.hot import HotPool
from tierkv.storage.record import decode_record, encode_record
from tierkv.storage.record_header import BlockInfo
from tierkv.storage.windows import WindowFormat
from tierkv.values.layout import BlockLayout, LayerLayout
from tierkv.values.namespace import Namespace, differing_fields, parse_description


def latent(num_layers: int = 3, block_size: int = 16, dim: int = 24, dtype: str = "bfloat16") -> BlockLayout:
    return BlockLayout(block_size=block_size, dtype=dtype, layers=(LayerLayout.of_latent(dim),) * num_layers)


def test_a_latent_layer_is_one_run() -> None:
    layout = latent()
    assert [run.offset_bytes for run in layout.runs] == [0, 16 * 24 * 2, 2 * 16 * 24 * 2]
    assert layout.token_bytes == 3 * 24 * 2
    assert layout.layer_offsets == (0, 768, 1536, layout.block_bytes)
    assert layout.is_latent


def test_layers_with_a_latent_and_layers_with_k_and_v_share_a_block() -> None:
    layers = (LayerLayout(kv_heads=2, k_dim=4, v_dim=8), LayerLayout.of_latent(6), LayerLayout.of_latent(6))
    layout = BlockLayout(block_size=4, dtype="float32", layers=layers)
    assert layout.first_runs == (0, 2, 3, 4)
    assert layout.layer_offsets == (0, 4 * 2 * 12 * 4, 4 * (2 * 12 + 6) * 4, layout.block_bytes)
    assert not layout.is_latent
    pool = HotPool(layout, 3, torch.device("cpu"))
    pool.value_cache(0).fill_(1)
    pool.key_cache(1).fill_(2)
    pool.key_cache(2).fill_(3)
    assert pool.blocks[0].tolist() == [0.0] * 32 + [1.0] * 64 + [2.0] * 24 + [3.0] * 24


def test_deepseek_v2_lites_latent_takes_a_ninth_of_its_expanded_bytes() -> None:
    expanded = BlockLayout(
        block_size=256, dtype="bfloat16", layers=(LayerLayout(kv_heads=16, k_dim=192, v_dim=128),) * 27
    )
    held = latent(27, 256, 512 + 64)
    assert held.token_bytes == 27 * 576 * 2
    assert 8 * held.token_bytes <= expanded.token_bytes


@pytest.mark.parametrize("layer", [(2, 576, 0), (1, 0, 0), (1, 576, False), (0, 576, 0), (1, 576, -1)])
def test_what_is_no_latent_is_refused(layer: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        BlockLayout.from_dict({"block_size": 4, "dtype": "float32", "layers": [list(layer)]})


def test_a_latent_layout_survives_its_description_and_makes_another_namespace() -> None:
    held = latent()
    assert BlockLayout.from_dict(held.to_dict()) == held
    expanded = BlockLayout(block_size=16, dtype="bfloat16", layers=(LayerLayout(kv_heads=1, k_dim=16, v_dim=8),) * 3)
    spaces = [Namespace(weights="w", layout=layout) for layout in (held, expanded)]
    assert held.token_bytes == expanded.token_bytes
    assert spaces[0].digest != spaces[1].digest
    read = [parse_description(space.describe()) for space in spaces]
    assert read[0].layout == held
    assert differing_fields(read[0].fields, read[1].fields) == ["layers"]


@pytest.mark.parametrize("num_tokens", [16, 5])
@pytest.mark.parametrize("codec", ["raw", "exponent16", "zstd"])
def test_records_of_latents_come_back_exact(codec: str, num_tokens: int) -> None:
    layout = latent(4, 16, 40)
    words = np.random.default_rng(0).standard_normal(layout.block_bytes // 2).astype(np.float32)
    block = (words.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    info = BlockInfo.first(np.arange(num_tokens, dtype="<u4").tobytes(), namespace=b"n" * 16)
    record = encode_record(info, block, layout=layout, codec=codec_by_name(codec))
    out = np.full(layout.block_bytes, 0xEE, dtype=np.uint8)
    assert decode_record(record.data, out, expected=info, layout=layout) is None
    for offset, _, length in iter_packed(layout, num_tokens):
        assert np.array_equal(out[offset : offset + length], block[offset : offset + length])


def test_the_windows_format_holds_latents_exactly_in_groups_of_layers() -> None:
    layout = latent(5, 16, 576)
    formats = WindowFormat(layout, (2, 5))
    words = np.random.default_rng(1).standard_normal(layout.block_bytes // 2).astype(np.float32)
    block = (words.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    slot, out = np.zeros(formats.slot_bytes, dtype=np.uint8), np.zeros_like(block)
    assert formats.compress(block, slot)
    formats.decompress(slot, out)
    assert np.array_equal(out, block)
    assert formats.sections[1].tiles[0, 0] * 2 == layout.layer_offsets[2]


def test_groups_of_layers_end_where_layers_end() -> None:
    layout = latent(27, 256, 576)
    groups = layer_groups(layout)
    assert groups[-1] == 27
    assert len(groups) > 1
