"""The attention layers of DeepSeek-V2 and V3 models: which models have them, and what a layer makes of its input.

Multi-latent attention (MLA) computes from each token one latent vector and one rotated key part for all heads; K and V
of a head are projections of the latent by `kv_b_proj`. Source: DeepSeek-V2 (2024), section 2.1. A layer here computes
what the modules of Transformers compute up to those projections, by the modules themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tierkv.engine.model_reader import is_of_known_package
from tierkv.engine.model_state import local_part
from tierkv.errors import UnsupportedModelError

__all__ = ["MlaInput", "MlaLayer", "mla_layers", "mla_reasons", "rope_order"]

_ROTATIONS = {
    "DeepseekV2": ("apply_rotary_emb",),
    "DeepseekV3": ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"),
}
"""Architectures, and the functions of their files that rotate; as read in Transformers 5.0, 5.17 and 5.24."""


_ATTRIBUTES = (
    *("layer_idx", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scaling", "config"),
    *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaInput:
    """What one layer computes of T new tokens; both rope parts are rotated.

    query: [T, heads, nope_dim]. query_rope: [T, heads, rope_dim]. latent: [T, rank + rope_dim], the rope part at the
    end: what the cache holds.
    """

    query: Tensor
    query_rope: Tensor
    latent: Tensor


class MlaLayer:
    """One attention module of a DeepSeek model. It keeps no copy of weights, so it computes with the present ones.

    heads: those of this device, if the module is split over several; the latent is whole on each of them.
    rank: numbers of the latent without the rope part. nope_dim, rope_dim: of a head's query and key. v_dim: of a value.
    """

    def __init__(self, module: Any) -> None:
        self.module: Any = module
        self.index: int = int(module.layer_idx)
        self.rank: int = int(module.kv_lora_rank)
        self.nope_dim: int = int(module.qk_nope_head_dim)
        self.rope_dim: int = int(module.qk_rope_head_dim)
        self.v_dim: int = int(module.v_head_dim)
        self.heads: int = int(local_part(module.kv_b_proj.weight).shape[0]) // (self.nope_dim + self.v_dim)
        self.rotate: Callable[..., tuple[Tensor, Tensor]] = _rotation_of(module)

    @property
    def latent_dim(self) -> int:
        """Numbers that the cache holds of a token."""
        return self.rank + self.rope_dim

    @property
    def scale(self) -> float:
        """The factor of the scores; yarn's is part of it."""
        return float(self.module.scaling)

    @property
    def key_weight(self) -> Tensor:
        """The projection from the latent to the keys' first part: [heads, nope_dim, rank]."""
        return self._expansion[:, : self.nope_dim]

    @property
    def value_weight(self) -> Tensor:
        """The projection from the latent to the values: [heads, v_dim, rank]."""
        return self._expansion[:, self.nope_dim :]

    @property
    def _expansion(self) -> Tensor:
        weight = local_part(self.module.kv_b_proj.weight)
        return weight.view(self.heads, self.nope_dim + self.v_dim, self.rank)

    def project(self, hidden: Tensor, position_embeddings: Any) -> MlaInput:
        """Return queries and latents of hidden states [1, T, hidden]."""
        module, tokens = self.module, hidden.shape[1]
        if getattr(module, "q_a_proj", None) is None:  # older versions leave the attribute out
            query = module.q_proj(hidden)
        else:
            query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
        query = query.view(1, tokens, self.heads, self.nope_dim + self.rope_dim).transpose(1, 2)
        latent, rope = module.kv_a_proj_with_mqa(hidden).split([self.rank, self.rope_dim], dim=-1)
        latent = module.kv_a_layernorm(latent)
        query_rope, rope = self.rotate(query[..., self.nope_dim :], rope.unsqueeze(1), position_embeddings)
        return MlaInput(
            query=query[0, :, :, : self.nope_dim].transpose(0, 1),
            query_rope=query_rope[0].transpose(0, 1),
            latent=torch.cat((latent[0], rope[0, 0]), dim=-1),
        )

    def output(self, attended: Tensor) -> Tensor:
        """Return the layer's result [1, T, hidden] from its heads' values [T, heads, v_dim]."""
        result: Tensor = self.module.o_proj(attended.reshape(1, attended.shape[0], -1))
        return result


def mla_reasons(model: Any) -> Iterator[str]:
    """Yield why the latent of a model cannot be kept in place of K and V; the first reason is the one that counts."""
    architecture = next((each for each in _ROTATIONS if _is_of(model, each, "ForCausalLM")), None)
    if architecture is None:
        yield "its class is not that of DeepSeek-V2 or V3 in Transformers"
        return
    layers = model.model.layers
    if len(layers) != model.config.num_hidden_layers:
        yield "it does not run all of its layers"
    names = vars(importlib.import_module(type(model).__module__))
    for name in _ROTATIONS[architecture]:
        if not callable(names.get(name)):
            yield f"this Transformers has no {name}"
    for number, layer in enumerate(layers):
        yield from _layer_reasons(layer.self_attn, architecture, number)


def mla_layers(model: Any) -> list[MlaLayer]:
    """Return the attention layers of a model without `mla_reasons`."""
    return [MlaLayer(layer.self_attn) for layer in model.model.layers]


