"""What decides the bytes of vLLM's offloaded chunks, from vLLM's own configuration. Imports no vLLM.

vLLM's key of a chunk is a hash of token ids, LoRA name, salt and multimodal inputs. It says nothing about the model:
all that goes into the namespace here, or is refused with the reason.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tierkv.block_store.keys import digest_namespace
from tierkv.errors import ConfigError
from tierkv.integrations.weights import model_folder, settings_digest, weights_digest
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
_SAME_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer")
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "half": "float16"}


def engine_fields(vllm_config: Any, *, weights: str | None = None, adapters: str = "") -> dict[str, Any]:
    """Return what decides K and V besides the weights' bytes, as JSON values, from a VllmConfig.

    weights: the digest that the user gives, if any. adapters: the user's digest of all LoRA adapters.
    Raises ConfigError for an engine whose chunks cannot be named: the message says why, and what helps.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    load_format = str(getattr(vllm_config.load_config, "load_format", "auto"))
    if load_format not in _SAME_FILES and not weights:
        raise ConfigError(
            f"with load_format {load_format!r} the weights are not the model folder's files",
            hint="give the option weights=: a digest or revision that changes whenever the weights do",
        )
    if getattr(vllm_config, "lora_config", None) is not None and not adapters:
        raise ConfigError(
            "LoRA is enabled, and vLLM names an adapter by its name and path, not by its content",
            hint="give the option adapters=: a digest of the content of every adapter that may be used",
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError("calculate_kv_scales takes the scales of K and V from the first prompt: they differ each run")
    algorithm = str(getattr(cache, "prefix_caching_hash_algo", "sha256"))
    if not algorithm.startswith("sha256"):
        raise ConfigError(f"prefix_caching_hash_algo {algorithm!r} can be forged", hint="use sha256 or sha256_cbor")
    found: dict[str, Any] = {"load_format": load_format}
    for name, config in (("model_config", model), ("cache_config", cache)):
        found[name] = _plain(config, name, ignored=_IGNORED[name])
    for name in ("attention_config", "mamba_config", "additional_config", "diffusion_config"):
        found[name] = _plain(getattr(vllm_config, name, None), name)
    found["speculative"] = _speculative_fields(vllm_config)
    try:
        found["settings"] = settings_digest(_folder_of(vllm_config, model))
    except ConfigError:  # the folder is not on this machine: its digest is part of what the user vouches for
        if not weights:
            raise
    return found


def folder_weights(vllm_config: Any) -> str:
    """Return the digest of the weights in the model's folder. Raises ConfigError if it cannot be had."""
    return weights_digest(_folder_of(vllm_config, vllm_config.model_config))


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


def _folder_of(vllm_config: Any, model: Any) -> Path:
    """Return the folder that vLLM reads a model from."""
    cache = getattr(vllm_config.load_config, "download_dir", None)
    return model_folder(model.model, getattr(model, "revision", None), cache=cache)


def _speculative_fields(vllm_config: Any) -> Any:
    """Return what a draft model adds: its layers may lie in the chunks too."""
    config = getattr(vllm_config, "speculative_config", None)
    if config is None:
        return None
    draft, target = getattr(config, "draft_model_config", None), vllm_config.model_config
    found: dict[str, Any] = {"method": str(getattr(config, "method", None))}
    if draft is not None and draft.model != target.model:
        folder = _folder_of(vllm_config, draft)
        found |= {"weights": weights_digest(folder), "settings": settings_digest(folder)}
    return found


def _plain(value: Any, name: str, ignored: Collection[str] = ()) -> Any:
    """Return a configuration as JSON values that are the same in every process. Raises ConfigError where none are."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, name)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):  # a model's configuration
        value = value.to_dict()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, Mapping):
        kept = {str(key): each for key, each in value.items() if key not in ignored and key not in _VOLATILE}
        return {key: _plain(each, f"{name}.{key}") for key, each in sorted(kept.items())}
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(each, name)) for each in value)
    if isinstance(value, list | tuple):
        return [_plain(each, name) for each in value]
    text = str(value)
    if callable(value) or " at 0x" in text:
        raise ConfigError(f"vLLM's {name} cannot be written down: {type(value).__name__}")
    return text
