"""What decides the bytes of vLLM's KV blocks, as a namespace; and the configurations that are refused, with reasons.

Only attributes of vLLM's configuration are read, so this needs no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.integrations.vllm.configuration import folder_of, load_format_of, plain_values, scales_change
from tierkv.integrations.weights import settings_digest, weights_digest
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["Identity", "identity_of", "refuse_unsupported"]

_WHOLE_PREFIX_SPECS = {"FullAttentionSpec", "MLAAttentionSpec"}
_KNOWN_CACHE_DTYPES = {"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope", "su", "yarn_dynamic"}
_PLAIN_SPECULATION = {"ngram", "suffix"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Every field that decides K and V, or where they lie in a page. Each is a part of the namespace.

    weights: digest of the files. settings: digest of the configuration files and of the model's own code. config: the
    configuration as vLLM has resolved it, its overrides included. max_model_len: where the rope frequencies depend on
    it, else None. attention: backends of the layers. device: its type, and of a CPU what its packed layouts depend on.
    pages: shapes and orders of the dims. scales: of an fp8 cache, a pair for each layer. tp_rank: the number of the
    slice of K and V; ranks that hold the same slice share their blocks.
    """

    weights: str
    settings: str
    config: Mapping[str, Any]
    engine_version: str
    model_dtype: str
    quantization: str
    cache_dtype: str
    scales: list[list[float]]
    max_model_len: int | None
    attention: list[str]
    device: str
    pages: Mapping[str, Any]
    layout: BlockLayout
    tp_rank: int = 0
    tp_size: int = 1
    name: str = ""

    def namespace(self) -> Namespace:
        """Return the namespace of the blocks."""
        apart = {"weights", "layout", "tp_rank", "tp_size", "name"}
        architecture = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return Namespace(
            weights=self.weights,
            architecture=json.loads(json.dumps({"engine": "vllm", **architecture}, default=str)),
            layout=self.layout,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            name=self.name,
        )


def identity_of(
    vllm_config: Any,
    *,
    version: str,
    pages: Mapping[str, Any],
    layout: BlockLayout,
    device: str,
    tp_rank: int,
    weights: str,
) -> Identity:
    """Read the identity from vLLM's configuration; it reads the model's files unless `weights` is their digest.

    Raises ConfigError for a model whose files are not known.
    """
    model, tp_size = vllm_config.model_config, int(vllm_config.parallel_config.tensor_parallel_size)
    config = plain_values(model.hf_config, "hf_config")
    layers = [vllm_config.compilation_config.static_forward_context[name] for name in pages["layers"]]
    folder = None if weights else folder_of(vllm_config, model)
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    return Identity(
        weights=weights or weights_digest(folder),  # type: ignore[arg-type]
        settings=settings_digest(folder) if folder else "",
        config=config,
        engine_version=version,
        model_dtype=str(model.dtype),
        quantization=str(model.quantization),
        cache_dtype=cache_dtype,
        scales=[_scales(layer) for layer in layers] if "fp8" in cache_dtype else [],
        max_model_len=int(model.max_model_len) if _LENGTH_DEPENDENT_ROPE & set(_rope_types(config)) else None,
        attention=sorted({_backend(layer) for layer in layers}),
        device=device,
        pages=pages,
        layout=layout,
        tp_rank=_slice_of(model, tp_rank, tp_size),
        tp_size=tp_size,
        name=str(model.model),
    )


def refuse_unsupported(vllm_config: Any, kv_cache_config: Any, weights: str) -> None:
    """Raise UnsupportedModelError or ConfigError, with the reason, for what cannot be cached rightly."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            "a block that is damaged on disk must cost a computation, not the request",
            hint='add "kv_load_failure_policy": "recompute" to --kv-transfer-config',
        )
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise UnsupportedModelError(f"{name} above 1 is not supported")
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    if cache_dtype not in _KNOWN_CACHE_DTYPES:
        raise UnsupportedModelError(f"kv_cache_dtype {cache_dtype}: its scales may change while the engine runs")
    if scales_change(vllm_config):
        raise UnsupportedModelError("calculate_kv_scales: the scales of the KV cache change while the engine runs")
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and speculative.method not in _PLAIN_SPECULATION:
        raise UnsupportedModelError(
            f"speculative decoding by {speculative.method}: the draft model's KV of a token depends on later tokens"
        )
    load_format_of(vllm_config, weights)
    _refuse_groups(kv_cache_config.kv_cache_groups)


def _slice_of(model: Any, tp_rank: int, tp_size: int) -> int:
    """Return which slice of K and V a rank holds: with MLA, and with fewer heads than ranks, several hold the same."""
    num_slices = 1 if model.use_mla else min(int(model.get_total_num_kv_heads()), tp_size)
    return tp_rank * num_slices // tp_size


def _refuse_groups(groups: Any) -> None:
    """Raise UnsupportedModelError unless there is one group whose blocks keep the whole prefix."""
    if len(groups) != 1:
        raise UnsupportedModelError(
            f"the model has {len(groups)} KV cache groups (sliding windows, Mamba or other layers beside attention)",
            hint="use vLLM's OffloadingConnector with tierkv as its secondary tier",
        )
    spec = groups[0].kv_cache_spec
    parts = getattr(spec, "kv_cache_specs", None)  # layers of one type that differ in size
    for part in parts.values() if parts is not None else [spec]:
        if type(part).__name__ not in _WHOLE_PREFIX_SPECS:
            raise UnsupportedModelError(f"layers of {type(part).__name__} do not keep the KV of the whole prefix")
        if getattr(part, "non_causal", False):
            raise UnsupportedModelError("the model attends to later tokens, so a prefix alone has no KV")


def _scales(layer: Any) -> list[float]:
    return [float(layer._k_scale_float), float(layer._v_scale_float)]


def _backend(layer: Any) -> str:
    backend = layer.get_attn_backend()
    return f"{backend.__module__}.{backend.__qualname__}"


def _rope_types(value: Any) -> Iterator[str]:
    """Yield every rope type named anywhere in a configuration."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key in ("rope_type", "type") and isinstance(each, str):
                yield each
            else:
                yield from _rope_types(each)
