"""How a split model's passes run, and what one sum over its ranks takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import distributed

from tierkv.engine.fused_model import FusedDecoder
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
    width = runner.loaded.model.config.hidden_size
    line += f", one sum of a token over the ranks: {_sum_us(sums, width, runner):.1f} us"
    if sums.has_one_shot:
        buffer, sums._buffer = sums._buffer, None
        line += f" in one shot, {_sum_us(sums, width, runner):.1f} us by NCCL"
        sums._buffer = buffer
    return line


def _sum_us(sums: RankSums, width: int, runner: Runner) -> float:
    """Return the time of a sum and a matrix product of 16 columns, out of a graph of 200 of them on a GPU."""
    device, dtype = runner.cache.device, runner.loaded.model.dtype
    x = torch.ones(1, 16, device=device, dtype=dtype)
    weight = torch.ones(width, 16, device=device, dtype=dtype)
    with torch.inference_mode():
        for _ in range(3):
            sums.linear(x, weight)
        if device.type != "cuda":
            started = time.perf_counter()
            for _ in range(200):
                sums.linear(x, weight)
            return (time.perf_counter() - started) / 200 * 1e6
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            for _ in range(200):
                sums.linear(x, weight)
        times: list[float] = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            distributed.barrier()
            started = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return statistics.median(times) / 200 * 1e6
