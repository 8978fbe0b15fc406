"""Logits through the cache equal the plain model's, for every family and from every tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cached_model import CachedModel
from places import Place
from tiny_models import FAMILIES, MLA, VOCABULARY, make_model

from tierkv.values.block import Tier


@pytest.fixture(params=sorted(FAMILIES | MLA))
def model(request: pytest.FixtureRequest, place: Place) -> Any:
    return make_model(request.param, block_size=place.block_size, device=place.device, dtype=place.dtype)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def test_prefill(model: Any, place: Place, tmp_path: Path) -> None:
    prompt = tokens(3 * place.block_size + 5, seed=1)
    with CachedModel(model, tmp_path, block_size=place.block_size, hot=8, warm=8) as cached:
        sequences, (logits,) = cached.start([prompt])
        place.assert_logits(logits, model, prompt)
        cached.release(sequences)


def test_cached_prefixes_in_a_packed_batch_and_mixed_length_decode(model: Any, place: Place, tmp_path: Path) -> None:
    size = place.block_size
    shared = tokens(2 * size + size // 2, seed=2)
    prompts = [shared + tokens(n, seed=3 + n) for n in (size // 4, size, 1)] + [tokens(size // 2, seed=9)]
    with CachedModel(model, tmp_path, block_size=size, hot=32, warm=8) as cached:
        first, _ = cached.start([shared + tokens(size, seed=8)])
        sequences, logits = cached.start(prompts)
        assert [s.num_cached_tokens for s in sequences] == [len(shared)] * 3 + [0]
        for prompt, sequence, got in zip(prompts, sequences, logits, strict=True):
            place.assert_logits(got, model, prompt, first=sequence.num_cached_tokens)
        for step in range(3):
            new = [tokens(1 + (i + step) % 2, seed=100 * step + i) for i in range(len(sequences))]
            decoded = cached.decode(sequences, new)
            for sequence, token_ids, got in zip(sequences, new, decoded, strict=True):
                place.assert_logits(got, model, sequence.token_ids.tolist(), first=sequence.num_tokens - len(token_ids))
        cached.release([*first, *sequences])


def test_blocks_that_were_evicted_through_all_tiers_come_back_as_they_were(
    model: Any, place: Place, tmp_path: Path
) -> None:
    size = place.block_size
    prompts = [tokens(3 * size + size // 2, seed=20 + i) for i in range(5)]
    answered = dict.fromkeys(Tier, 0)
    with CachedModel(model, tmp_path, block_size=size, hot=6, warm=9) as cached:
        for prompt in [*prompts, *prompts, prompts[-1], prompts[-2]]:
            sequences, (logits,) = cached.start([[*prompt, 7]])
            place.assert_logits(logits, model, [*prompt, 7], first=sequences[0].num_cached_tokens)
            for tier, count in sequences[0].cached_tokens.items():
                answered[tier] += count
            cached.release(sequences)
    assert all(answered.values()), f"a tier never answered: {answered}"


def test_two_prompts_that_part_inside_a_block_share_it_up_to_there(model: Any, place: Place, tmp_path: Path) -> None:
    size = place.block_size
    shared = tokens(size + size // 2 + 3, seed=30)
    left, right = (shared + tokens(size, seed=31 + i) for i in range(2))
    with CachedModel(model, tmp_path, block_size=size, hot=16, warm=8) as cached:
        (first,), (logits,) = cached.start([left])
        place.assert_logits(logits, model, left)
        before = cached.cache.hot.blocks[first.block_table].clone()
        (second,), (logits,) = cached.start([right])
        assert second.num_cached_tokens == len(shared)
        place.assert_logits(logits, model, right, first=len(shared))
        assert torch.equal(cached.cache.hot.blocks[first.block_table], before), "the first one's block was changed"
        cached.release([first, second])


def test_another_process_answers_from_the_cold_tier(model: Any, place: Place, tmp_path: Path) -> None:
    size = place.block_size
    prompt = tokens(2 * size + 9, seed=40)
    for expected in (0, len(prompt)):
        with CachedModel(model, tmp_path, block_size=size, hot=8, warm=8) as cached:
            (sequence,), (logits,) = cached.start([[*prompt, 3]])
            assert sequence.cached_tokens[Tier.COLD] == expected
            place.assert_logits(logits, model, [*prompt, 3], first=expected)
            cached.release([sequence])
