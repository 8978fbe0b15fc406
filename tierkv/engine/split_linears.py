"""Linear modules that Transformers has split over ranks, computed from this rank's part of their weights.

A layer is split by columns where it begins (q, k, v, gate, up) and by rows where it ends (o, down): so two sums over
the ranks make a whole layer. The logits are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tierkv.engine.fused_ops import Norm, add_norm
from tierkv.engine.model_state import local_part
from tierkv.ranks.rank_sums import RankSums

__all__ = ["SplitHead", "SummedLinear", "is_split_evenly", "open_sums", "split_reasons"]

_BY_OUTPUTS, _BY_INPUTS = 0, 1


class SummedLinear:
    """A linear module that is split by its inputs: each rank computes a part of the sum. x: [T, part of inputs].

    buffer: 0 for the attention's output, 1 for the MLP's. So sums with a norm use the buffers in turn: inside a layer,
    from layer to layer and from pass to pass, because a pass makes either all of its sums so or none of them.
    """

    __slots__ = ("_bias", "_buffer", "_sums", "_weight")

    def __init__(self, module: Any, sums: RankSums, buffer: int) -> None:
        self._weight = local_part(module.weight.detach())
        self._bias = None if module.bias is None else local_part(module.bias.detach())
        self._sums = sums
        self._buffer = buffer

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return the RMSNorm of the residual and what the module computes, and their sum, the same on every rank.

        residual: [T, outputs], may be overwritten.
        """
        sums = self._sums
        if x.shape[0] <= sums.max_norm_rows:
            assert self._bias is None
            args = (x, self._weight, residual, norm.weight, norm.epsilon)
            return sums.linear_add_norm(*args, buffer=self._buffer), residual
        total = sums.linear(x, self._weight)
        return add_norm(total if self._bias is None else total + self._bias, residual, norm)


class SplitHead:
    """The last linear module, split by its outputs: each rank computes the logits of a part of the vocabulary."""

    __slots__ = ("_sums", "_weight")

    def __init__(self, module: Any, sums: RankSums) -> None:
        self._weight = local_part(module.weight.detach())
        self._sums = sums

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits [T, vocabulary] of x [T, hidden], the same on every rank; in `out` if given."""
        return self._sums.gather_columns(nn.functional.linear(x, self._weight), out)


def is_split_evenly(module: Any) -> bool:
    """Return whether a linear module without a bias is split by its outputs into equal parts."""
    weight: Any = getattr(module, "weight", None)
    if type(module) is not nn.Linear or len(list(module.parameters())) > 1 or not _is_split_by(weight, _BY_OUTPUTS):
        return False
    return bool(weight.shape[0] % weight.device_mesh.size() == 0)


def open_sums(model: Any) -> RankSums:
    """Return the sums over the ranks of a split model. All ranks call this together."""
    layers = model.model.layers
    weight = layers[0].self_attn.o_proj.weight
    mesh = weight.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    # A bias is added between sum and norm. With some sums alone, those with a norm would not use the buffers in turn.
    has_bias = any(part.bias is not None for each in layers for part in (each.self_attn.o_proj, each.mlp.down_proj))
    return RankSums(
        group,
        width=int(weight.shape[0]),
        dtype=weight.dtype,
        device=torch.device(model.device),
        with_norms=not has_bias,
    )


def split_reasons(layer: Any) -> Iterator[str]:
    """Yield why a layer of a split model cannot be computed from its parts."""
    attention, mlp = layer.self_attn, layer.mlp
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        if not all(_is_split_by(each, _BY_OUTPUTS) for each in module.parameters()):
            yield "its projections are not split by their outputs"
            return
    for module in (attention.o_proj, mlp.down_proj):
        parameters: dict[str, Any] = dict(module.named_parameters())
        if type(module) is not nn.Linear or not _is_split_by(parameters.pop("weight"), _BY_INPUTS):
            yield "its last projections are not split by their inputs"
            return
        if not all(map(_is_whole, parameters.values())):
            yield "a bias that is added to a sum over ranks is split"
            return
    if any(not _is_whole(each) for name, each in layer.named_parameters() if "norm" in name):
        yield "its norms are split"


def _is_split_by(parameter: Any, dim: int) -> bool:
    placements: tuple[Any, ...] = getattr(parameter, "placements", ())
    return len(placements) == 1 and bool(placements[0].is_shard() and placements[0].dim % parameter.ndim == dim)


def _is_whole(parameter: Any) -> bool:
    return all(placement.is_replicate() for placement in getattr(parameter, "placements", ()))
