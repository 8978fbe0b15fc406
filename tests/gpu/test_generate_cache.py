"""`generate` with a persistent cache on a GPU gives the tokens of plain `generate` in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, make_model

from tierkv.block_store.config import BlockStoreConfig
from tierkv.integrations.transformers import persistent_cache


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generate_on_a_gpu_is_plain_generate(family: str, tmp_path: Path) -> None:
    model = make_model(family, block_size=16, device="cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, 150), generator=generator).cuda()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    requests = [{"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True}]
    config = BlockStoreConfig(cold_path=tmp_path / "store", warm_bytes=64 << 20, cold_bytes=1 << 30, min_free_bytes=0)
    for life in range(2):
        with persistent_cache(model, config=config, block_size=16, compute_or_load=False) as cache:
            for options in requests:
                torch.manual_seed(0)
                want = type(model).generate(model, ids, attention_mask=mask, max_new_tokens=40, **options)
                torch.manual_seed(0)
                got = model.generate(ids, attention_mask=mask, max_new_tokens=40, **options)
                assert torch.equal(got, want), f"{family}, life {life}, {options}"
            stats = cache.stats()
            assert stats.num_hit_calls == 2 + life and not stats.uncached
