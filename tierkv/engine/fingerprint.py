"""Who a model is: the digest of its weights and the namespace of the blocks that it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

from tierkv.errors import UnsupportedModelError
from tierkv.layout import BlockLayout
from tierkv.namespace import Namespace
from tierkv.ranks.group import OneRank, RankGroup

__all__ = ["namespace_of", "weights_digest", "weights_state"]

_PIECE_BYTES = 64 << 20

# Fields of a configuration that decide neither K nor V: where it came from, how generation runs, how
# attention is implemented, over how many devices. dtype is the layout's, the slice the namespace's own.
_VOLATILE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "distributed_config",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def weights_digest(model: torch.nn.Module) -> str:
    """Return xxh3-128, in hex, over name, dtype, shape and bytes of every parameter and buffer.

    So weights that were quantised, merged with an adapter or changed in memory are another model, whatever
    they were loaded from. Buffers count even if they are not saved, rope frequencies among them. Reads all weights
    once, in pieces: about a second for 16 GB.
    """
    digest = xxhash.xxh3_128()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        split = f"{tensor.placements}|" if hasattr(tensor, "placements") else ""
        local = _local(tensor)
        digest.update(f"{name}|{tensor.dtype}|{tuple(local.shape)}|{split}".encode())
        for piece in _iter_bytes(local.detach()):
            digest.update(piece)
    return digest.hexdigest()


def weights_state(model: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """Return where each parameter lies and how often it was written to, as far as torch counts: cheap, and changed
    by training, `load_state_dict` and assignment. Writes through `.data` in place are not seen.
    """
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version) if type(p) is torch.nn.Parameter else _state_of_part(p)
        for p in model.parameters()
    )


def namespace_of(
    model: Any,
    layout: BlockLayout,
    *,
    adapter: str = "",
    salt: str = "",
    name: str = "",
    ranks: RankGroup | None = None,
) -> Namespace:
    """Return the namespace of a Hugging Face model's blocks. `adapter`: digest of one that is not merged.

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
    config = model.config.get_text_config().to_dict()
    architecture = {"class": type(model).__name__}
    architecture |= {key: value for key, value in config.items() if key not in _VOLATILE}
    return Namespace(
        weights=_joint_digest(weights_digest(model), group),
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


def _local(tensor: Tensor) -> Tensor:
    """Return what this device holds of a tensor that may be split over several, as a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _state_of_part(tensor: Tensor) -> tuple[int, int]:
    """Return the state of a split weight. Writes through a DTensor and through its local part count apart."""
    with torch.no_grad():  # or taking the part makes a node of autograd's graph
        part = _local(tensor)
    counted = {id(each): each for each in (tensor, part)}.values()
    return part.data_ptr(), sum(each._version for each in counted if not each.is_inference())


def _iter_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces of bounded size, on the CPU."""
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES].cpu().numpy().data
