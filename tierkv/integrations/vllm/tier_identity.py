"""What decides the bytes of vLLM's offloaded chunks, from vLLM's own configuration. Imports no vLLM.

vLLM's key of a chunk is a hash of token ids, LoRA name, salt and multimodal inputs. It says nothing about the model:
all that goes into the namespace here, or is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierkv.block_store.keys import digest_namespace
from tierkv.errors import ConfigError
from tierkv.integrations.vllm.configuration import folder_of, load_format_of, plain_values, scales_change
from tierkv.integrations.weights import settings_digest, weights_digest
from tierkv.values.layout import DTYPE_BYTES
from tierkv.values.namespace import Namespace

__all__ = ["chunk_namespace", "engine_fields", "folder_weights"]

# Fields of vLLM's configurations that do not change K and V: names, paths (the digest of the files stands for them),
# sampling, memory sizes. A field that is not named here counts, also one that a later vLLM adds.
_IGNORED = {
    "model_config": {
        *("model", "model_weights", "served_model_name", "hf_config_path", "hf_text_config", "hf_token"),
        *("hf_overrides", "revision", "code_revision", "config_format"),  # what they lead to is in hf_config
        *("allowed_local_media_path", "allowed_media_domains", "mm_processor_cache_gb"),
        *("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init", "seed", "enforce_eager"),
        *("max_logprobs", "logprobs_mode", "return_sampling_mask", "logits_processors", "io_processor_plugin"),
        *("generation_config", "override_generation_config", "pooler_config", "renderer_num_workers"),
        *("enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend", "sleep_mode_offload_cudagraph"),
        *("enable_nccl_comm_suspend", "enable_cumem_allocator", "enable_trace_replay", "spec_target_max_model_len"),
        *("disable_cascade_attn", "max_seq_len_to_capture"),
    },
    "cache_config": {
        *("gpu_memory_utilization", "num_gpu_blocks", "num_cpu_blocks", "num_gpu_blocks_override", "swap_space"),
        *("kv_cache_memory_bytes", "kv_cache_size_tokens", "kv_cache_max_concurrency", "enable_prefix_caching"),
        *("prefix_cache_retention_interval", "kv_offloading_size", "kv_offloading_backend", "cpu_kvcache_space_bytes"),
        *("user_specified_block_size", "user_specified_mamba_block_size", "_block_size_resolved"),
        *("cache_hit_alignment_tokens", "effective_attention_block_size", "cpu_offload_gb", "hash_block_size"),
    },
}
_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "half": "float16"}


def engine_fields(vllm_config: Any, *, weights: str | None = None, adapters: str = "") -> dict[str, Any]:
    """Return what decides K and V besides the weights' bytes, as JSON values, from a VllmConfig.

    weights: the digest that the user gives, if any. adapters: the user's digest of all LoRA adapters.
    Raises ConfigError for an engine whose chunks cannot be named: the message says why, and what helps.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    load_format = load_format_of(vllm_config, weights)
    if getattr(vllm_config, "lora_config", None) is not None and not adapters:
        raise ConfigError(
            "LoRA is enabled, and vLLM names an adapter by its name and path, not by its content",
            hint="give the option adapters=: a digest of the content of every adapter that may be used",
        )
    if scales_change(vllm_config):
        raise ConfigError("calculate_kv_scales takes the scales of K and V from the first prompt: they differ each run")
    algorithm = str(getattr(cache, "prefix_caching_hash_algo", "sha256"))
    if not algorithm.startswith("sha256"):
        raise ConfigError(f"prefix_caching_hash_algo {algorithm!r} can be forged", hint="use sha256 or sha256_cbor")
    found: dict[str, Any] = {"load_format": load_format}
    for name, config in (("model_config", model), ("cache_config", cache)):
        found[name] = plain_values(config, name, ignored=_IGNORED[name])
    for name in ("attention_config", "mamba_config", "additional_config", "diffusion_config"):
        found[name] = plain_values(getattr(vllm_config, name, None), name)
    found["speculative"] = _speculative_fields(vllm_config)
    try:
        found["settings"] = settings_digest(folder_of(vllm_config, model))
    except ConfigError:  # the folder is not on this machine: its digest is part of what the user vouches for
        if not weights:
            raise
    return found


def folder_weights(vllm_config: Any) -> str:
    """Return the digest of the weights in the model's folder. Raises ConfigError if it cannot be had."""
    return weights_digest(folder_of(vllm_config, vllm_config.model_config))


def chunk_namespace(
    config: Any, *, row_bytes: int, weights: str, engine: Mapping[str, Any] | str, version: str, adapters: str = ""
) -> Namespace:
    """Return the namespace of the chunks of one engine.

    config: vLLM's OffloadingConfig. row_bytes: bytes of a chunk in the CPU tier, those of all workers. engine: from
    `engine_fields`, or the user's own description. Raises ConfigError.
    """
    parallel = config.parallel
    architecture = {
        "format": "vllm-chunk-1",
        "vllm": version,
        "engine": engine,
        "kv_dtype": str(config.model.dtype),
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "worker_kv_bytes_per_block": config.worker_kv_bytes_per_block,
        "world_size": parallel.world_size,
        **{f"{kind}_size": getattr(parallel, f"{kind}_size") for kind in ("tp", "pp", "pcp", "dcp")},
        **{name: getattr(config, name, None) for name in ("replicated_layout", "canonical_layout", "kv_cache_layout")},
    }
    dtype = str(config.model.dtype)
    dtype = dtype if dtype in DTYPE_BYTES else _KV_DTYPES.get(dtype, "float8_e4m3fn")
    return digest_namespace(
        weights=weights,
        row_bytes=row_bytes,
        dtype=dtype,
        architecture=architecture,
        adapter=adapters,
        name=str(config.model.name),
    )


def _speculative_fields(vllm_config: Any) -> Any:
    """Return what a draft model adds: its layers may lie in the chunks too."""
    config = getattr(vllm_config, "speculative_config", None)
    if config is None:
        return None
    draft, target = getattr(config, "draft_model_config", None), vllm_config.model_config
    found: dict[str, Any] = {"method": str(getattr(config, "method", None))}
    if draft is not None and draft.model != target.model:
        folder = folder_of(vllm_config, draft)
        found |= {"weights": weights_digest(folder), "settings": settings_digest(folder)}
    return found
