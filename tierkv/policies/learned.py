"""A policy trained from a trace: a logistic model predicts which blocks are used again, and so their class."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.errors import ConfigError, StoreError
from tierkv.index.eviction_policy import CacheBlock
from tierkv.policies.block_classes import BlockClassPolicy
from tierkv.policies.density import hit_densities
from tierkv.policies.idle_buckets import NUM_BUCKETS
from tierkv.values.files import open_regular, write_whole

__all__ = ["FEATURES", "LearnedModel", "LearnedPolicy", "features_of"]

FEATURES = (
    "log2 of the uses",
    "used again",
    "log2 of the depth",
    "fewer tokens than a block",
    "follows a used prefix",
    "log2 of the new blocks before it",
    "log2 of the average gap in seconds",
)
_FORMAT = 1
_MOST_BYTES = 16 << 20  # 256 classes take a fraction of it


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedModel:
    """The result of training.

    weights, bias: of the logistic model over `FEATURES`. edges: its values between neighbouring classes.
    chances: for each class, those of a use within each bucket of idle time (see `hazards`).
    """

    weights: tuple[float, ...]
    bias: float
    edges: tuple[float, ...]
    chances: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(FEATURES) or len(self.chances) != len(self.edges) + 1 or len(self.chances) > 256:
            raise ConfigError("the model's weights or classes are too few or too many")
        if any(len(row) != NUM_BUCKETS or not all(0 < chance < 1 for chance in row) for row in self.chances):
            raise ConfigError(f"a class's chances must be {NUM_BUCKETS} numbers between 0 and 1")
        if not np.all(np.isfinite([*self.weights, self.bias, *self.edges])) or list(self.edges) != sorted(self.edges):
            raise ConfigError("the model's numbers must be finite and its edges in order")

    def save(self, path: Path) -> None:
        """Write the model as JSON. Raises ConfigError."""
        try:
            text = json.dumps({"format": _FORMAT, "features": FEATURES, **asdict(self)}) + "\n"
            write_whole(path, text.encode())
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc

    @staticmethod
    def load(path: Path) -> LearnedModel:
        """Read a model. Raises ConfigError for a file that holds none, or one of another format."""
        try:
            fields: Any = json.loads(_read(path))
            if fields["format"] != _FORMAT or tuple(fields["features"]) != FEATURES:
                raise ConfigError(f"{path} was trained for another version of the features: train it anew")
            return LearnedModel(
                weights=tuple(map(float, fields["weights"])),
                bias=float(fields["bias"]),
                edges=tuple(map(float, fields["edges"])),
                chances=tuple(tuple(map(float, row)) for row in fields["chances"]),
            )
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc
        except (OSError, ValueError, KeyError, TypeError, RecursionError, StoreError) as exc:
            raise ConfigError(f"{path} is not a trained policy: {type(exc).__name__}: {exc}") from exc


class LearnedPolicy(BlockClassPolicy):
    """Evicts the block with the fewest expected hits a second of keeping it, as a trained model predicts.

    The ranking is that of `HitDensityPolicy`, but its classes and densities were learned from a trace and are fixed.
    """

    def __init__(self, model: LearnedModel, *, num_rows: int = 1 << 17) -> None:
        super().__init__(num_classes=len(model.chances), num_rows=num_rows)
        self.model = model
        self.densities: list[list[float]] = hit_densities(np.array(model.chances)).tolist()
        self._edges = list(model.edges)

    @staticmethod
    def load(path: Path) -> LearnedPolicy:
        """Return a policy with the model of a file. Raises ConfigError."""
        return LearnedPolicy(LearnedModel.load(path))

    def classify(self, block: CacheBlock, count: int, gap_s: float, fork: int) -> int:
        """Return the number of edges that the model's value for the block reaches."""
        values = features_of(block, count=count, gap_s=gap_s, fork=fork, is_partial=self.is_partial(block))
        value = self.model.bias + sum(w * v for w, v in zip(self.model.weights, values, strict=True))
        return bisect_right(self._edges, value)


def _read(path: Path) -> str:
    """Return the text of a regular file. Raises StoreError, OSError, and ValueError for a file that is too large."""
    with open(open_regular(path), "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return text.decode()


def features_of(
    block: CacheBlock, *, count: int, gap_s: float, fork: int, is_partial: bool
) -> tuple[float, float, float, float, float, float, float]:
    """Return the features of a block that was just used, in the order of `FEATURES`."""
    is_new = count <= 1
    return (
        log2(count),
        float(not is_new),
        log2(block.depth + 1),
        float(is_partial),
        float(is_new and fork > 1),
        log2(block.depth - fork + 1) if is_new else 0.0,
        log2(gap_s + 1),
    )
