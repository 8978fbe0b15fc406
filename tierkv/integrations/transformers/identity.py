"""The identity of a model for `generate`: the layout and namespace of its blocks, and the check before each call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tierkv.engine.model_identity import ModelCheck, namespace_of
from tierkv.engine.model_state import ModelState
from tierkv.engine.model_support import check_block_size, check_split, check_supported, read_stable_state
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.integrations.transformers.self_test import cache_argument, check_reuse, run_model
from tierkv.ranks.group import OneRank
from tierkv.values.layout import DTYPE_BYTES, BlockLayout, LayerLayout
from tierkv.values.locks import OwnedLock
from tierkv.values.namespace import Namespace

__all__ = ["Identity", "ModelGuard", "identify"]

_PREFILL = ("input_ids", "generation_config", "model_kwargs", "is_first_iteration")
_KNOWN_PACKAGES = frozenset({"transformers", "torch", "flash_attn", "kernels"})


@dataclass(frozen=True, slots=True)
class Identity:
    """What `identify` found. caches_padding: K and V of a padded row are those of the row alone."""

    namespace: Namespace
    guard: ModelGuard
    caches_padding: bool


def identify(model: Any, *, block_size: int, adapter: str = "", salt: str = "", name: str = "") -> Identity:
    """Check that a model's K and V can be reused by prefix, and return the namespace of its blocks.

    The namespace is the engine's, and also has the attention implementation and the version of Transformers: both
    decide the bytes. Costs a few forward passes and reads all weights twice.
    Raises UnsupportedModelError or ConfigError, with the reason.
    """
    kind = type(model).__name__
    _check_generate(model)
    check_supported(model)
    if cache_argument(model) is None or "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{kind} takes no cache, or no positions")
    check_split(model, OneRank())
    check_block_size(model, block_size)
    devices = {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModelError(f"{kind} is spread over {', '.join(sorted(devices))}: one device can be cached")
    attention = _Attention.of(model)
    attention.check()
    state = read_stable_state(model)
    layout = _layout_of(model, block_size)
    caches_padding = check_reuse(model, layout)
    namespace = namespace_of(model, layout, adapter=adapter, salt=salt, name=name or kind, state=state)
    engine = {"name": "transformers", "version": transformers.__version__, "attention": attention.name}
    namespace = replace(namespace, architecture={**namespace.architecture, "engine": engine})
    return Identity(namespace, ModelGuard(model, state, attention), caches_padding)


class ModelGuard:
    """Compares a model with what it was when its namespace was made. Thread-safe."""

    def __init__(self, model: Any, state: ModelState, attention: _Attention) -> None:
        self._model = model
        self._attention = attention
        self._lock = OwnedLock()
        self._check = ModelCheck(model, state)
        self._changed_bytes: str | None = None

    def fault(self) -> str | None:
        """Return why the model may not be cached now; None if it is as it was.

        Compares all settings, hooks and functions, torch's counts of writes, and a sample of the weights' bytes. The
        sample follows the work on the device's current stream, and is waited for.
        """
        if _Attention.of(self._model) != self._attention:
            return "the attention implementation has changed since the cache was opened"
        if any(_is_of_peft(hook) for module in self._model.modules() for hook in module._forward_pre_hooks.values()):
            return "rows of the batch may have adapters of their own (hooks of PEFT)"
        with self._lock:
            try:
                self._check.check()
            except (ConfigError, UnsupportedModelError) as exc:
                return str(exc)
            try:
                self._check.start()()
            except ConfigError as exc:
                self._changed_bytes = str(exc)  # the next sample is of other bytes
            return self._changed_bytes


@dataclass(frozen=True, slots=True)
class _Attention:
    """The attention implementation of a model: its name, its function, and the function that makes its masks."""

    name: str
    function: Any
    mask_function: Any

    @classmethod
    def of(cls, model: Any) -> _Attention:
        name = str(model.config.get_text_config(decoder=True)._attn_implementation)
        return cls(name, ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name))

    def check(self) -> None:
        """Raise UnsupportedModelError for a function of the user's: its name does not identify it."""
        for function in (self.function, self.mask_function):
            package = str(getattr(inspect.unwrap(function), "__module__", "")).split(".")[0] if function else ""
            if function is not None and package not in _KNOWN_PACKAGES:
                raise UnsupportedModelError(f"the attention {self.name!r} is a function of {package}: not identified")


def _is_of_peft(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("peft")


def _check_generate(model: Any) -> None:
    """Raise unless the model generates by the functions that a persistent cache knows."""
    kind = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(f"{kind} has no generate of Transformers")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} has an encoder: its K and V depend on more than the tokens before them")
    prefill = getattr(model, "_prefill", None)
    if prefill is None or tuple(inspect.signature(prefill).parameters)[: len(_PREFILL)] != _PREFILL:
        raise UnsupportedModelError(
            f"generate of Transformers {transformers.__version__} is not known to tierkv", hint="5.17 to 5.24 are"
        )


@torch.no_grad()
def _layout_of(model: Any, block_size: int) -> BlockLayout:
    """Return the layout of a model's blocks, from the cache of a pass over two tokens."""
    kind = type(model).__name__
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    run_model(model, torch.zeros(1, 2, dtype=torch.int64, device=model.device), cache)
    layers: list[LayerLayout] = []
    dtypes: set[str] = set()
    for at, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            raise UnsupportedModelError(f"{kind} keeps no K and V of its own in layer {at} ({type(layer).__name__})")
        (_, heads, slots, k_dim), v_dim = layer.keys.shape, layer.values.shape[-1]
        if slots != 2 or tuple(layer.values.shape[:3]) != (1, heads, 2):
            raise UnsupportedModelError(f"{kind} has K and V of an unknown shape in layer {at}")
        layers.append(LayerLayout(kv_heads=heads, k_dim=k_dim, v_dim=v_dim))
        dtypes |= {str(each.dtype).removeprefix("torch.") for each in (layer.keys, layer.values)}
    dtype = dtypes.pop()
    if dtypes or dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"{kind} has K and V of dtype {', '.join(sorted({dtype, *dtypes}))}")
    return BlockLayout(block_size=block_size, dtype=dtype, layers=tuple(layers))
