"""Sparse decode is opt in, approximates only what it says, and leaves nothing behind in any tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import plain_logits
from tiny_models import VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.engine import Engine
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Generation, GenerationOptions, Runner, open_runner
from tierkv.engine.sparse.options import SparseDecode
from tierkv.errors import ConfigError
from tierkv.scheduling.scheduler import Scheduler
from tierkv.values.block import Tier

BLOCK = 16
SPARSE = SparseDecode(budget=0.25, min_tokens=1, recent_tokens=4, page_tokens=4)  # reads 4 pages at least
Open = Callable[..., Runner]


@pytest.fixture
def model() -> Any:
    return make_model("qwen3", block_size=BLOCK)


@pytest.fixture
def open_one(model: Any, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a runner on one store; at the end every invariant of its cache holds."""
    opened: list[Any] = []

    def open_runner_of(hot: int = 64, warm: int = 64, **options: Any) -> Runner:
        block_bytes = probe_layout(model, block_size=BLOCK).block_bytes
        config = CacheConfig(
            cold_path=tmp_path / "store",
            block_size=BLOCK,
            hot_bytes=hot * block_bytes,
            warm_bytes=warm * block_bytes,
            min_free_bytes=0,
        )
        context = open_runner(LoadedModel(model, None, "tiny"), config, **options)
        runner = context.__enter__()
        opened.append((context, runner))
        return runner

    yield open_runner_of
    for context, runner in reversed(opened):  # the last ones read the first one's store
        runner.cache.check()
        context.__exit__(None, None, None)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def answers(count: int, **options: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), keep_logits=True, **options)


def assert_first_is_exact(model: Any, prompt: list[int], got: Generation) -> None:
    assert got.logits is not None
    torch.testing.assert_close(got.logits[0].double(), plain_logits(model, prompt)[-1], atol=1e-3, rtol=1e-3)


def assert_only_prompt_is_cached(runner: Runner, prompt: list[int], answer: list[int]) -> None:
    """Raise AssertionError if any tier knows a token of the answer; the tiers are emptied from the top to see all."""
    runner.cache.flush()
    said = [*prompt, *answer, 1, 2, 3]
    for tier in (None, Tier.HOT, Tier.WARM):
        if tier is not None:
            runner.cache.evict(tier)
        assert runner.cache.match(said).num_cached_tokens == len(prompt)


@pytest.mark.parametrize("length", [70, 64, 81])
def test_nothing_that_is_decoded_sparsely_is_kept_in_any_tier(model: Any, open_one: Open, length: int) -> None:
    runner = open_one(sparse=SPARSE)
    prompt = tokens(length, seed=1)
    (got,) = runner.generate([prompt], answers(40))  # more than two blocks, and a partly filled one
    assert runner.sparse_tokens == 39
    assert_only_prompt_is_cached(runner, prompt, got.token_ids)
    assert_first_is_exact(model, prompt, got)


def test_the_answer_is_computed_exactly_when_it_comes_back_and_is_kept_then(model: Any, open_one: Open) -> None:
    runner = open_one(sparse=SPARSE)
    prompt = tokens(70, seed=1)
    (got,) = runner.generate([prompt], answers(40))
    said = [*prompt, *got.token_ids, 7]
    runner.cache.flush()
    (again,) = runner.generate([said], answers(1))
    assert sum(again.cached_tokens.values()) == len(prompt)
    assert_first_is_exact(model, said, again)
    runner.cache.flush()
    assert runner.cache.match([*said, 1]).num_cached_tokens == len(said)


def test_a_runner_without_it_reads_the_same_store_exactly(model: Any, open_one: Open) -> None:
    prompt = tokens(70, seed=2)
    sparse = open_one(sparse=SPARSE)
    (got,) = sparse.generate([prompt], answers(40))
    sparse.cache.flush()
    (again,) = open_one(cold=sparse.cache.cold).generate([[*prompt, *got.token_ids, 7]], answers(1))
    assert sum(again.cached_tokens.values()) == len(prompt)
    assert_first_is_exact(model, [*prompt, *got.token_ids, 7], again)


