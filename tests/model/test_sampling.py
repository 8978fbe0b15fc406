"""Sampling: the right distribution, independent of the batch, repeatable from any token on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tierkv.engine.sampling import BatchSampler, Choice, Sampler, SamplingOptions
from tierkv.errors import ConfigError

DRAWS = 8_000


def draw(logits: torch.Tensor, count: int, **options: Any) -> list[int]:
    """Return `count` tokens of one request over the same logits [vocabulary]."""
    sampler = Sampler(SamplingOptions(**options))
    found = []
    for _ in range(count):
        (choice,) = BatchSampler().start(logits[None], [sampler]).wait()
        found.append(choice.token_id)
    assert sampler.num_drawn == count
    return found


def chi_square(found: list[int], probabilities: torch.Tensor) -> float:
    """Return the chi-square statistic of draws over tokens with an expected count of 5 and more, the rest as one."""
    counts = torch.bincount(torch.tensor(found), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(found)
    assert not counts[expected == 0].any(), "a token without probability was drawn"
    often = expected >= 5
    statistic = ((counts - expected).square() / expected)[often].sum()
    rest = expected[~often].sum()
    if rest >= 5:
        statistic += (counts[~often].sum() - rest).square() / rest
    degrees = int(often.sum()) - 1 + int(rest >= 5)
    return float((statistic - degrees) / (2 * degrees) ** 0.5)  # about normal: mean 0, deviation 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, 50),
        ({"temperature": 0.5}, 50),
        ({"temperature": 2.0, "top_k": 10}, 10),
        ({"temperature": 1.0, "top_p": 0.8}, None),
        ({"temperature": 1.5, "top_k": 20, "top_p": 0.6}, None),
    ],
    ids=str,
)
def test_tokens_have_the_distribution_that_the_options_say(options: dict[str, Any], kept: int | None) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 1.5
    probabilities = (logits.double() / options["temperature"]).softmax(-1)
    order = probabilities.argsort(descending=True)
    if options.get("top_k"):
        probabilities[order[options["top_k"] :]] = 0
        probabilities /= probabilities.sum()
    if options.get("top_p"):
        ordered = probabilities[order]
        probabilities[order[ordered.cumsum(0) - ordered >= options["top_p"]]] = 0
        probabilities /= probabilities.sum()
    assert kept is None or int((probabilities > 0).sum()) == kept
    assert abs(chi_square(draw(logits, DRAWS, seed=7, **options), probabilities)) < 5


def test_draws_of_a_request_and_of_its_neighbours_are_independent() -> None:
    logits = torch.zeros(4)
    pairs = []
    for number in range(2):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=number))
        found = [BatchSampler().start(logits[None], [sampler]).wait()[0].token_id for _ in range(2001)]
        pairs += [4 * a + b for a, b in pairwise(found)]
        other = [
            BatchSampler()
            .start(logits[None], [Sampler(SamplingOptions(temperature=1.0, seed=seed))])
            .wait()[0]
            .token_id
            for seed in range(2000)
        ]
        pairs += [4 * a + b for a, b in zip(found, other, strict=False)]
    assert abs(chi_square(pairs, torch.full((16,), 1 / 16))) < 5


def mixed_samplers() -> list[Sampler]:
    options = [
        SamplingOptions(),
        SamplingOptions(temperature=0.8, seed=1),
        SamplingOptions(temperature=1.5, top_k=7, seed=2),
        SamplingOptions(top_logprobs=2),
        SamplingOptions(temperature=1.0, top_p=0.9, seed=3, top_logprobs=0),
    ]
    return [Sampler(each) for each in options]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_choice_depends_on_its_own_row_and_request_alone(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, 5, 300, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    together, alone = mixed_samplers(), mixed_samplers()
    batch = BatchSampler()
    for step in range(6):
        wanted = [batch.start(logits[step, row, None], [sampler]).wait()[0] for row, sampler in enumerate(alone)]
        assert batch.start(logits[step], together).wait() == wanted
    order = [4, 2, 0, 1, 3]
    shuffled = [mixed_samplers()[row] for row in order]
    assert batch.start(logits[0][order], shuffled).wait() == [
        batch.start(logits[0, row, None], [mixed_samplers()[row]]).wait()[0] for row in order
    ]


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [4]])
def test_only_the_named_rows_are_chosen_for(rows: list[int]) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    samplers = [Sampler(SamplingOptions()) for _ in rows]
    found = [choice.token_id for choice in BatchSampler().start(logits, samplers, rows=rows).wait()]
    assert found == logits[rows].argmax(-1).tolist()


def test_a_request_that_starts_again_goes_on_with_the_same_tokens() -> None:
    logits = torch.zeros(1000)
    whole = draw(logits, 12, temperature=1.0, seed=11)
    resumed = Sampler(SamplingOptions(temperature=1.0, seed=11))
    resumed.num_drawn = 5
    assert [BatchSampler().start(logits[None], [resumed]).wait()[0].token_id for _ in range(7)] == whole[5:]
    assert len(set(whole)) > 8


def test_seeds_and_equal_prompts_give_different_tokens_and_repeat_them() -> None:
    logits = torch.zeros(1 << 16)

    def first(seed: int | None, number: int = 0) -> int:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), number=number)
        return BatchSampler().start(logits[None], [sampler]).wait()[0].token_id

    keys: list[tuple[int | None, int]] = [(3, 0), (3, 1), (3, 2), (4, 0), (-4, 0), ((1 << 64) - 1, 0), (None, 0)]
    found = [first(*key) for key in [*keys, (None, 0)]]
    assert len(set(found)) == len(found)
    assert [first(*key) for key in keys[:-1]] == found[:-2]


def test_greedy_ties_go_to_the_lowest_id_also_among_the_most_likely() -> None:
    logits = torch.full((2, 5000), -1.0, dtype=torch.bfloat16)
    logits[0, [4000, 70, 900]] = 3.0
    logits[1, 0], logits[1, 1] = -0.0, 0.0
    for number in (None, 3):
        first, second = BatchSampler().start(logits, [Sampler(SamplingOptions(top_logprobs=number))] * 2).wait()
        assert (first.token_id, second.token_id) == (70, 0)
    assert [token for token, _ in first.top] == [70, 900, 4000]
    assert [token for token, _ in second.top] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_are_the_models_own(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(4), dtype=dtype)
    options = [
        SamplingOptions(temperature=0.5, top_k=2, seed=1, top_logprobs=3),
        SamplingOptions(top_logprobs=99),
        SamplingOptions(top_logprobs=0),
    ]
    want = logits.log_softmax(-1)
    for row, choice in enumerate(BatchSampler().start(logits, [Sampler(each) for each in options]).wait()):
        assert choice.logprob == pytest.approx(float(want[row, choice.token_id]), abs=1e-5)
        count = min(options[row].top_logprobs or 0, 30)
        best = want[row].sort(descending=True)
        assert [token for token, _ in choice.top] == best.indices[:count].tolist()
        assert [value for _, value in choice.top] == pytest.approx(best.values[:count].tolist(), abs=1e-5)
    (plain,) = BatchSampler().start(logits[:1], [Sampler(SamplingOptions())]).wait()
    assert plain == Choice(int(logits[0].argmax()))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_however_small_the_temperature_the_most_likely_token_is_drawn(temperature: float) -> None:
    logits = torch.tensor([-3e38, 1.0, 3e38, 2.0])
    assert draw(logits, 20, temperature=temperature, seed=1) == [2] * 20
    assert draw(logits, 20, temperature=1.0, top_p=1e-300, seed=1) == [2] * 20


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_a_number_of_log_probabilities_is_a_whole_number(bad: Any) -> None:
    with pytest.raises(ConfigError):
        SamplingOptions(top_logprobs=bad)
