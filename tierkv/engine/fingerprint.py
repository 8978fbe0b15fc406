"""Who a model is: the digest of its weights and the namespace of the blocks that it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

from tierkv.engine.gate import settled_state
from tierkv.engine.model_state import VOLATILE_FIELDS, ModelState, local_part, read_state
from tierkv.errors import UnsupportedModelError
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["namespace_of", "settings_digest", "weights_digest"]

_PIECE_BYTES = 64 << 20


def weights_digest(model: torch.nn.Module, state: ModelState | None = None) -> str:
    """Return xxh3-128, in hex, over name, dtype, shape and bytes of every tensor that a model holds.

    state: the model's, where it has been read already. So weights that were quantised, merged with an adapter or
    changed in memory are another model, whatever they were loaded from. Buffers count even if they are not saved, rope
    frequencies among them, and so do tensors in plain attributes. Reads all weights once, in pieces: about a second
    for 16 GB. Raises UnsupportedModelError where weights are not in memory.
    """
    state = state or read_state(model)
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.tensors.items()):
        if name in state.moving:
            continue
        if tensor.device.type == "meta":
            raise UnsupportedModelError(f"{type(model).__name__} is not all in memory: {name} is not")
        split = f"{tensor.placements}|" if hasattr(tensor, "placements") else ""
        local = local_part(tensor)
        digest.update(f"{name}|{tensor.dtype}|{tuple(local.shape)}|{split}".encode())
        for piece in _iter_bytes(local.detach()):
            digest.update(piece)
    return digest.hexdigest()


def settings_digest(state: ModelState) -> str:
    """Return xxh3-128, in hex, over the classes of a model's modules and what they hold beside tensors: their scales,
    windows and epsilons, the active adapters, what `state_dict` says of packed weights.
    """
    lines = (f"{path}={state.settings[path]}\n" for path in sorted(state.identity - state.moving))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode(errors="backslashreplace"))


def namespace_of(
    model: Any,
    layout: BlockLayout,
    *,
    adapter: str = "",
    salt: str = "",
    name: str = "",
    ranks: RankGroup | None = None,
    state: ModelState | None = None,
) -> Namespace:
    """Return the namespace of a Hugging Face model's blocks. `adapter`: digest of one that is not merged.

    state: of the model, from `settled_state`, where it has been read already.
    ranks: of a split model. Its digest is made of every rank's, since K and V of one depend on the weights of all.
    Raises UnsupportedModelError for a model that has adapters where none is named: which of them is active, and how
    strongly, are no weights.
    """
    if not adapter and any(hasattr(module, "adapter_layer_names") for module in model.modules()):  # PEFT's layers
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters that are not merged into its weights",
            hint="merge them, or say by adapter= which one is active: a digest of its content and its scale",
        )
    group = ranks or OneRank()
    state = state or settled_state(model)
    config = model.config.get_text_config().to_dict()
    architecture = {"class": type(model).__name__}
    architecture |= {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
    architecture["modules"] = _joint_digest(settings_digest(state), group)
    if torch.get_default_dtype() != torch.float32:  # what a model makes on its way may have it
        architecture["default_dtype"] = str(torch.get_default_dtype())
    return Namespace(
        weights=_joint_digest(weights_digest(model, state), group),
        architecture=json.loads(json.dumps(architecture, default=str)),
        layout=layout,
        adapter=adapter,
        salt=salt,
        tp_rank=group.rank,
        tp_size=group.size,
        name=name,
    )


def _joint_digest(digest: str, ranks: RankGroup) -> str:
    if ranks.size == 1:
        return digest
    return xxhash.xxh3_128_hexdigest(b"|".join(ranks.gather(digest.encode())))


def _iter_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces of bounded size, on the CPU."""
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES].cpu().numpy().data
