"""The text that Prometheus reads. Needs prometheus-client, of the extra `metrics`; it is imported when used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tierkv.errors import ConfigError
from tierkv.metrics.metric import Kind, MetricSamples

__all__ = ["exposition", "load_prometheus"]


def exposition(metrics: Iterable[MetricSamples]) -> tuple[bytes, str]:
    """Return metrics in Prometheus' text format, and their media type. Raises ConfigError without prometheus-client."""
    client = load_prometheus()
    registry = client.CollectorRegistry()
    registry.register(_Collector(client.core, list(metrics)))
    return client.generate_latest(registry), client.CONTENT_TYPE_LATEST


def load_prometheus() -> Any:
    """Return the module prometheus_client. Raises ConfigError where it is not installed."""
    try:
        import prometheus_client
        import prometheus_client.core
    except ModuleNotFoundError as exc:
        raise ConfigError("metrics need prometheus-client", hint="pip install 'tierkv[metrics]'") from exc
    return prometheus_client


class _Collector:
    """What a registry of prometheus_client asks for its metrics."""

    def __init__(self, core: Any, metrics: Sequence[MetricSamples]) -> None:
        self._core = core
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        return (_as_prometheus(self._core, each) for each in self._metrics)


def _as_prometheus(core: Any, shown: MetricSamples) -> Any:
    metric = shown.metric
    if shown.buckets is not None:
        found = core.HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for values, buckets in shown.buckets.items():
            found.add_metric(values, list(buckets.counts), buckets.total)
        return found
    if metric.kind is Kind.INFO:
        found = core.InfoMetricFamily(metric.name, metric.help)
        for values in shown.samples:
            found.add_metric([], dict(zip(metric.labels, values, strict=True)))
        return found
    kind = core.CounterMetricFamily if metric.kind is Kind.COUNTER else core.GaugeMetricFamily
    found = kind(metric.name, metric.help, labels=metric.labels)
    for values, value in shown.samples.items():
        found.add_metric(values, value)
    return found
