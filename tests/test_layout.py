from __future__ import annotations

import pytest
from pattern_layout import iter_packed

from tierkv.errors import ConfigError
from tierkv.values.layout import BlockLayout, LayerLayout


def uneven() -> BlockLayout:
    """Two layers with other heads and dims, K and V of different dims."""
    return BlockLayout(
        block_size=4,
        dtype="bfloat16",
        layers=(LayerLayout(kv_heads=2, k_dim=8, v_dim=4), LayerLayout(kv_heads=1, k_dim=16, v_dim=16)),
    )


def test_runs_lie_one_behind_the_other_and_fill_the_block() -> None:
    layout = uneven()
    end = 0
    for run in layout.runs:
        assert run.offset_bytes == end
        end += run.token_bytes * layout.block_size
    assert end == layout.block_bytes == layout.token_bytes * 4


def test_equal_layers_make_the_five_dimensional_block() -> None:
    layout = BlockLayout.uniform(num_layers=3, block_size=16, kv_heads=2, head_dim=8, dtype="float32")
    assert layout.block_bytes == 3 * 2 * 16 * 2 * 8 * 4


def test_a_partial_block_packs_the_leading_tokens_of_every_run() -> None:
    layout = uneven()
    pieces = list(iter_packed(layout, 3))
    assert [offset for offset, _, _ in pieces] == [run.offset_bytes for run in layout.runs]
    assert sum(length for _, _, length in pieces) == layout.token_bytes * 3


def test_a_layout_survives_its_description() -> None:
    assert BlockLayout.from_dict(uneven().to_dict()) == uneven()


@pytest.mark.parametrize("bad", [{}, {"block_size": 0, "dtype": "float32", "layers": [[1, 1, 1]]}, {"layers": 3}])
def test_a_description_of_no_layout_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        BlockLayout.from_dict(bad)
