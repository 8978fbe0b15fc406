"""A tiny model, and runners of it with small pools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from tierkv.config import CacheConfig
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Runner, open_runner

BLOCK = 16

OpenRunner = Callable[..., Runner]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: for a tiny model more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    return make_model("llama", block_size=BLOCK)


@pytest.fixture
def open_one(model: Any, tmp_path: Path) -> Iterator[OpenRunner]:
    """Return a function that opens a runner with `hot` and `warm` blocks; at the end nothing of a request is left."""
    opened: list[tuple[Any, Runner]] = []

    def open_runner_of(hot: int = 64, warm: int = 32, *, max_step_tokens: int = 8192, **options: Any) -> Runner:
        block_bytes = probe_layout(model, block_size=BLOCK).block_bytes
        config = CacheConfig(
            cold_path=tmp_path / f"store{len(opened)}",
            block_size=BLOCK,
            hot_bytes=hot * block_bytes,
            warm_bytes=warm * block_bytes,
            min_free_bytes=0,
            **options,
        )
        context = open_runner(LoadedModel(model, None, "tiny"), config, max_step_tokens=max_step_tokens)
        runner: Runner = context.__enter__()
        opened.append((context, runner))
        return runner

    yield open_runner_of
    for context, runner in opened:
        if not runner.cache.calls.is_closed:
            assert not runner.step_loop.scheduler.sequences() and not runner.step_loop.open_requests()
            assert not runner.step_loop.is_attached, "an engine was left open"
            runner.cache.check()
            assert runner.cache._tiers.index.hot.referenced_count == 0
        context.__exit__(None, None, None)
