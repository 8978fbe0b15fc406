"""Tiny random models for `generate`: seeded, no download, of every kind of attention that people serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["EOS", "FAMILIES", "VOCABULARY", "WINDOW", "make_generator"]

VOCABULARY = 97
EOS = 5
WINDOW = 21  # ends inside a block
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_COMMON: dict[str, Any] = {**_PLAIN, "num_key_value_heads": 2}
_HYBRID: dict[str, Any] = {
    **_COMMON,
    "head_dim": 12,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=12)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_HYBRID, query_pre_attn_scalar=12, attn_logit_softcapping=20.0, attn_implementation="eager")
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_HYBRID, query_pre_attn_scalar=12)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_PLAIN)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_COMMON)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_COMMON)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_COMMON, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
}


def make_generator(family: str, *, seed: int = 0) -> Any:
    """Return a model in evaluation mode, in fp32 on the CPU; the same for the same arguments."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()
