"""What both identities read from vLLM's configuration. Only its attributes are read, so this needs no vLLM."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.integrations.weights import model_folder

__all__ = ["folder_of", "load_format_of", "plain_values", "scales_change"]

_SAME_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer")
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")


def load_format_of(vllm_config: Any, weights: str | None) -> str:
    """Return how vLLM loads the weights.

    Raises ConfigError if they are not the files of the model's folder, unless the user gives their digest, `weights`.
    """
    found = getattr(vllm_config.load_config, "load_format", "auto")
    load_format = str(getattr(found, "value", found))
    if load_format not in _SAME_FILES and not weights:
        raise ConfigError(
            f"with load_format {load_format!r} the weights are not the model folder's files",
            hint="give the option weights=: a digest or revision that changes whenever the weights do",
        )
    return load_format


def scales_change(vllm_config: Any) -> bool:
    """Return whether the scales of the KV cache come from the first prompt, so that they differ in each run."""
    return bool(getattr(vllm_config.cache_config, "calculate_kv_scales", False))


def folder_of(vllm_config: Any, model: Any) -> Path:
    """Return the folder that vLLM reads a model from. Raises ConfigError if it is not on this machine."""
    cache = getattr(vllm_config.load_config, "download_dir", None)
    return model_folder(model.model, getattr(model, "revision", None), cache=cache)


def plain_values(value: Any, name: str, ignored: Collection[str] = ()) -> Any:
    """Return a configuration as JSON values that are the same in every process. Raises ConfigError where none are.

    ignored: fields of the configuration itself that do not count.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return plain_values(value.value, name)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):  # a model's configuration
        value = value.to_dict()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, Mapping):
        kept = {str(key): each for key, each in value.items() if key not in ignored and key not in _VOLATILE}
        return {key: plain_values(each, f"{name}.{key}") for key, each in sorted(kept.items())}
    if isinstance(value, set | frozenset):
        return sorted(str(plain_values(each, name)) for each in value)
    if isinstance(value, list | tuple):
        return [plain_values(each, name) for each in value]
    text = str(value)
    if callable(value) or " at 0x" in text:
        raise ConfigError(f"vLLM's {name} cannot be written down: {type(value).__name__}")
    return text
