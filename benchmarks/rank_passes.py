"""How a split model's passes run, and what one sum over its ranks takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import distributed

from tierkv.engine.fused_model import FusedDecoder
from tierkv.engine.fused_ops import Norm, add_norm
from tierkv.engine.runner import Runner
from tierkv.ranks.rank_sums import RankSums

__all__ = ["passes_line"]


def passes_line(runner: Runner) -> str:
    """Say how passes run: fused or not, from graphs or not, and what one sum of a token's vector takes."""
    compute, graphs = runner._pass._compute, runner._pass.graphs
    sums = compute.sums if isinstance(compute, FusedDecoder) else None
    line = f"passes: {type(compute).__name__}, graphs: {graphs is not None and graphs._is_usable}"
    if sums is None:
        return line
    one = _OneSum(sums, runner)
    line += f", one sum of a token over the ranks: {_step_us(one.alone, runner):.1f} us"
    if sums.has_one_shot:
        with_norm_us = _step_us(one.then_norm, runner)
        buffer, sums._buffer = sums._buffer, None
        line += f" in one shot, {_step_us(one.alone, runner):.1f} us by NCCL"
        sums._buffer = buffer
        line += f"; with the norm after it: {with_norm_us:.1f} us in one shot and a kernel"
    if sums.max_norm_rows:
        line += f", {_step_us(one.with_norm, runner):.1f} us in one kernel"
    return line


class _OneSum:
    """A matrix product of 16 columns and the sum of its result over the ranks, for one token."""

    def __init__(self, sums: RankSums, runner: Runner) -> None:
        width = runner.loaded.model.config.hidden_size
        ones = torch.ones(width, 16, device=runner.cache.device, dtype=runner.loaded.model.dtype)
        self._sums, self._x, self._weight = sums, ones[:1].clone(), ones
        self._residual = ones[:, 0].reshape(1, width).clone()
        self._norm = Norm(self._residual[0].clone(), 1e-6)

    def alone(self, step: int) -> None:
        self._sums.linear(self._x, self._weight)

    def then_norm(self, step: int) -> None:
        add_norm(self._sums.linear(self._x, self._weight), self._residual, self._norm)

    def with_norm(self, step: int) -> None:
        norm = self._norm
        self._sums.linear_add_norm(self._x, self._weight, self._residual, norm.weight, norm.epsilon, buffer=step % 2)


def _step_us(run: Callable[[int], None], runner: Runner) -> float:
    """Return the time of one of 200 steps, out of a graph of them on a GPU. run: takes the number of the step."""
    device = runner.cache.device
    with torch.inference_mode():
        for step in range(4):  # an even number: sums with a norm use their buffers in turn
            run(step)
        if device.type != "cuda":
            started = time.perf_counter()
            for step in range(200):
                run(step)
            return (time.perf_counter() - started) / 200 * 1e6
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            for step in range(200):
                run(step)
        times: list[float] = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            distributed.barrier()
            started = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return statistics.median(times) / 200 * 1e6
