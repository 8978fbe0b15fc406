"""Loads a model and its tokenizer: any Hugging Face decoder by directory or name, or the embedded model."""

from __future__ import annotations

import importlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierkv.engine.embedded_files import EMBEDDED
from tierkv.engine.embedded_model import ready_embedded_model
from tierkv.engine.transformers_import import import_transformers
from tierkv.errors import ConfigError, StoreError, UnsupportedModelError
from tierkv.values.files import open_regular, user_path

__all__ = [
    "EMBEDDED",
    "LoadedModel",
    "device_of",
    "dtype_of",
    "first_line",
    "load_model",
    "path_of",
    "split_model",
]

_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja", ".gguf")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer (None for token ids only), and its name as requested."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    name: str | None, *, cache_dir: Path | None = None, device: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Load a model for inference, in eval mode.

    name: a directory or a name of the Hugging Face hub; None or "embedded" is the embedded model, a small random one.
    cache_dir: the directory that keeps the embedded model; only it needs this.
    device: "cpu", "cuda" or "cuda:N"; by default CUDA if there is a device.
    dtype: "bfloat16", "float16", "float32" or "float64"; by default bfloat16 on CUDA, the checkpoint's on a CPU.
    Raises ConfigError, in one line, for an unknown device or dtype and for an unknown or damaged model. Missing weights
    are damage too: Transformers would fill them with random numbers.

    >>> load_model(None, cache_dir=Path("models")).name
    'embedded'
    """
    transformers = import_transformers()
    target = device_of(device)
    path = path_of(name, cache_dir)
    options = {"dtype": dtype_of(dtype, target)}
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = model.to(target).eval()
    except Exception as exc:  # a model's files make Transformers and its libraries raise anything
        raise ConfigError(f"cannot load the model {name or EMBEDDED!r}: {first_line(exc)}") from exc
    if fault := _fault_of(found, tokenizer):
        raise ConfigError(f"cannot load the model {name or EMBEDDED!r}: {fault}")
    return LoadedModel(model, tokenizer, name or EMBEDDED)


def _fault_of(found: dict[str, Any], tokenizer: Any) -> str | None:
    """Return the fault of a model that Transformers has loaded in spite of missing parts; None if it is whole."""
    for kind, what in (("missing_keys", "are not in its files"), ("mismatched_keys", "have not the shape it says")):
        names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in found.get(kind) or ())
        if names:
            return f"{len(names)} of its weights, {names[0]} the first, {what}"
    if not tokenizer.encode("a word", add_special_tokens=False):
        return "its tokenizer knows no token (is tokenizer.json missing?)"
    return None


def split_model(model: Any) -> Any:
    """Split a loaded model over the processes of torch.distributed, in place, by its own tensor-parallel plan.

    Every process calls this function with the same weights on its own device, and keeps its slice. So the whole model
    must first fit a device; load larger models in slices, by Transformers' `from_pretrained` with a
    `distributed_config`. Raises ConfigError without a process group and for a model on another process's device,
    UnsupportedModelError for a model without a plan.
    """
    transformers = import_transformers()
    name = type(model).__name__
    if not (hasattr(model, "prepare_distribute_model") and hasattr(model, "maybe_distribute_model")):
        raise ConfigError(f"Transformers {transformers.__version__} cannot split a loaded {name}", hint="5.17 can")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ConfigError(f"{name} cannot be split: torch.distributed has no process group", hint="run under torchrun")
    if not model.tp_plan:
        raise UnsupportedModelError(f"{name} has no tensor-parallel plan")
    if model.device != (own := _own_device()):
        raise ConfigError(f"{name} is on {model.device}, but this process splits models on {own}")
    size = torch.distributed.get_world_size()
    config = importlib.import_module("transformers.distributed").DistributedConfig(tp_plan="auto", tp_size=size)
    tied = _untie(model)
    try:
        config, _, mesh = model.prepare_distribute_model(config)  # the type of the mesh differs between versions
        return model.maybe_distribute_model(model, config, mesh)
    except ValueError as exc:
        raise UnsupportedModelError(f"{name} cannot be split over {size} devices: {first_line(exc)}") from exc
    finally:
        _tie(model, tied)


def _own_device() -> torch.device:
    """Return the device of this process's slice: Transformers takes it from torchrun, not from the model."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    try:
        return torch.device(accelerator.type, torch.distributed.get_node_local_rank())
    except RuntimeError as exc:
        raise ConfigError("LOCAL_RANK does not say which device is this process'", hint="run under torchrun") from exc


def _untie(model: Any) -> list[tuple[str, str]]:
    """Give each further name of a tied weight its own parameter over the same memory; return (name, first name) pairs.

    Transformers splits a model before it ties weights, and 5.23 finds only the first name of a tied weight.
    """
    first_names: dict[int, str] = {}
    tied = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        first_name = first_names.setdefault(id(parameter), name)
        if first_name != name:
            _set_parameter(model, name, torch.nn.Parameter(parameter.detach(), parameter.requires_grad))
            tied.append((name, first_name))
    return tied


def _tie(model: Any, tied: list[tuple[str, str]]) -> None:
    """Undo `_untie`, except for weights whose names were split in different ways."""
    for name, first_name in tied:
        parameter, first = model.get_parameter(name), model.get_parameter(first_name)
        if getattr(parameter, "placements", None) == getattr(first, "placements", None):
            _set_parameter(model, name, first)


def _set_parameter(model: Any, name: str, parameter: torch.nn.Parameter) -> None:
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, parameter)


def path_of(name: str | None, cache_dir: Path | None) -> str:
    """Return the argument for Transformers: a directory or a name of the hub. Raises ConfigError."""
    if name is None or name == EMBEDDED:
        if cache_dir is None:
            raise ConfigError("the embedded model needs a cache_dir to be kept in")
        return str(ready_embedded_model(cache_dir))
    if not name:
        raise ConfigError("the model has no name")
    path = user_path(name)
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise ConfigError(f"{name} is no model: it is not a directory")
        files = {entry.name: entry.path for entry in os.scandir(path) if not entry.is_dir()}
        if "config.json" not in files:
            raise ConfigError(f"{name} is no model: it has no config.json")
        for file in files.values():
            if file.endswith(_MODEL_SUFFIXES):
                os.close(open_regular(file))  # Transformers would block on a FIFO
    except (FileNotFoundError, NotADirectoryError):
        if path.is_absolute():
            raise ConfigError(f"there is no model at {name}") from None
        return name
    except OSError as exc:
        raise ConfigError(f"cannot read the model {name}: {exc.filename or path}: {exc.strerror}") from exc
    except StoreError as exc:
        raise ConfigError(f"cannot read the model {name}: {exc}") from exc
    return str(path)


def device_of(name: str | None) -> torch.device:
    """Return the device of a name, CUDA by default if there is one. Raises ConfigError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as exc:
        raise ConfigError(f"{name!r} is no device: say cpu or cuda") from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"tierkv does not run on {name}: say cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def dtype_of(name: str | None, device: torch.device) -> Any:
    """Return torch's dtype of a name, or "auto" for the checkpoint's on a CPU. Raises ConfigError."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else "auto"
    dtype = getattr(torch, name, None)
    if name not in ("bfloat16", "float16", "float32", "float64") or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name!r} is no dtype for K and V: say bfloat16, float16 or float32")
    return dtype


def first_line(exc: BaseException) -> str:
    """Return the first line of an error's text, with the next one where it ends in a colon."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(exc).__name__
