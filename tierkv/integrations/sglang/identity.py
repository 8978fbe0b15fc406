"""What decides the bytes of SGLang's host pages, from SGLang's own settings. Imports no SGLang.

SGLang's key of a page is a chain of sha256 over token ids, seeded by the request's salt and LoRA id. It says nothing
about the model: all that goes into the namespace here, or is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tierkv.block_store.keys import digest_namespace
from tierkv.errors import ConfigError
from tierkv.integrations.weights import model_folder, settings_digest, weights_digest
from tierkv.values.layout import DTYPE_BYTES
from tierkv.values.namespace import Namespace

__all__ = ["folder_weights", "page_namespace", "server_fields"]

# Fields of SGLang's model settings that do not change K and V: paths (the digest of the files stands for them), the
# speed of loading. A field that is not named here counts, also one that a later SGLang adds.
_IGNORED = {
    *("model_path", "revision", "download_dir", "tokenizer_path", "tokenizer_mode", "tokenizer_worker_num"),
    *("skip_tokenizer_init", "startup_weight_load_mode", "model_checksum", "delete_ckpt_after_loading"),
    *("weight_cache_mode", "weight_cache_socket", "weight_cache_timeout", "engine_info_bootstrap_port"),
    *("quantization_param_path", "rl_quant_profile"),  # digests of the files stand for them
    *("decrypted_config_file", "decrypted_draft_config_file"),
}
_IGNORED_PREFIXES = ("weight_loader_", "remote_instance_weight_loader_", "modelexpress_", "modelopt_export")
_ALSO = (
    *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "torchao_config"),
    *("speculative_algorithm", "enable_page_major_kv_layout"),
)
_FILES = ("quantization_param_path", "rl_quant_profile", "decrypted_config_file", "decrypted_draft_config_file")
_OTHER_WEIGHTS = ("checkpoint_engine_wait_weights_before_ready", "modelopt_checkpoint_restore_path")
_SAME_FILES = ("auto", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer", "layered")
_RANKS = ("pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size", "dcp_rank", "dcp_size")
_WEIGHTS_HINT = "give the option weights=: a digest or revision that changes whenever the weights do"


def server_fields(
    settings: Mapping[str, Any], model_fields: Collection[str], *, weights: str | None = None, adapters: str = ""
) -> dict[str, Any]:
    """Return what decides K and V besides the weights' bytes, as JSON values.

    settings: SGLang's resolved server arguments. model_fields: the names of those that describe the model.
    weights: the digest that the user gives, if any. adapters: the user's digest of all LoRA adapters.
    Raises ConfigError for a server whose pages cannot be named: the message says why, and what helps.
    """
    load_format = str(settings.get("load_format", "auto"))
    if load_format not in _SAME_FILES and not weights:
        raise ConfigError(
            f"with load_format {load_format!r} the weights are not the model folder's files", hint=_WEIGHTS_HINT
        )
    for name in _OTHER_WEIGHTS:
        if settings.get(name) and not weights:
            raise ConfigError(f"with {name} the weights are not the model folder's files", hint=_WEIGHTS_HINT)
    if (settings.get("enable_lora") or settings.get("lora_paths")) and not adapters:
        raise ConfigError(
            "LoRA is enabled, and SGLang names an adapter by its name and path, not by its content",
            hint="give the option adapters=: a digest of the content of every adapter that may be used",
        )
    names = [name for name in model_fields if name not in _IGNORED and not name.startswith(_IGNORED_PREFIXES)]
    found = {name: _plain(settings.get(name), name) for name in sorted({*names, *_ALSO})}
    for name in _FILES:
        if settings.get(name):
            found[name] = _file_digest(str(settings[name]))
    try:
        found["settings"] = settings_digest(_folder_of(settings))
    except ConfigError:  # the folder is not on this machine: its digest is part of what the user vouches for
        if not weights:
            raise
    return found


def folder_weights(settings: Mapping[str, Any]) -> str:
    """Return the digest of the weights in the model's folder. Raises ConfigError if it cannot be had."""
    return weights_digest(_folder_of(settings))


def page_namespace(
    config: Any,
    pool: Any,
    *,
    row_bytes: int,
    weights: str,
    engine: Mapping[str, Any] | str,
    version: str,
    adapters: str = "",
    kv_dtype: str | None = None,
) -> Namespace:
    """Return the namespace of the pages of one rank.

    config: SGLang's HiCacheStorageConfig. pool: the host pool. row_bytes: bytes of a page. engine: from
    `server_fields`, or the user's own description. kv_dtype: the dtype of K and V where the pool holds bare bytes.
    Of a model with multi-latent attention (MLA) every rank holds the same, so all ranks share one namespace.
    Raises ConfigError.
    """
    stored = str(pool.dtype).removeprefix("torch.")
    if stored not in DTYPE_BYTES and not kv_dtype:
        raise ConfigError(
            f"the host pool holds {stored}, which does not say what K and V are", hint="give the option kv_dtype"
        )
    is_shared = bool(config.is_mla_model)
    architecture = {
        "format": "sglang-page-1",
        "sglang": version,
        "engine": engine,
        "kv_dtype": kv_dtype or stored,
        "stored_dtype": stored,
        "pool": type(pool).__name__,
        "layout": str(pool.layout),
        "page_size": int(pool.page_size),
        "layers": [getattr(pool, name, None) for name in ("start_layer", "end_layer", "layer_num")],
        "heads": [getattr(pool, name, None) for name in ("head_num", "head_dim", "v_head_dim", "kv_cache_dim")],
        "mla": is_shared,
        "mla_tp_size": int(config.tp_size) if is_shared else None,
        **{name: getattr(config, name, None) for name in _RANKS},
    }
    return digest_namespace(
        weights=weights,
        row_bytes=row_bytes,
        dtype=stored if stored in DTYPE_BYTES else "float8_e4m3fn",
        architecture=architecture,
        adapter=adapters,
        tp_rank=0 if is_shared else int(config.tp_rank),
        tp_size=1 if is_shared else int(config.tp_size),
        name=str(config.model_name or ""),
    )


def _folder_of(settings: Mapping[str, Any]) -> Path:
    return model_folder(settings["model_path"], settings.get("revision"), cache=settings.get("download_dir"))


def _file_digest(path: str) -> str:
    try:
        return sha256(Path(path).read_bytes()).hexdigest()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc


def _plain(value: Any, name: str) -> Any:
    """Return a setting as JSON values that are the same in every process. Raises ConfigError where none are."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{name}.{key}") for key, each in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(each, name) for each in value]
    text = str(value)
    if callable(value) or " at 0x" in text:
        raise ConfigError(f"SGLang's setting {name} cannot be written down: {type(value).__name__}")
    return text
