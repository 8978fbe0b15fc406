"""FusedDecoder: the forward pass of common decoders with merged projections and fused element-wise kernels.

It computes what the modules of Transformers compute, from their own weights; the model itself stays as it is, apart
from where its weights lie. Which models: those whose classes are known here by name, with plain modules inside, whole
or split over several ranks. The self-test at opening compares its logits with the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tierkv.engine.attention import AttentionBatch, attend_batch
from tierkv.engine.backends.protocol import PagedQuery
from tierkv.engine.fused_ops import Norm, Places, add_norm, gate, has_kernels, heads_of
from tierkv.engine.merged_weights import MergedLinear, WeightUsers, merge_linears, why_not
from tierkv.engine.model_state import local_part
from tierkv.engine.model_support import self_test
from tierkv.engine.split_linears import SplitHead, SummedLinear, is_split_evenly, open_sums, split_reasons
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import RankGroup
from tierkv.ranks.rank_sums import RankSums
from tierkv.values.layout import BlockLayout

__all__ = ["FusedDecoder", "fuse_model", "test_fused"]

_log = logging.getLogger(__name__)

_ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Architectures whose modules compute the same, as read in Transformers 5.17 to 5.24."""


@dataclass(slots=True, kw_only=True)
class _Layer:
    """One decoder layer. shape: heads, kv_heads, head_dim; of this rank. after: the next layer's norm, or the last."""

    index: int
    shape: tuple[int, int, int]
    scale: float
    window: int | None
    qkv: MergedLinear
    head_norms: tuple[Norm, Norm] | None
    output: SummedLinear | nn.Linear
    before_mlp: Norm
    gate_up: MergedLinear
    down: SummedLinear | nn.Linear
    after: Norm


def fuse_model(model: Any, wish: str, ranks: RankGroup) -> FusedDecoder | None:
    """Return the fused decoder of a model, and merge its weights; None for the plain one.

    wish: "auto" fuses on CUDA what can be fused and logs what cannot, "off" never, "on" on any device.
    Raises ConfigError for another wish, UnsupportedModelError where "on" cannot be.
    """
    if wish not in ("auto", "off", "on"):
        raise ConfigError(f'fuse must be "auto", "off" or "on", got {wish!r}')
    if wish == "off" or (wish == "auto" and model.device.type != "cuda"):
        return None
    reason = next(_reasons(model, ranks), None)
    if reason is None:
        return FusedDecoder(model, open_sums(model) if ranks.size > 1 else None)
    if wish == "on":
        raise UnsupportedModelError(f"{type(model).__name__} cannot be fused: {reason}")
    _log.info("%s runs without fused kernels: %s", type(model).__name__, reason)
    return None


def test_fused(model: Any, layout: BlockLayout, wish: str, ranks: RankGroup) -> str:
    """Run the self-test on the passes that a runner will compute. Return "off" if only the plain ones pass it.

    Raises as `fuse_model` and `self_test` do; a fused model that fails raises if the wish is "on".
    """
    fused = fuse_model(model, wish, ranks)
    if fused is not None:
        try:
            self_test(model, layout, fused)
            return wish
        except UnsupportedModelError as exc:
            if wish == "on":
                raise
            _log.warning("fused kernels are off: %s", exc)
    self_test(model, layout)
    return "off"


