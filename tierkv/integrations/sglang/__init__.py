"""tierkv as SGLang's HiCache storage: the `dynamic` backend loads this package, with the class TierkvHiCache.

Importing this package imports neither SGLang nor torch; asking it for the class does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["TierkvHiCache"]

_MODULE_OF = {"TierkvHiCache": "tierkv.integrations.sglang.backend"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_MODULE_OF[name]), name)
