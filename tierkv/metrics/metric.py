"""Metric: the name, type, help and labels of one metric. MetricSamples: a metric and its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["TENANT_CHARACTERS", "Buckets", "Kind", "Metric", "MetricSamples", "Samples"]

TENANT_CHARACTERS = 12
"""Of the hexadecimal digest of a salt, or of a namespace, in the label of a metric."""


class Kind(Enum):
    """The type of a metric, by Prometheus' word. An info metric is the gauge 1 whose labels are the information."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


_SUFFIXES = {Kind.COUNTER: "_total", Kind.INFO: "_info"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. source: the field of statistics that it shows, where it shows one field."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    source: str = ""

    @property
    def exposed_name(self) -> str:
        """The name as Prometheus has it: that of a counter ends in _total, that of an info metric in _info."""
        return self.name + _SUFFIXES.get(self.kind, "")


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram. counts: (upper bound, samples up to it), the last bound is +Inf. total: the sum of all samples."""

    counts: tuple[tuple[str, int], ...]
    total: float


Samples = Mapping[tuple[str, ...], float]
"""Values by the values of a metric's labels, in the order of `Metric.labels`."""


@dataclass(frozen=True, slots=True)
class MetricSamples:
    """One metric with its samples. buckets: of a histogram, by the values of its labels."""

    metric: Metric
    samples: Samples
    buckets: Mapping[tuple[str, ...], Buckets] | None = None

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (*self.samples, *(self.buckets or ()))}
        assert lengths <= {len(self.metric.labels)}, f"{self.metric.name}: a value for each label"
        assert (self.buckets is not None) == (self.metric.kind is Kind.HISTOGRAM)

    @classmethod
    def of_value(cls, metric: Metric, value: float) -> MetricSamples:
        """Return a metric without labels."""
        return cls(metric, {(): value})

    @classmethod
    def of_label(cls, metric: Metric, values: Mapping[str, float], known: Sequence[str] = ()) -> MetricSamples:
        """Return a metric with one label. known: values of the label that are shown from the start, with 0."""
        names = dict.fromkeys([*known, *values])
        return cls(metric, {(name,): values.get(name, 0) for name in names})