class FusedDecoder:
    """Computes a model's forward passes; made by `fuse_model`. Merges weights at construction.

    sums: adds what the ranks of a split model compute; None for a whole one.
    """

    def __init__(self, model: Any, sums: RankSums | None = None) -> None:
        decoder = model.model
        self.sums: RankSums | None = sums
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = _norm_of(decoder.layers[0].input_layernorm)
        self._head = model.lm_head
        self._split_head: SplitHead | None = None
        self._head_weight: Tensor | None = None
        if sums is not None and is_split_evenly(model.lm_head):
            self._split_head = SplitHead(model.lm_head, sums)
        elif type(model.lm_head) is nn.Linear and [type(each) for each in model.lm_head.parameters()] == [nn.Parameter]:
            self._head_weight = model.lm_head.weight.t()
        norms = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        self._layers = [
            _layer_of(layer, model.config, sums, after) for layer, after in zip(decoder.layers, norms, strict=True)
        ]

    def __call__(
        self, input_ids: Tensor, batch: AttentionBatch, logits_to_keep: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Run one forward pass over packed tokens, as `attention.forward` does. Return logits [kept, vocabulary].

        out: [kept, vocabulary], where they are written; None makes a new tensor.
        """
        try:
            normed = self._normed(input_ids, batch)
        except BaseException:
            if self.sums is not None:
                self.sums.end_early()
            raise
        if logits_to_keep is not None:
            normed = normed[logits_to_keep]
        if self._split_head is not None:
            return self._split_head(normed, out)
        if out is None:
            logits: Tensor = self._head(normed)
            return logits
        if self._head_weight is not None:
            return torch.mm(normed, self._head_weight, out=out)
        return out.copy_(self._head(normed))

    def _normed(self, input_ids: Tensor, batch: AttentionBatch) -> Tensor:
        """Return what the head takes, [T, hidden]."""
        hidden: Tensor = self._embed(input_ids)
        cos, sin = self._rotary(hidden[None], batch.position_ids)
        rotary = (cos[0].contiguous(), sin[0].contiguous())
        normed, residual = add_norm(hidden, None, self._norm)
        for layer in self._layers:
            normed, residual = self._run_layer(layer, normed, residual, rotary, batch)
        return normed

    @staticmethod
    def _run_layer(
        layer: _Layer, normed: Tensor, residual: Tensor, rotary: tuple[Tensor, Tensor], batch: AttentionBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the next layer's input after its norm, and the residual. normed, residual: the same for this layer."""
        qkv = layer.qkv(normed)
        batch.enter_layer(layer.index)
        keys, values = batch.pool.key_cache(layer.index), batch.pool.value_cache(layer.index)
        # A cascade's own pass writes K and V itself.
        places = Places(keys, values, batch.block_ids, batch.offsets) if batch.cascade is None else None
        query, new_keys, new_values = heads_of(qkv, rotary, layer.shape, layer.head_norms, places)
        paged = PagedQuery(
            query=query,
            new_keys=new_keys,
            new_values=new_values,
            keys=keys,
            values=values,
            scale=layer.scale,
            window=layer.window,
            layer=layer.index,
        )
        attended = attend_batch(paged, batch, is_written=places is not None)
        normed, residual = _add(layer.output, attended.flatten(1), residual, layer.before_mlp)
        return _add(layer.down, gate(layer.gate_up(normed)), residual, layer.after)


def _add(linear: SummedLinear | nn.Linear, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of the residual and what a linear module computes of x, and their sum."""
    if isinstance(linear, SummedLinear):
        return linear.add_norm(x, residual, norm)
    return add_norm(linear(x), residual, norm)


def _reasons(model: Any, ranks: RankGroup) -> Iterator[str]:
    """Yield why a model cannot be fused."""
    architecture = next((each for each in _ARCHITECTURES if _is_of(model, each, "ForCausalLM")), None)
    if architecture is None:
        yield f"its class is not that of {', '.join(_ARCHITECTURES)} in Transformers"
        return
    if model.device.type == "cuda" and not has_kernels():
        yield "triton is not installed"
    decoder, config = model.model, model.config
    if not _is_of(decoder, architecture, "Model") or not _is_of(decoder.rotary_emb, architecture, "RotaryEmbedding"):
        yield "its modules are not its class's own"
        return
    if len(decoder.layers) != config.num_hidden_layers:
        yield "it does not run all of its layers"
    if any(parameter.dtype != model.dtype for parameter in decoder.parameters()):
        yield "its weights have several dtypes"
    yield from _patches(model, may_be_split=ranks.size > 1)
    users = WeightUsers(model)
    for layer in decoder.layers:
        yield from _layer_reasons(layer, architecture, users)
        if ranks.size > 1:
            yield from split_reasons(layer)
    if not _is_of(decoder.norm, architecture, "RMSNorm"):
        yield "its norm is not its class's own"


def _layer_reasons(layer: Any, architecture: str, users: WeightUsers) -> Iterator[str]:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms_of(attention)]
    kinds = [(layer, "DecoderLayer"), (attention, "Attention"), (mlp, "MLP"), *((norm, "RMSNorm") for norm in norms)]
    for module, kind in kinds:
        if not _is_of(module, architecture, kind):
            yield f"it has a {type(module).__name__} where {architecture}{kind} is expected"
            return
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        yield f"its activation is {type(mlp.act_fn).__name__}"
    for modules in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        reason = why_not(modules, users)
        if reason:
            yield reason


def _patches(model: nn.Module, *, may_be_split: bool) -> Iterator[str]:
    """Yield a module whose call does more than its class says: hooks, or a forward of its own.

    may_be_split: the forward with which Transformers splits a module is none of its own.
    """
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if may_be_split and getattr(own, "__module__", "").startswith("transformers.distributed."):
            own = None
        if module._forward_hooks or module._forward_pre_hooks or own is not None:
            yield f"{name or 'it'} has hooks or a forward of its own"
            return


def _is_of(module: Any, architecture: str, kind: str) -> bool:
    """Return whether a module is exactly of an architecture's class in Transformers, with the forward of that class."""
    cls = type(module)
    home = f"transformers.models.{architecture.lower()}.modeling_{architecture.lower()}"
    own, found = f"{architecture}{kind}", [cls, cls.forward]
    return [each.__qualname__ for each in found] == [own, f"{own}.forward"] and {each.__module__ for each in found} == {
        home
    }


def _layer_of(layer: Any, config: Any, sums: RankSums | None, after: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    qkv = merge_linears([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = merge_linears([mlp.gate_proj, mlp.up_proj])
    if qkv.weight.is_cuda:
        torch.cuda.empty_cache()  # else the memory of the parts stays reserved
    norms = [_norm_of(each) for each in _head_norms_of(attention)]
    return _Layer(
        index=int(attention.layer_idx),
        shape=(_num_outputs(attention.q_proj) // dim, _num_outputs(attention.k_proj) // dim, dim),
        scale=float(attention.scaling),
        window=_window_of(attention, config),
        qkv=qkv,
        head_norms=(norms[0], norms[1]) if norms else None,
        output=SummedLinear(attention.o_proj, sums, 0) if sums else attention.o_proj,
        before_mlp=_norm_of(layer.post_attention_layernorm),
        gate_up=gate_up,
        down=SummedLinear(mlp.down_proj, sums, 1) if sums else mlp.down_proj,
        after=_norm_of(after),
    )


def _num_outputs(linear: Any) -> int:
    """Return how many outputs of a linear module this device computes."""
    return int(local_part(linear.weight).shape[0])


def _window_of(attention: Any, config: Any) -> int | None:
    """Return a layer's window in tokens: Mistral has it in its configuration, Qwen's layers each have their own."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(config, "sliding_window", None) or None
    return getattr(attention, "sliding_window", None) or None


def _head_norms_of(attention: Any) -> Sequence[Any]:
    return [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []


def _norm_of(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))
