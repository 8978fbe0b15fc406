"""tierkv as a KV connector of vLLM: `kv_connector_module_path` is this package, `kv_connector` is TierkvConnector.

Importing this package imports neither vLLM nor torch; asking it for the connector does.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TierkvConnector"]


def __getattr__(name: str) -> Any:
    if name == "TierkvConnector":
        from tierkv.integrations.vllm.connector import TierkvConnector

        return TierkvConnector
    raise AttributeError(f"module {__name__} has no attribute {name}")
