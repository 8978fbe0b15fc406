"""Blocks of the hot pool change places while a model generates, and it does not notice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place
from tiny_models import VOCABULARY, make_model

from tierkv import CacheConfig, MemoryController
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.values.block import Tier

NUM_NEW = 24
Open = Callable[..., Runner]


@pytest.fixture
def model(place: Place) -> Any:
    return make_model("qwen3", block_size=place.block_size, device=place.device, dtype=place.dtype)


@pytest.fixture
def open_one(model: Any, place: Place, tmp_path: Path) -> Iterator[Open]:
    opened: list[Any] = []

    def open_runner_of(model: Any = model) -> Runner:
        block_bytes = probe_layout(model, block_size=place.block_size).block_bytes
        config = CacheConfig(
            cold_path=tmp_path / f"store-{len(opened)}",
            block_size=place.block_size,
            hot_bytes=24 * block_bytes,
            warm_bytes=24 * block_bytes,
            min_free_bytes=0,
        )
        opened.append(open_runner(LoadedModel(model, None, "tiny"), config))
        runner: Runner = opened[-1].__enter__()
        return runner

    yield open_runner_of
    for context in opened:
        context.__exit__(None, None, None)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def prompts_of(place: Place) -> list[list[int]]:
    shared = tokens(2 * place.block_size, seed=1)
    return [[*shared, *tokens(n, seed=10 + n)] for n in (3, place.block_size + 5, 9)] + [tokens(7, seed=4)]


def options() -> GenerationOptions:
    return GenerationOptions(max_new_tokens=NUM_NEW, stop_ids=frozenset(), keep_logits=True)


def scatter(runner: Runner, place: Place) -> None:
    """Leave holes in the hot pool."""
    for seed in range(100, 106):
        runner.generate([tokens(2 * place.block_size, seed=seed)], GenerationOptions(max_new_tokens=1))
    runner.cache.flush()
    held = runner.cache.blocks.inspect()
    runner.cache.blocks.manual_cache_management(evict_blocks=[state.block_id for state in held][1::3])


def test_defragmentation_during_decoding_leaves_logits_unchanged(open_one: Open, model: Any, place: Place) -> None:
    prompts = prompts_of(place)
    twin = copy.deepcopy(model)  # a model has one runner at a time
    quiet, moving = open_one(), open_one(twin)
    for runner in (quiet, moving):
        scatter(runner, place)
    want = quiet.generate(prompts, options())

    controller = MemoryController(moving)
    num_moves = num_tables = 0
    requests = moving._builder.build(prompts, options())  # as `stream` does, which keeps no logits
    for event in moving._run(requests, is_stream=True):
        if event.prompt:
            continue  # once a step
        with moving.between_steps() as running:
            tables = [list(sequence.block_table) for sequence in running]
        num_moves += bool(controller.optimize_memory_layout().moved)
        num_tables += tables != [sequence.block_table for sequence in running]
        moving.cache.evict(Tier.HOT, 1)  # a hole for the next time
    assert num_moves > 1 and num_tables > 1
    for request, expected in zip(requests, want, strict=True):
        assert request.new_ids == expected.token_ids
        assert expected.logits is not None
        assert torch.equal(torch.stack(request.logits), expected.logits)
    moving.cache.check()


def test_another_thread_may_defragment_while_a_runner_generates(open_one: Open, model: Any, place: Place) -> None:
    prompts = prompts_of(place)
    runner = open_one()
    scatter(runner, place)
    controller = MemoryController(runner)
    is_over, num_moves = threading.Event(), 0

    def defragment() -> None:
        nonlocal num_moves
        while not is_over.is_set():
            num_moves += bool(controller.optimize_memory_layout().moved)
            runner.cache.evict(Tier.HOT, 1)

    thread = threading.Thread(target=defragment)
    thread.start()
    try:
        generations = runner.generate(prompts, options())
    finally:
        is_over.set()
        thread.join()
    assert num_moves
    for prompt, got in zip(prompts, generations, strict=True):
        assert got.logits is not None
        place.assert_logits(got.logits, model, [*prompt, *got.token_ids[:-1]], first=len(prompt) - 1)
    runner.cache.check()
