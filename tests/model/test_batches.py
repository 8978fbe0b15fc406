"""A batch is checked whole before anything of it is computed, and samples of equal prompts differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.errors import CapacityError, ConfigError
from tierkv.scheduling.prefix_owners import PrefixOwners

BLOCK = 16
BLOCKS = 20


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", block_size=BLOCK)


@contextmanager
def opened(model: Any, **options: Any) -> Iterator[Runner]:
    config = CacheConfig(block_size=BLOCK, hot_bytes=BLOCKS * 3 * 2 * BLOCK * 2 * 64 * 4, warm_bytes=1 << 20)
    with open_runner(LoadedModel(model, None, "tiny"), config, **options) as runner:
        assert runner.cache.hot.num_blocks == BLOCKS
        yield runner


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampled(seed: int | None = None, count: int = 8, **options: Any) -> GenerationOptions:
    sampling = SamplingOptions(temperature=1.0, seed=seed)
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), sampling=sampling, **options)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], ConfigError, "at least one token"),
    (np.empty(0, dtype=np.int64), ConfigError, "at least one token"),
    ([5, VOCABULARY], ConfigError, "not one of the model's"),
    ([5, -1], ConfigError, "must lie"),
    ([5, 1 << 40], ConfigError, "must lie"),
    ([5, 1.0], ConfigError, "integers"),
    ([5, None], ConfigError, "integers"),
    ([5, True], ConfigError, "number 1 is True"),
    ((False, 5), ConfigError, "number 0 is False"),
    ([5, np.True_], ConfigError, "number 1"),
    (np.array([True]), ConfigError, "integers"),
    ([[5]], ConfigError, "flat"),
    (5, ConfigError, "flat"),
    ("text", ConfigError, "integers"),
    (tokens(8300), ConfigError, "longer than the model's context"),
    (tokens(BLOCKS * BLOCK + 1), CapacityError, "raise hot_bytes"),
    (tokens(BLOCKS * BLOCK - 6), CapacityError, "lower max_new_tokens"),  # with 8 new ones, of which 7 are computed
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("bad", "kind", "reason"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_prompt_is_named_before_anything_is_computed(
    model: Any, monkeypatch: pytest.MonkeyPatch, bad: Any, kind: type[Exception], reason: str, place: int
) -> None:
    prompts = [tokens(20, seed=2), tokens(20, seed=3)]
    prompts.insert(place, bad)
    with opened(model) as runner:
        monkeypatch.setattr(runner._pass, "run", lambda *_: pytest.fail("something was computed"))
        for call in (runner.generate, runner.stream):  # a stream too is checked when it is asked for
            with pytest.raises(kind, match=f"prompt {place} of the batch: .*{reason}"):
                call(prompts, sampled())
        with pytest.raises(kind):
            runner.generate([bad], sampled())
        runner.cache.check()


def test_a_prompt_that_just_fits_with_its_new_tokens_is_answered(model: Any) -> None:
    with opened(model) as runner:
        (answer,) = runner.generate([tokens(BLOCKS * BLOCK - 7)], sampled())
        assert len(answer.token_ids) == 8
        assert runner.generate([], sampled()) == []


@pytest.mark.parametrize("seed", [None, 0, 3, -5])
def test_equal_prompts_get_different_samples(model: Any, seed: int | None) -> None:
    prompts = [tokens(20), tokens(9, seed=2), tokens(20), tokens(20)]
    with opened(model) as runner:
        answers = [tuple(answer.token_ids) for answer in runner.generate(prompts, sampled(seed))]
        assert len(set(answers)) == 4
        again = [tuple(answer.token_ids) for answer in runner.generate(prompts, sampled(seed))]
        assert (again == answers) == (seed is not None)


def test_with_a_seed_an_answer_depends_on_its_prompt_alone(model: Any) -> None:
    with opened(model) as runner:
        (alone,) = runner.generate([tokens(9, seed=2)], sampled(3))
        together = runner.generate([tokens(20), tokens(9, seed=2), tokens(20)], sampled(3))
        assert together[1].token_ids == alone.token_ids
        streamed = [event.token_id for event in runner.stream([tokens(9, seed=2)], sampled(3))]
        assert streamed == alone.token_ids


def test_without_a_seed_all_ranks_choose_the_same_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks:
        size, rank = 2, 1

        def gather(self, payload: bytes) -> list[bytes]:
            return [b"77", payload]

    with opened(model) as runner:
        (want,) = runner.generate([tokens(20)], sampled(77))
        monkeypatch.setattr(runner.cache, "ranks", Ranks())
        assert runner._builder.sampling_of_all_ranks(sampled().sampling).seed == 77
        assert runner._builder.sampling_of_all_ranks(sampled(5).sampling).seed == 5
        assert runner._builder.sampling_of_all_ranks(SamplingOptions()).seed is None
    assert len(want.token_ids) == 8


@pytest.mark.parametrize("bad", [{"seed": 1.5}, {"seed": True}, {"seed": 1 << 64}, {"top_k": 2.5}], ids=str)
def test_sampling_takes_whole_numbers_where_it_needs_them(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingOptions(**bad)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "8"])
def test_the_number_of_new_tokens_is_a_whole_number(bad: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        GenerationOptions(max_new_tokens=bad)


def greedy(**options: Any) -> GenerationOptions:
    """Whole blocks only, unless the test says else: so the blocks and steps can be counted."""
    return GenerationOptions(max_new_tokens=1, stop_ids=frozenset(), **{"store_partial": False, **options})


@pytest.mark.parametrize("max_step_tokens", [8192, 48], ids=["one pass", "a prompt in pieces"])
def test_a_prefix_that_prompts_of_a_batch_share_is_computed_once(
    model: Any, monkeypatch: pytest.MonkeyPatch, max_step_tokens: int
) -> None:
    shared = tokens(8 * BLOCK)
    prompts = [[*shared, *tokens(5, seed=seed)] for seed in range(2, 8)]
    prompts += [tokens(20, seed=9), shared[: 2 * BLOCK], prompts[0]]
    computed: list[int] = []
    run = ForwardPass.run

    def counted(self: ForwardPass, steps: list[Any], ids: list[int]) -> Any:
        computed.append(len(ids))
        return run(self, steps, ids)

    with opened(model, max_step_tokens=max_step_tokens) as runner:
        monkeypatch.setattr(ForwardPass, "run", counted)
        answers = runner.generate(prompts, greedy())
        runner.cache.check()
        assert sum(computed) <= len(shared) + 6 * 5 + 20 + BLOCK + 5
        for prompt, answer in zip(prompts, answers, strict=True):
            assert runner.generate([prompt], greedy(use_cache=False))[0].token_ids == answer.token_ids


def test_a_batch_that_uses_no_cache_waits_for_no_prefix(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixOwners, "follow", lambda *_: pytest.fail("it waits"))
    with opened(model) as runner:
        runner.generate([tokens(40), tokens(40)], greedy(use_cache=False))
