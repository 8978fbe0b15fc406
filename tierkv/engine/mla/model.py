"""Runs a DeepSeek model with the latents of MLA in the cache, and decides whether a model is run so."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.attention import AttentionBatch, AttentionSwitch, batch_of
from tierkv.engine.mla.attention import MlaAttention
from tierkv.engine.mla.flashinfer import flashinfer_kernel, why_no_flashinfer
from tierkv.engine.mla.layers import MlaLayer, mla_layers, mla_reasons
from tierkv.engine.mla.seams import ModuleSeams
from tierkv.engine.mla.self_test import check_latent
from tierkv.engine.model_support import probe_layout
from tierkv.errors import CapacityError, ConfigError, UnsupportedModelError
from tierkv.ranks.group import RankGroup
from tierkv.values.layout import BlockLayout

__all__ = ["LatentAttention", "MlaChoice", "MlaSwitch", "choose_mla", "latent_attention"]

_log = logging.getLogger(__name__)

_WISHES = ("auto", "latent", "expanded")


class LatentAttention:
    """Stands for the attention modules of a DeepSeek model inside each `with` block; blocks may nest.

    The model must attend through tierkv meanwhile. Outside of a block it is as it was. use_library: attend by
    FlashInfer where it can; else by torch.
    Raises UnsupportedModelError, with the reason, for a model whose latent cannot be kept.
    """

    def __init__(self, model: Any, *, use_library: bool = True) -> None:
        reason = next(mla_reasons(model), None)
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot keep the latent: {reason}")
        self.layers: list[MlaLayer] = mla_layers(model)
        reason = why_no_flashinfer(model, self.layers) if use_library else "it is not wanted"
        if reason is not None and use_library and model.device.type == "cuda":
            _log.info("%s attends to latents by torch, not by FlashInfer: %s", type(model).__name__, reason)
        self.attention: MlaAttention = MlaAttention(flashinfer_kernel(model, self.layers) if reason is None else None)
        self._seams = ModuleSeams(self.layers, lambda layer: _Handler(layer, self.attention))

    @property
    def kernel(self) -> str:
        """What computes absorbed attention: "flashinfer" or "torch"."""
        return "torch" if self.attention.kernel is None else "flashinfer"

    def __enter__(self) -> None:
        self._seams.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._seams.__exit__(*exc_info)
        if not self._seams.is_open:
            self.attention.end_pass()


class MlaSwitch(AttentionSwitch):
    """Makes a model attend through tierkv, over latents, inside each `with` block."""

    def __init__(self, model: Any, latent: LatentAttention) -> None:
        super().__init__(model)
        self._latent = latent

    def __enter__(self) -> None:
        super().__enter__()
        self._latent.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._latent.__exit__(*exc_info)
        super().__exit__(*exc_info)


class _Handler:
    """Computes one attention module's forward pass over the latents."""

    def __init__(self, layer: MlaLayer, attention: MlaAttention) -> None:
        self._layer = layer
        self._attention = attention

    def __call__(
        self,
        replaced: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer, batch = self._layer, batch_of(options)
        if attention_mask is not None or position_embeddings is None:
            raise UnsupportedModelError(f"{type(layer.module).__name__} is called in a way that is not known")
        if hidden_states.shape[0] != 1:
            raise ConfigError(f"tierkv's attention takes packed input, got a batch of {hidden_states.shape[0]}")
        batch.enter_layer(layer.index)
        new = layer.project(hidden_states, position_embeddings)
        if isinstance(batch, AttentionBatch):
            return layer.output(self._attention.attend(layer, new, batch.pool, batch)), None
        batch.add_latent(layer.index, new.latent)  # the probe that finds the layout
        return layer.output(new.query.new_zeros(new.query.shape[0], layer.heads, layer.v_dim)), None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaChoice:
    """How a model's blocks are laid out, and the attention for it; None where they hold K and V.

    fallbacks: how often a way was tried at opening and failed its self-test, by its name: "flashinfer", "latent".
    """

    layout: BlockLayout
    latent: LatentAttention | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)


def latent_attention(model: Any, wish: str, *, use_library: bool = True) -> LatentAttention | None:
    """Return the attention that keeps a model's latent, as its configuration and modules allow; None for K and V.

    wish: "auto" keeps the latent where it can be kept, "expanded" never, "latent" always.
    Raises ConfigError for another wish, UnsupportedModelError where "latent" cannot be.
    """
    if wish not in _WISHES:
        raise ConfigError(f'mla must be "auto", "latent" or "expanded", got {wish!r}')
    if wish == "expanded":
        return None
    reason = next(mla_reasons(model), None)
    if reason is None:
        return LatentAttention(model, use_library=use_library)
    if wish == "latent":
        raise UnsupportedModelError(f"{type(model).__name__} cannot keep the latent: {reason}")
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        _log.info("%s keeps K and V, not the latent: %s", type(model).__name__, reason)
    return None


def choose_mla(model: Any, wish: str, *, block_size: int, ranks: RankGroup) -> MlaChoice:
    """Return how to run a model, by its self-test: with FlashInfer, with torch, or with expanded K and V.

    Each way that fails its self-test is logged and counted. Arguments and errors as for `latent_attention`; with
    "latent", a model that fails raises UnsupportedModelError. All ranks of a split model call this together, and take
    the same way: one that fails on a rank is off on all.
    """
    fallbacks: Counter[str] = Counter()
    latent = latent_attention(model, wish)
    while latent is not None:
        failure: UnsupportedModelError | None = None
        layout: BlockLayout | None = None
        try:
            layout = _tested_layout(model, block_size, latent)
        except UnsupportedModelError as exc:
            failure = exc
        is_last = latent.kernel == "torch"
        are_good, are_last = _agree_on_way(ranks, layout is not None, is_last)
        if are_good and layout is not None:
            return MlaChoice(layout=layout, latent=latent, fallbacks=dict(fallbacks))
        failure = failure or UnsupportedModelError("it is off on another rank")
        if are_last and wish == "latent":
            raise failure
        fallbacks["latent" if are_last else "flashinfer"] += 1
        _log.warning("MLA over latents by %s is off: %s", latent.kernel, failure)
        latent = None if are_last else latent_attention(model, wish, use_library=False)
    return MlaChoice(layout=probe_layout(model, block_size=block_size), fallbacks=dict(fallbacks))


def _agree_on_way(ranks: RankGroup, is_good: bool, is_last: bool) -> tuple[bool, bool]:
    """Return whether a way is good on every rank, and whether it was the last one on every rank."""
    votes = [tuple(each) for each in ranks.gather(bytes([is_good, is_last]))]
    return all(good for good, _ in votes), all(last for _, last in votes)


def _tested_layout(model: Any, block_size: int, latent: LatentAttention) -> BlockLayout:
    """Return the layout of a model's latents, after the self-test. Raises UnsupportedModelError where it fails.

    A library that cannot be compiled or run here fails it too, and so does another version's way of calling.
    """
    try:
        layout = probe_layout(model, block_size=block_size, latent=latent)
        check_latent(model, layout, latent)
        return layout
    except (CapacityError, ConfigError, UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as exc:
        raise UnsupportedModelError(f"{type(model).__name__} fails the self-test: {type(exc).__name__}: {exc}") from exc
