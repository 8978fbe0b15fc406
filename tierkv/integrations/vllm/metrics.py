"""The connector's counters as vLLM's own statistics: the periodic log line "KV Transfer metrics", and Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from tierkv.integrations.vllm.statistics import COUNTERS, REASON, labels_of

__all__ = ["TierkvPromMetrics", "TierkvStats"]


@dataclass
class TierkvStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last step. data: a name of COUNTERS, with its reason if it has one -> count."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class TierkvPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters named vllm:tierkv_*, one for each engine; those with reasons have the label `reason`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: counter(name=f"vllm:tierkv_{name}", documentation=text, labelnames=[*labelnames, *labels_of(name)])
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for full_name, count in transfer_stats_data.items():
            name, _, reason = full_name.partition(REASON)
            if name in self._counters:
                labels = [*self.per_engine_labelvalues[engine_idx], *([reason] if labels_of(name) else [])]
                self._counters[name].labels(*labels).inc(count)
