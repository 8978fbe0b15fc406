"""nano-vLLM with a persistent KV cache: its own `LLM`, and a few more arguments.

>>> from tierkv.integrations.nano_vllm import LLM
>>> llm = LLM("path/to/Qwen3-0.6B", path="store")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierkv.integrations.nano_vllm.block_manager import BlockCounts
    from tierkv.integrations.nano_vllm.llm import LLM

__all__ = ["LLM", "BlockCounts"]

_HOMES = {"LLM": "llm", "BlockCounts": "block_manager"}


def __getattr__(name: str) -> object:
    # nano-vLLM is imported when one of the two is used: what surrounds them can be tested without it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
