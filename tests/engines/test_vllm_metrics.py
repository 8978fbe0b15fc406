"""The connector's counters in vLLM's own statistics and in Prometheus."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run make test-engines"),
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns
]


def test_counts_of_workers_and_steps_are_added() -> None:
    from tierkv.integrations.vllm.metrics import TierkvStats

    stats = TierkvStats(data={"hit_tokens": 512, "not_cached:lora": 1})
    assert stats.aggregate(TierkvStats(data={"hit_tokens": 256})).reduce() == {"hit_tokens": 768, "not_cached:lora": 1}
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def test_prometheus_has_a_counter_for_each_engine_and_reason() -> None:
    from prometheus_client import Counter, Gauge, Histogram, generate_latest

    from tierkv.integrations.vllm.metrics import TierkvPromMetrics

    metrics = TierkvPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {Counter: Counter, Gauge: Gauge, Histogram: Histogram},
        ["model_name", "engine"],
        {0: ["llama", "0"], 1: ["llama", "1"]},
    )
    metrics.observe({"hit_tokens": 512, "not_cached:lora": 2, "of another version": 1}, engine_idx=1)
    text = generate_latest().decode()
    assert 'vllm:tierkv_hit_tokens_total{engine="1",model_name="llama"} 512.0' in text
    assert 'vllm:tierkv_not_cached_total{engine="1",model_name="llama",reason="lora"} 2.0' in text
