"""tierkv as a KV connector of vLLM: `kv_connector_module_path` is this package, `kv_connector` is TierkvConnector.

Importing this package imports neither vLLM nor torch; asking it for the connector does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["TierkvConnector"]

_MODULE_OF = {"TierkvConnector": "tierkv.integrations.vllm.connector"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_MODULE_OF[name]), name)