def test_it_is_off_by_default(model: Any, open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(90, seed=3)
    (got,) = runner.generate([prompt], answers(12))
    assert runner.sparse is None
    assert runner.sparse_tokens == 0
    want = plain_logits(model, [*prompt, *got.token_ids[:-1]])[len(prompt) - 1 :]
    assert got.logits is not None
    torch.testing.assert_close(got.logits.double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sparse", [SparseDecode(budget=1.0, min_tokens=1), SparseDecode(budget=0.1, min_tokens=120)])
def test_what_reads_all_is_exact_and_kept(model: Any, open_one: Open, sparse: SparseDecode) -> None:
    runner = open_one(sparse=sparse)
    prompt = tokens(70, seed=4)
    (got,) = runner.generate([prompt], answers(30))
    assert runner.sparse_tokens == 0
    want = plain_logits(model, [*prompt, *got.token_ids[:-1]])[len(prompt) - 1 :]
    assert got.logits is not None
    torch.testing.assert_close(got.logits.double(), want, atol=1e-3, rtol=1e-3)
    runner.cache.flush()
    assert runner.cache.match([*prompt, *got.token_ids, 1]).num_cached_tokens == 99


def test_a_sequence_that_outgrows_the_exact_length_keeps_what_was_exact(model: Any, open_one: Open) -> None:
    runner = open_one(sparse=SparseDecode(budget=0.1, min_tokens=80, recent_tokens=4, page_tokens=4))
    prompt = tokens(70, seed=5)
    (got,) = runner.generate([prompt], answers(40))
    runner.cache.flush()
    assert runner.sparse_tokens == 29, "the tokens at positions 80 to 108 read less than all"
    assert runner.cache.match([*prompt, *got.token_ids, 1]).num_cached_tokens == 80
    want = plain_logits(model, [*prompt, *got.token_ids[:10]])[len(prompt) - 1 :]
    assert got.logits is not None
    torch.testing.assert_close(got.logits[:11].double(), want, atol=1e-3, rtol=1e-3)


def test_the_last_token_of_a_cached_prompt_is_computed_exactly(model: Any, open_one: Open) -> None:
    runner = open_one(sparse=SPARSE)
    prompt = tokens(120, seed=6)
    runner.prefill(prompt[:-1])
    runner.cache.flush()
    (got,) = runner.generate([prompt], answers(3))
    assert sum(got.cached_tokens.values()) == 119, "one token is left, as if it were decoded"
    assert_first_is_exact(model, prompt, got)
    runner.cache.flush()
    assert runner.cache.match([*prompt, 1]).num_cached_tokens == 120


def test_prompts_beside_sparse_sequences_are_computed_exactly(model: Any, open_one: Open) -> None:
    runner = open_one(sparse=SPARSE, max_step_tokens=24)  # the second prompt's pieces share passes with decoding
    first, second = tokens(70, seed=7), tokens(150, seed=8)
    with Engine(runner, decode_step_tokens=16) as engine:
        streams = [engine.submit(first, answers(30)), engine.submit(second, answers(4))]
        found = [stream.result() for stream in streams]
    for prompt, got in zip((first, second), found, strict=True):
        assert_first_is_exact(model, prompt, got)
        assert_only_prompt_is_cached(runner, prompt, got.token_ids)
    (again,) = runner.generate([[*second, 5]], answers(1))
    assert sum(again.cached_tokens.values()) == len(second)
    assert_first_is_exact(model, [*second, 5], again)


@pytest.mark.parametrize("at", [1, 2, 20])
def test_a_preempted_request_leaves_nothing_sparse_behind(
    model: Any, open_one: Open, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    runner = open_one(sparse=SPARSE)
    prompt = tokens(70, seed=9)
    admit = Scheduler.admit
    cached: list[int] = []

    def preempt_once(self: Scheduler) -> int:
        for request in list(self.running):
            if request.num_new == at and not cached:
                said = [*request.token_ids, 1]
                self.preempt(request)
                runner.cache.flush()
                cached.append(runner.cache.match(said).num_cached_tokens)
        return admit(self)

    monkeypatch.setattr(Scheduler, "admit", preempt_once)
    (got,) = runner.generate([prompt], answers(30))
    assert cached == [len(prompt)]
    assert len(got.token_ids) == 30
    # The tokens before the pause were computed anew, exactly: those may be kept, and no others.
    runner.cache.flush()
    said = [*prompt, *got.token_ids, 7]
    assert runner.cache.match(said).num_cached_tokens == len(prompt) + at
    (again,) = runner.generate([said], answers(1))
    assert_first_is_exact(model, said, again)


def test_a_fork_and_a_shared_partial_block_know_what_is_exact(open_one: Open) -> None:
    cache = open_one().cache
    source = cache.acquire(tokens(40, seed=10))
    source.mark_inexact(35)
    source.mark_inexact(38)
    assert source.exact_tokens == 35, "a mark is never taken back"
    assert cache.commit(source, 40, partial_block=True) == 3, "two whole blocks and three tokens"
    with cache.fork(source) as forked:
        assert forked.exact_tokens == 35
    cache.flush()
    assert cache.match([*tokens(40, seed=10), 1]).num_cached_tokens == 35
    with cache.acquire([*tokens(40, seed=10)[:38], 9, 9]) as target:
        assert target.block_table[:2] == source.block_table[:2]
        assert target.num_cached_tokens == 35
        assert cache.batching.share_partial(source, target, 38) == 0, "the tokens at 35 to 37 are approximate"
        assert target.num_cached_tokens == 35


def test_options_that_do_not_fit_are_refused(open_one: Open) -> None:
    for wrong in (0.0, 1.5, -1, "0.1", True):
        with pytest.raises(ConfigError, match="budget"):
            SparseDecode(budget=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recent_tokens"):
        SparseDecode(budget=0.1, recent_tokens=0)
    with pytest.raises(ConfigError, match="divide"):
        open_one(sparse=SparseDecode(budget=0.1, page_tokens=5))


@pytest.mark.parametrize("length", [1, 16, 17, 63, 64, 65, 400])
def test_always_read_pages_fit_what_is_read(length: int) -> None:
    for options in (SPARSE, SparseDecode(budget=0.01, min_tokens=1, recent_tokens=33, page_tokens=8)):
        counts = options.counts(BLOCK)
        pages = -(-length // counts.page)
        always = min(counts.sinks, counts.scored(length)) + pages - counts.scored(length)
        assert min(always, pages) <= counts.read(length) <= pages
