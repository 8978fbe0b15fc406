"""What sparse decode costs in exactness: its attention against exact attention, by budget and page size.

recall: the part of the exact attention's weight that lies on the pages that are read, of a mean query and of the worst
hundredth. best recall: of the pages that a reader who knew all weights would take. error: of output vectors,
|approximate - exact| / |exact|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.cold_workloads import load_workload
from tierkv.engine.sparse.options import PageCounts, SparseDecode
from tierkv.engine.sparse.torch_pages import choose_pages, score_pages

__all__ = ["Attended", "ErrorRow", "error_rows", "random_attention", "trained_attention"]

_PIECE = 256  # tokens that all-MiniLM-L6-v2 sees at once


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """One layer's queries and what they attend to. query: [n, heads, dim]; keys, values: [tokens, kv_heads, dim]."""

    name: str
    query: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """How exact one budget and page size are, over all queries and heads of several layers."""

    name: str
    tokens: int
    page: int
    budget: float
    recall: float
    worst_recall: float
    best_recall: float
    error: float
    worst_error: float


def trained_attention(tokens: int, *, num_queries: int, device: torch.device) -> list[Attended]:
    """Return three layers of all-MiniLM-L6-v2 on the documentation of Python; normal numbers without that package.

    It sees 256 tokens at once, so longer sequences are pieces side by side, and a query is of the last piece.
    """
    workload = load_workload(tokens // _PIECE)
    if not workload.queries:
        return [random_attention(tokens, num_queries=num_queries, device=device)]
    layout = workload.layout
    found: list[Attended] = []
    for layer in (0, layout.num_layers // 2, layout.num_layers - 1):
        runs = layout.runs[2 * layer : 2 * layer + 2]
        planes: list[list[Tensor]] = [[], []]
        for block in workload.blocks:
            for plane, run in zip(planes, runs, strict=True):
                data = block[run.offset_bytes : run.offset_bytes + run.token_bytes * layout.block_size]
                bits = torch.from_numpy(np.ascontiguousarray(data)).view(torch.bfloat16)
                plane.append(bits.view(layout.block_size, run.heads, run.dim).float())
        queries = torch.from_numpy(workload.queries[-1][layer])[-num_queries:].float()
        keys, values = (torch.cat(plane).to(device) for plane in planes)
        found.append(Attended(f"all-MiniLM-L6-v2, layer {layer}", queries.to(device), keys, values))
    return found


def random_attention(tokens: int, *, num_queries: int, device: torch.device) -> Attended:
    """Return normal numbers: attention is nearly uniform, so nothing can be left out. The worst case."""
    generator = torch.Generator(device).manual_seed(0)
    query, keys, values = (
        torch.randn(count, heads, 128, generator=generator, device=device)
        for count, heads in ((num_queries, 8), (tokens, 2), (tokens, 2))
    )
    return Attended("normal random numbers", query, keys, values)


def error_rows(layers: Sequence[Attended], *, pages: Sequence[int], budgets: Sequence[float]) -> Iterator[ErrorRow]:
    """Yield a row for each page size and budget, over all layers together."""
    for page in pages:
        for budget in budgets:
            counts = SparseDecode(budget=budget, min_tokens=1, page_tokens=page).counts(256)
            parts = [_measure(layer, counts) for layer in layers]
            recall, best, error = (torch.cat([part[at] for part in parts]) for at in range(3))
            yield ErrorRow(
                name=layers[0].name.split(",")[0],
                tokens=layers[0].keys.shape[0],
                page=page,
                budget=budget,
                recall=float(recall.mean()),
                worst_recall=float(recall.quantile(0.01)),
                best_recall=float(best.mean()),
                error=float(error.mean()),
                worst_error=float(error.quantile(0.99)),
            )


def _measure(layer: Attended, counts: PageCounts) -> tuple[Tensor, Tensor, Tensor]:
    """Return recall, best recall and error of each query and head, each as a flat tensor."""
    length, kv_heads, dim = layer.keys.shape
    page, group = counts.page, layer.query.shape[1] // kv_heads
    whole = length // page * page
    assert whole == length, "whole pages"
    paged = layer.keys.unflatten(0, (-1, page))
    bounds = torch.stack([paged.amin(1), paged.amax(1)], dim=2)[:, :, None]  # [pages, kv_heads, 1, 2, dim]
    blocks = torch.arange(length // page, device=layer.keys.device)
    scale = dim**-0.5
    recalls: list[Tensor] = []
    bests: list[Tensor] = []
    errors: list[Tensor] = []
    for query in layer.query:
        chosen = choose_pages(score_pages(query, bounds, blocks, length, counts, scale=scale), length, counts, kv_heads)
        scores = torch.einsum("kgd,tkd->kgt", query.view(kv_heads, group, dim), layer.keys) * scale
        weights = scores.softmax(-1)
        exact = torch.einsum("kgt,tkd->kgd", weights, layer.values)
        is_read = torch.zeros(kv_heads, length // page, dtype=torch.bool, device=weights.device)
        is_read.scatter_(1, chosen, True)
        kept = weights * is_read.repeat_interleave(page, 1)[:, None]
        recall = kept.sum(-1)
        near = torch.einsum("kgt,tkd->kgd", kept / recall[..., None].clamp(min=1e-30), layer.values)
        of_page = weights.unflatten(-1, (-1, page)).sum(-1)
        bests.append(of_page.topk(chosen.shape[1], dim=-1).values.sum(-1).flatten())
        recalls.append(recall.flatten())
        errors.append(((near - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten())
    return torch.cat(recalls), torch.cat(bests), torch.cat(errors)
