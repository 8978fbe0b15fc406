"""nano-vLLM with a persistent KV cache: its own `LLM`, and three more arguments. Imports nano-vLLM and torch."""

from __future__ import annotations

from tierkv.integrations.nano_vllm.llm import LLM, BlockCounts

__all__ = ["LLM", "BlockCounts"]
