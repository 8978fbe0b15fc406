"""A cache with a lossy codec: near enough from disk, exact in memory, and never mixed with an exact one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError, NamespaceMismatchError
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=16, kv_heads=2, head_dim=8, dtype="float32")
EXACT = Namespace(weights="w", layout=LAYOUT)
PROMPT = list(range(40))
LOSSY = pytest.mark.parametrize("codec", ["lossy-int8"])


class NearEngine(PatternEngine):
    """Takes values in [0, 256) that are off by a sixteenth of the largest for its own."""

    def check(self, sequence: Sequence, num_tokens: int | None = None) -> None:
        sequence.wait_all()
        last = sequence.num_tokens if num_tokens is None else num_tokens
        for got, want in self._tokens(sequence, 0, last):
            for numbers, number in zip(got, want, strict=True):
                assert torch.all((numbers - number).abs() <= 256 / 16)


def open_cache(store: ColdStore | None, codec: str = "auto", namespace: Namespace = EXACT, **options: Any) -> TierCache:
    size = 16 * LAYOUT.block_bytes
    config = CacheConfig(block_size=16, hot_bytes=size, warm_bytes=size, codec=codec, **options)
    return TierCache(config, namespace=namespace, cold=store)


@pytest.fixture
def store(tmp_path: Path):
    with ColdStore(tmp_path / "store", quota_bytes=64 << 20, min_free_bytes=0) as store:
        yield store


@LOSSY
def test_blocks_of_a_lossy_cache_come_back_nearly_and_the_tail_too(store: ColdStore, codec: str) -> None:
    with open_cache(store, codec) as cache:
        engine = PatternEngine(cache)
        engine.start(PROMPT, partial_block=True)
        again = engine.start([*PROMPT, 99])  # hot and warm blocks are exact
        assert again.cached_tokens[Tier.COLD] == 0
        cache.flush()
        assert {entry.codec for _, entry in store.iter_entries()} == {codec}
    with open_cache(store, codec) as cache:
        sequence = NearEngine(cache).start([*PROMPT, 99])
        assert sequence.cached_tokens[Tier.COLD] == 40
        cache.release(sequence)
        cache.check()
    assert store.verify().is_sound


@LOSSY
def test_an_exact_cache_finds_nothing_of_a_lossy_one_and_the_other_way_round(store: ColdStore, codec: str) -> None:
    for name in (codec, "auto"):
        with open_cache(store, name) as cache:
            assert cache.match(PROMPT).num_cached_tokens == 0
            cache.release(PatternEngine(cache).start(PROMPT))
            cache.flush()
    assert len({namespace.digest for namespace in store.namespaces()}) == 2
    with open_cache(store) as cache:
        sequence = PatternEngine(cache).start([*PROMPT, 99])
        assert sequence.cached_tokens[Tier.COLD] == 32


@LOSSY
def test_a_state_file_of_a_lossy_cache_is_for_such_caches_only(store: ColdStore, codec: str, tmp_path: Path) -> None:
    with open_cache(store, codec) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.save_cache_state(tmp_path / "state")
    with open_cache(None, codec) as cache:
        cache.load_cache_state(tmp_path / "state")
        assert NearEngine(cache).start([*PROMPT, 99]).cached_tokens[Tier.COLD] == 32
    with open_cache(None) as cache, pytest.raises(NamespaceMismatchError, match="lossy_codec differ"):
        cache.load_cache_state(tmp_path / "state")


def test_a_block_with_an_infinity_is_kept_exactly_by_a_lossy_cache(store: ColdStore) -> None:
    with open_cache(store, "lossy-int8") as cache:
        sequence = cache.acquire(PROMPT[:17])
        sequence.wait_all()
        cache.hot.bytes_view[sequence.block_table[0]].zero_()
        cache.hot.key_cache(0)[sequence.block_table[0], 3] = float("inf")
        cache.commit(sequence, 16)
        cache.flush()
        assert [entry.codec for _, entry in store.iter_entries()] == ["raw"]
    with open_cache(store, "lossy-int8") as cache:
        sequence = cache.acquire(PROMPT[:17])
        sequence.wait_all()
        keys = cache.hot.key_cache(0)[sequence.block_table[0]]
        assert torch.isinf(keys[3]).all() and not keys[:3].any()


def test_the_cache_names_the_codec_in_its_namespace_only_if_it_is_lossy() -> None:
    with open_cache(None) as exact, open_cache(None, "lossy-int8") as lossy, open_cache(None, "zstd") as plain:
        assert exact.namespace == plain.namespace == EXACT
        assert lossy.namespace == replace(EXACT, lossy_codec="lossy-int8")


def test_a_codec_that_contradicts_the_namespace_or_the_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="lossy-int8"):
        open_cache(None, "auto", replace(EXACT, lossy_codec="lossy-int8"))
    fp8 = Namespace(weights="w", layout=tiny_layout(block_size=16, dtype="float8_e5m2"))
    with pytest.raises(ConfigError, match="no lossy codec takes float8_e5m2"):
        open_cache(None, "lossy-int8", fp8)
