"""Fits the learned policy to a request trace."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError
from tierkv.index.eviction_policy import CacheBlock
from tierkv.policies.block_classes import BlockClassPolicy
from tierkv.policies.density import hazards
from tierkv.policies.idle_buckets import NUM_BUCKETS, buckets_of
from tierkv.policies.learned import LearnedModel, features_of
from tierkv.policies.traces import Trace
from tierkv.values.block import hash_block

__all__ = ["fit_model"]

Floats = npt.NDArray[np.float64]

_NUM_CLASSES = 16
_WEIGHT, _PRIOR = 100.0, 0.04
_RIDGE = 1.0
_STEPS = 30


def fit_model(trace: Trace, *, seed: int) -> tuple[LearnedModel, dict[str, float]]:
    """Return a model of a trace, and how well it predicts conversations that it was not fitted to.

    seed: draws the fifth of the conversations (chains with the same first two blocks) that measure the fit.
    Raises ConfigError for a trace in which too little is used again.
    """
    features, start_s, gap_s, chains = _observe(trace)
    again = np.isfinite(gap_s)
    if again.sum() < 100:
        raise ConfigError(f"{trace.name} has {again.sum()} uses of blocks used before: too few to learn from")
    horizon_s = float(np.quantile(gap_s[again], 0.9))
    is_known = again | (start_s <= start_s[-1] - horizon_s)
    is_used = (gap_s <= horizon_s).astype(np.float64)
    is_held_out = np.random.default_rng(seed).random(int(chains.max()) + 1)[chains] < 0.2
    fitted, tested = is_known & ~is_held_out, is_known & is_held_out
    weights, bias = _fit_logistic(features[fitted], is_used[fitted])
    values = features @ weights + bias
    edges = np.quantile(values, np.linspace(0, 1, _NUM_CLASSES + 1)[1:-1])
    classes = np.searchsorted(edges, values, side="right")
    chances = hazards(
        _count(classes[again], gap_s[again]),
        _count(classes[~again], start_s[-1] - start_s[~again]),
        weight=_WEIGHT,
        default=_PRIOR,
    )
    model = LearnedModel(
        weights=tuple(weights.tolist()),
        bias=bias,
        edges=tuple(edges.tolist()),
        chances=tuple(tuple(row) for row in chances.tolist()),
    )
    share = np.full(int(tested.sum()), is_used[fitted].mean())
    guesses = 1 / (1 + np.exp(-values[tested]))
    return model, {
        "uses": float(len(values)),
        "horizon_s": horizon_s,
        "log_loss": _log_loss(guesses, is_used[tested]),
        "log_loss_constant": _log_loss(share, is_used[tested]),
    }


class _Block:
    """A block, in a cache that never evicts: satisfies `CacheBlock`."""

    def __init__(self, number: int, parent: _Block | None, num_tokens: int, now: float) -> None:
        self.block_hash = hash_block(b"", number.to_bytes(8, "little"))
        self.parent_hash = parent.block_hash if parent else b""
        self.depth: int = parent.depth + 1 if parent else 0
        self.num_tokens = num_tokens
        self.created_at = now
        self.last_access = now
        self.access_count = 1
        self.flags = 0
        self.num_children = 0
        if parent:
            parent.num_children += 1

    @property
    def is_prefix_block(self) -> bool:
        """Whether two or more blocks continue it."""
        return self.num_children > 1


class _Recorder(BlockClassPolicy):
    """Sees uses as the policy will, and writes down the features of each."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_classes=1, num_rows=1 << max(17, num_blocks.bit_length() + 1))
        self.rows: list[tuple[float, ...]] = []

    def classify(self, block: CacheBlock, count: int, gap_s: float, fork: int) -> int:
        self.rows.append(features_of(block, count=count, gap_s=gap_s, fork=fork, is_partial=self.is_partial(block)))
        return 0


def _observe(trace: Trace) -> tuple[Floats, Floats, Floats, npt.NDArray[np.int64]]:
    """Return of each use: features, its time, the seconds to the next one (inf if none), its conversation."""
    recorder = _Recorder(trace.num_unique)
    blocks: dict[int, _Block] = {}
    last_use: dict[int, int] = {}
    start_s: list[float] = []
    gap_s: list[float] = []
    chains: list[int] = []
    for request in trace.requests:
        parent: _Block | None = None
        for at, number in enumerate(request.blocks):
            block = blocks.get(number)
            if block is None:
                num_tokens = min(trace.block_size, request.num_tokens - at * trace.block_size)
                block = blocks[number] = _Block(number, parent, num_tokens, request.time_s)
                recorder.update_on_insert(block, parent)
            else:
                block.last_access = request.time_s
                block.access_count += 1
                recorder.update_on_access(block)
            parent = block
            if len(recorder.rows) == len(start_s):
                continue  # the same moment as its last use: counted as one
            if number in last_use:
                gap_s[last_use[number]] = request.time_s - start_s[last_use[number]]
            last_use[number] = len(start_s)
            start_s.append(request.time_s)
            gap_s.append(float("inf"))
            chains.append(request.blocks[min(1, len(request.blocks) - 1)])
    return np.array(recorder.rows), np.array(start_s), np.array(gap_s), np.array(chains, dtype=np.int64)


def _fit_logistic(x: Floats, y: Floats) -> tuple[Floats, float]:
    """Return weights and bias of a logistic model with a little ridge, by Newton's method: deterministic."""
    design = np.column_stack([x, np.ones(len(x))])
    ridge = np.full(design.shape[1], _RIDGE)
    ridge[-1] = 1e-6
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (p - y) + ridge * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights[:-1], float(weights[-1])


def _count(classes: npt.NDArray[np.int64], idle_s: Floats) -> Floats:
    counts = np.bincount(classes * NUM_BUCKETS + buckets_of(idle_s), minlength=_NUM_CLASSES * NUM_BUCKETS)
    return counts.astype(np.float64).reshape(_NUM_CLASSES, NUM_BUCKETS)


def _log_loss(guesses: Floats, truth: Floats) -> float:
    if not len(truth):
        return float("nan")
    p = np.clip(guesses, 1e-12, 1 - 1e-12)
    return float(-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)))
