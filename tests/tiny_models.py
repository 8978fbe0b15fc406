"""Tiny random models of the families that people serve; seeded, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["FAMILIES", "MLA", "SPLIT", "VOCABULARY", "make_model"]

VOCABULARY = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # one that flash-attn takes, so that a GPU machine tests it
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}

# Family -> how its model is made for a block size; windows end inside a block.
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda _: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "qwen3": lambda _: Qwen3ForCausalLM(Qwen3Config(**_COMMON)),
    "mistral": lambda size: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=size + size // 2 + 1)),
    "gemma2": lambda size: Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON,
            sliding_window=size + size // 2 + 1,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=20.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3_moe": lambda _: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    ),
}


# Models whose attention is multi-latent. Layer 0 has no experts, and none has where a GPU tests them in 16 bits: one
# rounding sends a token to other experts there.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_LATENT: dict[str, Any] = {
    **{key: value for key, value in _COMMON.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
}


def _latent(size: int, **changes: Any) -> dict[str, Any]:
    return _LATENT | {"first_k_dense_replace": 1 if size < 256 else 3} | changes


MLA: dict[str, Callable[[int], Any]] = {
    "deepseek_v2": lambda size: DeepseekV2ForCausalLM(DeepseekV2Config(**_latent(size, q_lora_rank=None))),
    "deepseek_v2 with q_lora and yarn": lambda size: DeepseekV2ForCausalLM(
        DeepseekV2Config(**_latent(size, q_lora_rank=40, rope_parameters=_YARN))
    ),
    "deepseek_v2 of 512 and 64": lambda size: DeepseekV2ForCausalLM(  # the dims of FlashInfer's kernels
        DeepseekV2Config(
            **_latent(size, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, initializer_range=0.1)
        )
    ),
    "deepseek_v3": lambda size: DeepseekV3ForCausalLM(DeepseekV3Config(**_latent(size, q_lora_rank=40))),
    "deepseek_v3 with yarn": lambda size: DeepseekV3ForCausalLM(
        DeepseekV3Config(**_latent(size, q_lora_rank=40, rope_parameters=_YARN))
    ),
}


# Split over as many ranks as there are heads of K and V: each rank has one.
SPLIT: dict[str, Callable[[int], Any]] = {
    f"llama of {heads} heads": lambda _, heads=heads: LlamaForCausalLM(
        LlamaConfig(**_COMMON | {"num_attention_heads": heads, "num_key_value_heads": heads})
    )
    for heads in (4, 8)
}


def make_model(
    family: str, *, block_size: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """Return a model in evaluation mode; the same for the same arguments."""
    torch.manual_seed(seed)
    model = (FAMILIES | MLA | SPLIT)[family](block_size).to(device=device, dtype=dtype).eval()
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")  # sdpa knows no soft-capping
    return model
