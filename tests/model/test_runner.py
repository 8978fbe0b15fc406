from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place, plain_logits
from tiny_models import VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.cascade import CascadeCost
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.errors import CapacityError, ClosedError, ConfigError
from tierkv.values.block import Tier

Open = Callable[..., Runner]


@pytest.fixture
def model(place: Place) -> Any:
    return make_model("qwen3", block_size=place.block_size, device=place.device, dtype=place.dtype)


@pytest.fixture
def open_one(model: Any, place: Place, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a runner whose hot pool has `hot` blocks, on one store."""
    opened: list[Any] = []

    def open_runner_of(hot: int = 32, warm: int = 16, **options: Any) -> Runner:
        block_bytes = probe_layout(model, block_size=place.block_size).block_bytes
        config = CacheConfig(
            cold_path=tmp_path / "store",
            block_size=place.block_size,
            hot_bytes=hot * block_bytes,
            warm_bytes=warm * block_bytes,
            min_free_bytes=0,
        )
        opened.append(open_runner(LoadedModel(model, None, "tiny"), config, **options))
        runner: Runner = opened[-1].__enter__()
        return runner

    yield open_runner_of
    for context in opened:
        context.__exit__(None, None, None)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def greedy(count: int, **options: Any) -> GenerationOptions:
    """Whole blocks only, unless the test says else: so the blocks and steps can be counted."""
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), **{"store_partial": False, **options})


def test_the_next_turn_of_a_conversation_finds_all_that_was_computed(place: Place, open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(place.block_size + 5, seed=1)
    (first,) = runner.generate([prompt], GenerationOptions(max_new_tokens=4, stop_ids=frozenset()))
    runner.cache.flush()
    said = [*prompt, *first.token_ids]
    (second,) = runner.generate([[*said, 1, 2]], GenerationOptions(max_new_tokens=1, stop_ids=frozenset()))
    assert sum(second.cached_tokens.values()) == len(said) - 1, "K and V of the last token were not computed"


def test_greedy_answers_are_the_models_own(model: Any, place: Place, open_one: Open) -> None:
    prompts = [tokens(n, seed=n) for n in (place.block_size + 9, 5, 2 * place.block_size + 1)]
    runner = open_one()
    for _ in range(2):  # the second time from the cache
        for prompt, got in zip(prompts, runner.generate(prompts, greedy(12, keep_logits=True)), strict=True):
            assert got.logits is not None and got.prompt_tokens == len(prompt)
            fed = [*prompt, *got.token_ids[:-1]]
            place.assert_logits(got.logits, model, fed, first=len(prompt) - 1)
            if place.dtype == torch.float32:
                assert got.token_ids == plain_logits(model, fed)[len(prompt) - 1 :].argmax(-1).tolist()
    runner.cache.check()


def test_a_second_run_skips_the_prefill_of_what_is_cached(place: Place, open_one: Open) -> None:
    prompt = tokens(2 * place.block_size + 3, seed=1)
    runner = open_one()
    assert runner.prefill(prompt) == len(prompt)
    runner.cache.flush()
    assert runner.prefill(prompt) == 0
    (found,) = runner.generate([[*prompt, 5]], greedy(1))
    assert sum(found.cached_tokens.values()) == len(prompt)


def test_prompts_that_do_not_fit_together_wait_for_each_other(place: Place, open_one: Open) -> None:
    prompts = [tokens(2 * place.block_size, seed=i) for i in range(5)]
    runner = open_one(hot=5)
    together = runner.generate(prompts, greedy(4))
    runner.cache.check()
    alone = [runner.generate([prompt], greedy(4, use_cache=False))[0] for prompt in prompts]
    assert [len(g.token_ids) for g in together] == [4] * 5
    if place.dtype == torch.float32:
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]


def test_sampling_does_not_depend_on_what_else_is_in_the_batch(place: Place, open_one: Open) -> None:
    runner = open_one()
    options = greedy(8, sampling=SamplingOptions(temperature=0.7, top_k=50, top_p=0.9, seed=3), use_cache=False)
    prompts = [tokens(n, seed=n) for n in (7, 19, 11)]
    together = runner.generate(prompts, options)
    if place.dtype == torch.float32:  # in bfloat16 another batch shape may round to another token
        alone = [runner.generate([prompt], options)[0] for prompt in prompts]
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert all(len(g.token_ids) == 8 for g in together)


def test_a_stream_yields_the_same_tokens_and_closing_it_releases_everything(open_one: Open) -> None:
    runner = open_one()
    prompts = [tokens(9, seed=1), tokens(30, seed=2)]
    want = runner.generate(prompts, greedy(6, use_cache=False))
    events = list(runner.stream(prompts, greedy(6, use_cache=False)))
    for number, generation in enumerate(want):
        assert [e.token_id for e in events if e.prompt == number] == generation.token_ids
        assert [e.is_last for e in events if e.prompt == number] == [False] * 5 + [True]
    stream = runner.stream(prompts, greedy(6))
    next(iter(stream))
    stream.close()
    runner.cache.check()


def test_a_stop_token_ends_a_sequence_and_is_its_last(open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(9, seed=1)
    (free,) = runner.generate([prompt], greedy(6))
    stop = free.token_ids[2]
    (stopped,) = runner.generate([prompt], GenerationOptions(max_new_tokens=6, stop_ids=frozenset({stop})))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_long_prompts_are_computed_in_pieces(model: Any, place: Place, open_one: Open) -> None:
    runner = open_one(max_step_tokens=7)
    prompts = [tokens(20, seed=1), tokens(3, seed=2)]
    pieces = runner.generate(prompts, greedy(4, keep_logits=True, use_cache=False))
    for prompt, got in zip(prompts, pieces, strict=True):
        assert got.logits is not None
        place.assert_logits(got.logits, model, [*prompt, *got.token_ids[:-1]], first=len(prompt) - 1)


def test_decoding_without_room_sends_the_youngest_back_and_loses_no_token(place: Place, open_one: Open) -> None:
    size = place.block_size
    runner = open_one(hot=5)
    prompts = [tokens(2 * size - 2, seed=i) for i in range(2)]
    got = runner.generate(prompts, greedy(size + 4))
    assert [len(g.token_ids) for g in got] == [size + 4] * 2
    runner.cache.check()
    alone = [runner.generate([prompt], greedy(size + 4))[0] for prompt in prompts]
    if place.dtype == torch.float32:
        assert [g.token_ids for g in got] == [g.token_ids for g in alone]


def test_a_prompt_that_never_fits_is_refused_and_nothing_leaks(place: Place, open_one: Open) -> None:
    runner = open_one(hot=4)
    with pytest.raises(CapacityError, match="hot_bytes"):
        runner.generate([tokens(5 * place.block_size, seed=1)], greedy(1))
    runner.cache.check()


def test_an_answer_is_found_by_the_next_turn(place: Place, open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(place.block_size + 2, seed=1)
    (first,) = runner.generate([prompt], greedy(5, store_partial=True))
    runner.cache.flush()
    (second,) = runner.generate([[*prompt, *first.token_ids, 1, 2]], greedy(1))
    computed = len(prompt) + len(first.token_ids) - 1  # the last token chosen was never fed
    assert sum(second.cached_tokens.values()) == computed


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}], ids=lambda bad: next(iter(bad))
)
def test_sampling_options_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SamplingOptions(**bad)  # type: ignore[arg-type]


def test_cached_tokens_name_the_tier_that_answered(place: Place, open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(2 * place.block_size + 1, seed=1)
    runner.prefill(prompt)
    runner.cache.flush()
    whole = 2 * place.block_size
    for tier, evicted in ((Tier.HOT, ()), (Tier.WARM, (Tier.HOT,)), (Tier.COLD, (Tier.HOT, Tier.WARM))):
        for level in evicted:
            runner.cache.evict(level)
        (found,) = runner.generate([prompt], greedy(1))
        assert found.cached_tokens[tier] == whole, tier


SHARING = CascadeCost(
    heads=4, kv_heads=2, head_dim=64, token_bytes=1024, bytes_per_s=1.0, flops_per_s=1e15, overhead_s=0.0
)
"""A cost by which every shared block pays, however short."""


@pytest.mark.parametrize("num_others", [0, 1])
def test_what_a_cold_hit_took_is_learned_from_requests_that_nothing_ran_beside(
    place: Place, open_one: Open, num_others: int
) -> None:
    runner, prompt = open_one(), tokens(3 * place.block_size, seed=1)
    runner.prefill(prompt)
    runner.cache.flush()
    for tier in (Tier.HOT, Tier.WARM):
        runner.cache.evict(tier)
    told: list[float] = []
    choice = runner.cache._acquirer._choice
    assert choice
    note = choice.record_load
    choice.record_load = lambda load, seconds: (told.append(seconds), note(load, seconds))[-1]  # type: ignore[method-assign]
    runner.generate([[*prompt, 7], *[tokens(20, seed=2)] * num_others], greedy(3))
    assert len(told) == (0 if num_others else 1), "once, with the first token"
    learned = [costs.estimate(3) for costs in choice.load_costs.values()]
    assert len([seconds for seconds in learned if seconds is not None]) == len(told)


def test_sequences_that_share_a_prefix_decode_as_they_would_alone(model: Any, place: Place, open_one: Open) -> None:
    size = place.block_size
    shared = [tokens(2 * size, seed=1), tokens(size + 3, seed=2)]
    prompts = [shared[i % 2] + tokens(n, seed=10 + n) for i, n in enumerate((9, 1, size, 2, 5))] + [tokens(4, seed=3)]
    runner = open_one(hot=48, cascade_cost=SHARING)
    for _ in range(2):  # on a GPU the second time replays graphs
        for prompt, got in zip(prompts, runner.generate(prompts, greedy(6, keep_logits=True)), strict=True):
            assert got.logits is not None
            place.assert_logits(got.logits, model, [*prompt, *got.token_ids[:-1]], first=len(prompt) - 1)
    device = torch.device(place.device).type
    may_cascade = runner._pass.attention.can_cascade(device)  # not if the tests run with FlashInfer forced
    assert runner.cascade_steps == (2 * 5 if may_cascade else 0)
    runner.cache.check()


def test_a_cascade_can_be_switched_off(place: Place, open_one: Open) -> None:
    prompts = [tokens(2 * place.block_size, seed=1) + tokens(n, seed=n) for n in (1, 2, 3)]
    runner = open_one(cascade="off")
    runner.generate(prompts, greedy(3))
    assert runner.cascade_steps == 0
    with pytest.raises(ConfigError, match="auto"):
        Runner(runner.loaded, runner.cache, cascade="on")


def test_short_prefixes_of_small_batches_are_read_plainly(place: Place, open_one: Open) -> None:
    prompts = [tokens(2 * place.block_size, seed=1) + tokens(n, seed=n) for n in (1, 2)]
    runner = open_one()
    runner.generate(prompts, greedy(3))
    assert runner.cascade_steps == 0


def test_a_model_whose_weights_have_changed_is_refused(model: Any, open_one: Open) -> None:
    runner = open_one()
    prompt = tokens(20, seed=1)
    runner.prefill(prompt)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    for call in (runner.generate, lambda prompts: runner.prefill(prompts[0])):
        with pytest.raises(ConfigError, match="weights have changed"):
            call([prompt])


def change(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def test_weights_that_change_between_two_tokens_compute_no_other(model: Any, place: Place, open_one: Open) -> None:
    runner, prompt = open_one(), tokens(2 * place.block_size - 1, seed=1)
    stream = runner.stream([prompt, tokens(5, seed=2)], greedy(6))
    events = [next(stream), next(stream)]
    change(model)
    with pytest.raises(ConfigError, match="weights have changed"):
        next(stream)
    assert runner.cache.match([*prompt, events[0].token_id, 7]).num_cached_tokens == place.block_size
    runner.cache.check()


def test_a_batch_that_fails_is_released_to_the_last_request(
    model: Any, place: Place, open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise MemoryError("no room to commit")

    runner = open_one()
    stream = runner.stream([tokens(place.block_size, seed=i) for i in range(3)], greedy(4, store_partial=True))
    next(stream)
    monkeypatch.setattr(runner.cache, "commit", fail)
    with pytest.raises(MemoryError):
        stream.close()
    runner.cache.check()
    assert runner.cache._tiers.index.hot.referenced_count == 0


@pytest.mark.parametrize(("bad", "reason"), [([VOCABULARY], "not one of"), ([-1], "must lie"), ([1.5], "integers")])
def test_token_ids_that_the_model_has_not_are_refused(open_one: Open, bad: list[int], reason: str) -> None:
    runner = open_one()
    for call in (runner.generate, lambda prompts: runner.prefill(prompts[0])):
        with pytest.raises(ConfigError, match=reason):
            call([bad])
    runner.cache.check()


def test_a_request_interrupted_as_it_begins_holds_nothing(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    runner = open_one()
    other = runner.stream([tokens(20, seed=2)], greedy(3))
    first = next(other)
    with monkeypatch.context() as patch:
        patch.setattr(runner.step_loop.scheduler, "_share", interrupt)  # it has its blocks by then
        with pytest.raises(KeyboardInterrupt):
            runner.generate([tokens(20, seed=1)])
    runner.cache.check()
    assert not runner.step_loop.scheduler.sequences()
    rest = [event.token_id for event in other]  # it starts anew where it was
    (want,) = runner.generate([tokens(20, seed=2)], greedy(3, use_cache=False))
    assert [first.token_id, *rest] == want.token_ids
    runner.cache.check()


def test_more_tokens_than_the_models_context_are_refused(model: Any, place: Place, open_one: Open) -> None:
    context = model.config.max_position_embeddings = place.block_size + 50
    runner = open_one()
    with pytest.raises(ConfigError, match=f"longer than the model's context of {context}"):
        runner.prefill(tokens(context + 1, seed=1))
    with pytest.raises(ConfigError, match="lower max_new_tokens"):
        runner.generate([tokens(context - 1, seed=1)], greedy(3))
    assert len(runner.generate([tokens(context - 1, seed=1)], greedy(2))[0].token_ids) == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as Python says of threads
def test_a_runner_in_a_forked_process_refuses_at_once_although_a_thread_held_it(open_one: Open, place: Place) -> None:
    if place.device == "cuda":
        pytest.skip("a forked process cannot use CUDA at all")
    runner = open_one()
    (want,) = runner.generate([tokens(40, 1)], greedy(4))
    started = runner.stream([tokens(40, 1)], greedy(4))
    next(started)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: runner.generate([tokens(40, 2)], greedy(1)),
        "stream": lambda: next(runner.stream([tokens(40, 2)], greedy(1))),
        "prefill": lambda: runner.prefill(tokens(40, 2)),
        "between_steps": lambda: runner.between_steps().__enter__(),
    }

    def refused() -> str:
        names = []
        for name, call in calls.items():
            try:
                call()
            except ClosedError:
                names.append(name)
        return " ".join(names)

    holding, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with runner.between_steps():
            holding.set()
            ended.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(30)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, refused().encode())
        os._exit(0)
    ended.set()
    holder.join()
    is_done = bool(select.select([read], [], [], 20)[0])
    said = os.read(read, 1000).decode() if is_done else "it hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for each in (read, write):
        os.close(each)
    assert said == " ".join(calls)
    assert [want.token_ids[0], *(each.token_id for each in started)] == want.token_ids


def test_a_stream_goes_no_further_in_a_forked_process(open_one: Open) -> None:
    runner = open_one()
    stream = runner.stream([tokens(40, 1)], greedy(4))
    next(stream)
    runner.cache.calls._pid += 1  # as if this were a fork
    with pytest.raises(ClosedError, match="forked"):
        next(stream)
    runner.cache.calls._pid -= 1


def test_a_closed_runner_has_no_graphs(model: Any, place: Place, tmp_path: Path) -> None:
    """A process group of the graphs' collective operations would wait for their end."""
    config = CacheConfig(
        cold_path=tmp_path, block_size=place.block_size, hot_bytes=64 << 20, warm_bytes=64 << 20, min_free_bytes=0
    )
    with open_runner(LoadedModel(model, None, "tiny"), config) as runner:
        graphs: Any = runner._pass.graphs
        for _ in range(3):
            runner.generate([tokens(5, seed=1)], GenerationOptions(max_new_tokens=4))
        assert bool(graphs._graphs) == (place.device == "cuda")
        graphs._graphs["as on a GPU"] = graphs._logits = object()
    assert not graphs._is_usable
    assert not graphs._graphs
    assert graphs._logits is None