def rope_order(layer: MlaLayer) -> str:
    """Return in which order the cache holds the rope part: a part of the namespace.

    Transformers may rotate pairs of neighbours in place, or move the even dims before the odd ones. Both give equal
    scores, so a version may change the order; a block in the other order is a miss then.
    """
    numbers = torch.arange(float(layer.rope_dim)).view(1, 1, 1, -1)
    _, found = layer.rotate(numbers, numbers, _no_rotation(layer))
    order = [int(number) for number in found.flatten().tolist()]
    if order == list(range(layer.rope_dim)):
        return "as projected"
    if order == [*range(0, layer.rope_dim, 2), *range(1, layer.rope_dim, 2)]:
        return "even dims, odd dims"
    raise UnsupportedModelError(f"{type(layer.module).__name__} rotates in an order that is not known")


def _no_rotation(layer: MlaLayer) -> Any:
    """Return position embeddings of angle 0, as the layer's model makes them."""
    if type(layer.module).__name__.startswith("DeepseekV2"):
        return torch.ones(1, 1, layer.rope_dim // 2, dtype=torch.complex64)
    return torch.ones(1, 1, layer.rope_dim), torch.zeros(1, 1, layer.rope_dim)


def _layer_reasons(attention: Any, architecture: str, number: int) -> Iterator[str]:
    if not _is_of(attention, architecture, "Attention"):
        yield f"it has a {type(attention).__name__} where {architecture}Attention is expected"
        return
    missing = [name for name in _ATTRIBUTES if not hasattr(attention, name)]
    if missing:
        yield f"this Transformers' attention has no {', '.join(missing)}"
        return
    if attention.layer_idx != number:
        yield f"layer {number} calls itself {attention.layer_idx}"
    expansion = attention.kv_b_proj
    is_split = hasattr(expansion.weight, "placements")
    is_plain = type(expansion) is nn.Linear and expansion.bias is None
    if not is_plain or not (is_split or type(expansion.weight) is nn.Parameter):
        yield f"kv_b_proj of layer {number} is no plain linear module"
        return
    if not local_part(expansion.weight.detach()).is_contiguous():
        yield f"kv_b_proj of layer {number} is no plain linear module"
    for module in (attention, expansion):
        added = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        added += [vars(module)["forward"]] if "forward" in vars(module) else []
        if not all(is_split and module is expansion and is_of_known_package(each) for each in added):
            yield f"layer {number} has hooks or a forward of its own"
    if is_split:
        yield from _split_reasons(attention, number)


def _split_reasons(attention: Any, number: int) -> Iterator[str]:
    """Yield why a layer whose heads are split over devices cannot keep the latent: it must be whole on each of them."""
    weight = attention.kv_b_proj.weight
    placements = weight.placements
    dims = int(attention.qk_nope_head_dim) + int(attention.v_head_dim)
    rows = int(local_part(weight.detach()).shape[0])
    heads = rows // dims
    if (
        len(placements) != 1
        or not placements[0].is_shard(0)
        or heads * dims * weight.device_mesh.size() != weight.shape[0]
    ):
        yield f"layer {number} is not split by whole heads"
        return
    query = attention.q_proj if getattr(attention, "q_a_proj", None) is None else attention.q_b_proj
    query_dims = int(attention.qk_nope_head_dim) + int(attention.qk_rope_head_dim)
    shapes = [local_part(each.weight.detach()).shape for each in (query, attention.o_proj)]
    if int(shapes[0][0]) != heads * query_dims or int(shapes[1][1]) != heads * int(attention.v_head_dim):
        yield f"the projections of layer {number} are split in unlike ways"
    whole = (attention.kv_a_proj_with_mqa, attention.kv_a_layernorm)
    if any(not _is_whole(each) for module in whole for each in module.parameters()):
        yield f"the latent of layer {number} is split"


def _is_whole(parameter: Any) -> bool:
    return all(placement.is_replicate() for placement in getattr(parameter, "placements", ()))


def _is_of(module: Any, architecture: str, kind: str) -> bool:
    """Return whether a module is exactly of an architecture's class in Transformers, with the forward of that class."""
    found = type(module)
    place = "_".join(("deepseek", architecture.removeprefix("Deepseek").lower()))
    home, name = f"transformers.models.{place}.modeling_{place}", f"{architecture}{kind}"
    return (found.__module__, found.__qualname__) == (home, name) and (
        (found.forward.__module__, found.forward.__qualname__) == (home, f"{name}.forward")
    )


def _rotation_of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function of query, key [1, heads, T, rope_dim] and position embeddings that rotates both."""
    names = vars(importlib.import_module(type(module).__module__))
    if type(module).__name__.startswith("DeepseekV2"):
        rotate_pairs = names["apply_rotary_emb"]
        return lambda query, key, freqs: rotate_pairs(query, key, freqs.to(query.device))
    is_interleaved = module.config.rope_interleave
    rotate = names["apply_rotary_pos_emb_interleave" if is_interleaved else "apply_rotary_pos_emb"]
    return lambda query, key, both: rotate(query, key, *both)
