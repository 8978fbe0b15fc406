"""The namespace of a running nano-vLLM: everything that decides the bytes of its K and V."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tierkv.engine.model_state import VOLATILE_FIELDS
from tierkv.errors import UnsupportedModelError
from tierkv.integrations.weights import weights_digest
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["check_parameters", "engine_digest", "namespace_of"]

_SOURCES = ("models/*.py", "layers/*.py", "utils/*.py", "engine/model_runner.py")


def namespace_of(runner: Any, *, salt: str = "", weights: str | None = None) -> Namespace:
    """Return the namespace of the blocks of a `ModelRunner` that has allocated its cache.

    It covers the digest of the weight files, the model's configuration, the rope tables as the model computed them,
    nano-vLLM's sources that compute K and V, dtype, heads, dim and block size of its cache, and the parallel rank.
    salt: separates tenants. weights: digest of the weight files, if it is known already.
    Raises UnsupportedModelError for a model with parameters that its files do not contain.
    """
    config = runner.config
    cache = runner.kv_cache  # [K and V, layers, blocks, block size, heads, dim]
    check_parameters(runner.model, Path(config.model))
    settings = {key: value for key, value in config.hf_config.to_dict().items() if key not in VOLATILE_FIELDS}
    architecture = {
        **json.loads(json.dumps(settings, default=str)),
        "engine": "nano-vllm",
        "engine_digest": engine_digest(Path(inspect.getfile(type(runner.model))).parent.parent),
        "class": type(runner.model).__qualname__,
        "buffers": tensors_digest(runner.model.named_buffers()),
    }
    layout = BlockLayout.uniform(
        num_layers=cache.shape[1],
        block_size=cache.shape[3],
        kv_heads=cache.shape[4],
        head_dim=cache.shape[5],
        dtype=str(cache.dtype).removeprefix("torch."),
    )
    return Namespace(
        weights=weights or weights_digest(config.model),
        architecture=architecture,
        layout=layout,
        salt=salt,
        tp_rank=runner.rank,
        tp_size=runner.world_size,
        name=Path(config.model).name,
    )


def engine_digest(package: Path) -> str:
    """Return sha256, in hex, of the sources in nano-vLLM's package folder that compute K and V.

    nano-vLLM's version stays the same over many commits, so it does not say which code computed a block.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}|{len(source)}|".encode())
        digest.update(source)
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return sha256, in hex, of names, dtypes, shapes and bytes of tensors.

    The rope tables are such tensors. nano-vLLM ignores some fields of a configuration and has defaults for others, so
    the configuration alone does not decide them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_parameters(model: Any, folder: Path) -> None:
    """Raise UnsupportedModelError if a parameter is in none of the weight files.

    nano-vLLM leaves such a parameter uninitialized, and the digest of the files does not cover it.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    loaded: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt", "cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = next((part for part in packed if part in name), None)
                loaded.add(f"{name.replace(part, packed[part][0])}|{packed[part][1]}" if part else name)

    def parts_of(name: str) -> list[str]:
        return [f"{name}|{shard}" for target, shard in packed.values() if target in name] or [name]

    missing = [name for name, _ in model.named_parameters() if not loaded.issuperset(parts_of(name))]
    # With tied embeddings the output layer shares the memory of the input layer, under a parameter of its own.
    tied = {parameter.data_ptr() for name, parameter in model.named_parameters() if name not in missing}
    missing = [name for name in missing if model.get_parameter(name).data_ptr() not in tied]
    if missing:
        raise UnsupportedModelError(
            f"{folder} has no weights for {', '.join(missing[:3])}: nano-vLLM leaves them uninitialized",
            hint="use a folder with all weights as safetensors",
        )
