"""Decides which models may be cached: by their configuration, by one probe pass, and by a self-test.

Reuse of K and V by prefix is correct only if K and V of a token depend on the tokens up to it and on nothing else. The
model's attention must also go through the function that tierkv registers. The configuration is checked first; the
self-test finds the rest before a wrong byte is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.model_reader import read_state
from tierkv.engine.model_state import ModelState, changed_paths
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import RankGroup
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

__all__ = [
    "ROUNDING",
    "TOLERANCE",
    "check_block_size",
    "check_call",
    "check_split",
    "check_state",
    "check_supported",
    "context_of",
    "nudged_embeddings",
    "probe_layout",
    "read_stable_state",
    "relative_error",
    "self_test",
]

_SAFE_LAYERS = {"full_attention", "sliding_attention"}
_SAFE_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_STRETCHED_ROPE = {"linear", "yarn"}

# Longer blocks make the self-test slower and find nothing more. It splits the prompt at shorter ones with the same
# remainder by flash-attn's 256 tokens, so that the same attention code runs.
_MAX_TEST_TOKENS = 1024
_FLASH_TOKENS = 256

TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
"""The error that rounding may cause when the prompt is split: root mean square of the difference of the logits over
that of the logits. A model that cannot be split shows 0.1 and more."""

ROUNDING = 1.2
"""The error that splitting may cause, as a multiple of what a change of the embeddings' last bit causes. Measured with
32 layers of bfloat16: 0.5 on one rank, 0.7 on four (their sums are rounded too)."""


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError, with the reasons, if a model's configuration rules out prefix reuse."""
    reasons = list(_reasons(model))
    if reasons:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be cached by prefix: {'; '.join(reasons)}")


def check_split(model: Any, ranks: RankGroup) -> None:
    """Raise unless a model is split over exactly these ranks, or whole on the only rank.

    ConfigError for the wrong ranks, UnsupportedModelError for a model that cannot be split this way.
    """
    size = getattr(model, "tp_size", None) or 1
    name = type(model).__name__
    if (getattr(getattr(model.config, "distributed_config", None), "pp_size", None) or 1) > 1:
        raise UnsupportedModelError(f"{name} is split by layers: no rank has the K and V of all of them")
    parts = [parameter for parameter in model.parameters() if hasattr(parameter, "placements")]
    if any(size == 1 or part.device_mesh.size() != size for part in parts):  # FSDP's mesh has its own ranks as well
        raise UnsupportedModelError(f"{name} has weights that are split, but not by tensor parallelism alone")
    if size != ranks.size:
        hint = "say ranks=TorchRanks.of_process_group()" if ranks.size == 1 else None
        raise ConfigError(f"{name} is split over {size} devices, but there are {ranks.size} ranks", hint=hint)
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or size
    if heads % size:
        raise UnsupportedModelError(f"{name} has {heads} heads of K and V, which cannot be split over {size} ranks")


def check_call(device_type: str) -> None:
    """Raise ConfigError if autocast is on: it computes K and V in another dtype than the namespace has."""
    if torch.is_autocast_enabled(device_type):
        raise ConfigError(
            f"autocast is on for {device_type}: K and V would not be the model's own",
            hint="leave it, and load the model in the dtype you want",
        )


def check_state(model: Any, state: ModelState) -> None:
    """Raise if K and V depend on more than a model's weights and settings.

    ConfigError in train mode. UnsupportedModelError for forward hooks and replaced forwards, except for those of the
    packages that load and run models.
    """
    name = type(model).__name__
    if state.training:
        where = state.training[0] if len(state.training) < len(list(model.modules())) else name
        raise ConfigError(f"{where} is in train mode, in which K and V may be random", hint="call model.eval() first")
    if state.hooks:
        raise UnsupportedModelError(
            f"{name} has {next(iter(state.hooks))}, which may change K and V", hint="remove it, or use a subclass"
        )
    if state.forwards:
        raise UnsupportedModelError(
            f"{name} has another forward than its classes': {next(iter(state.forwards))} was replaced",
            hint="use a subclass: its name is part of the namespace",
        )


def read_stable_state(model: Any) -> ModelState:
    """Return a model's state, with the paths marked as volatile that a forward pass changes by itself.

    Such paths are, for example, counters and tensors that each pass makes anew. Costs two passes over two tokens.
    Raises as `check_state` and `check_call`.
    """
    check_call(torch.device(model.device).type)
    check_state(model, read_state(model))
    probe_layout(model, block_size=1)  # the first pass may create attributes
    before = read_state(model)
    versions = _versions_of(before)
    probe_layout(model, block_size=1)
    after = read_state(model)
    check_state(model, after)
    written = {path for path, version in _versions_of(after).items() if versions.get(path, version) != version}
    after.volatile = frozenset(written.union(changed_paths(before, after)))
    return after


def _versions_of(state: ModelState) -> dict[str, int]:
    return {path: each._version for path, each in state.tensors.items() if not each.is_inference()}


def context_of(model: Any) -> int | None:
    """Return the length of a model's context, in tokens; None if its configuration does not say.

    A stretched rope allows more than `max_position_embeddings` in some configurations.
    """
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    stretched = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or limit))
        for rope in _ropes(config)
        if rope.get("rope_type") in _STRETCHED_ROPE and rope.get("factor")
    ]
    return max([limit, *stretched])


def check_block_size(model: Any, block_size: int) -> None:
    """Raise ConfigError if a block, in tokens, is longer than this model's context."""
    limit = context_of(model)
    if limit is not None and block_size > limit:
        raise ConfigError(
            f"block_size is {block_size} tokens, but the context of {type(model).__name__} is {limit}",
            hint=f"lower block_size; {min(256, limit)} suits this model",
        )


def probe_layout(model: Any, *, block_size: int, latent: AbstractContextManager[None] | None = None) -> BlockLayout:
    """Return the layout of a model's blocks, from one forward pass over two tokens.

    latent: the model's `LatentAttention`, for blocks of latents.
    Raises UnsupportedModelError if some layer's attention does not go through the registered function.
    """
    probe = _Probe(position_ids=torch.arange(2, device=model.device)[None])
    with torch.inference_mode(), use_tierkv_attention(model), latent or nullcontext():
        forward(model, torch.zeros(2, dtype=torch.int64, device=model.device), probe)
    if not probe.layers or sorted(probe.layers) != list(range(len(probe.layers))):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention layers that bypass the cache: only {sorted(probe.layers)} reach it"
        )
    dtypes = set(probe.dtypes.values())
    if len(dtypes) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} has K and V of several dtypes: {sorted(dtypes)}")
    return BlockLayout(
        block_size=block_size, dtype=dtypes.pop(), layers=tuple(probe.layers[i] for i in range(len(probe.layers)))
    )


def self_test(
    model: Any,
    layout: BlockLayout,
    compute: Callable[..., Tensor] | None = None,
    *,
    latent: AbstractContextManager[None] | None = None,
    measure: Callable[[Tensor, Tensor], float] | None = None,
) -> float:
    """Compare one pass over a prompt, by the model's own attention, with passes over its blocks through tierkv.

    compute: the forward pass that will run in place of the model's own modules, if another does. latent: the model's
    `LatentAttention`, for a layout of latents. measure: of the error; None is `relative_error`.
    Returns the relative error of the logits. Raises UnsupportedModelError if it is more than rounding, and if two equal
    passes differ, because a random difference looks like rounding. Costs three passes over 2 blocks and 3 tokens (at
    most about 2,000 tokens), and a fourth if the error is larger than a shallow model's rounding.
    """
    size = layout.block_size
    if size > _MAX_TEST_TOKENS:
        size = _MAX_TEST_TOKENS - _FLASH_TOKENS + size % _FLASH_TOKENS
        layout = replace(layout, block_size=size)
    length = min(2 * size + 3, context_of(model) or 1 << 30)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (length,), generator=generator).to(model.device)
    with torch.inference_mode():
        want = _own_logits(model, ids)
        if not _is_repeatable(model, ids, want):
            raise UnsupportedModelError(
                f"{type(model).__name__} fails the self-test: two equal passes differ, so its K and V are random"
            )
        with latent or nullcontext():
            got = _split_logits(model, ids, layout, compute or partial(forward, model))
    measure = measure or relative_error
    error, tolerance = measure(got, want), TOLERANCE.get(layout.dtype, 0.1)
    if error > tolerance:  # a deep model may round so much: then a change of a last bit has the same effect
        with torch.inference_mode(), nudged_embeddings(model, layout.dtype):
            nudged = _own_logits(model, ids)
        tolerance = max(tolerance, ROUNDING * measure(nudged, want))
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} fails the self-test: split at block borders its logits differ by {error:.1%}"
        )
    return error


def _reasons(model: Any) -> Iterator[str]:
    """Yield every reason against a model that its class and configuration give, found by a sweep of all model types."""
    config = model.config.get_text_config(decoder=True)
    if not getattr(type(model), "_supports_attention_backend", False):
        yield "its attention cannot be replaced"
    if getattr(type(model), "_is_stateful", False):
        yield "it keeps state that is not K and V of tokens"
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        yield "it is an encoder"
    other = set(getattr(config, "layer_types", None) or []) - _SAFE_LAYERS
    if other:
        yield f"layers of type {', '.join(sorted(other))}"
    kinds = {rope.get("rope_type") for rope in _ropes(config)}
    for kind in sorted(_LENGTH_DEPENDENT_ROPE & kinds):
        yield f"its rope depends on the prompt's length ({kind})"
    yield from _cache_reasons(model)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of a model's rope; some models have several, by kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(each for each in rope.values() if isinstance(each, dict))]


def _cache_reasons(model: Any) -> Iterator[str]:
    from transformers import DynamicCache

    try:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        yield f"its cache cannot be made from its configuration ({exc})"
        return
    if kinds - _SAFE_CACHES:
        yield f"cache layers of type {', '.join(sorted(kinds - _SAFE_CACHES))}"


@dataclass(slots=True, kw_only=True)
class _Probe:
    """Takes the place of an AttentionBatch and records the shapes of K, V and latents; its attention returns zeros."""

    position_ids: Tensor
    layers: dict[int, LayerLayout] = field(default_factory=dict)
    dtypes: dict[int, str] = field(default_factory=dict)

    def enter_layer(self, layer: int) -> None:
        if layer in self.layers:
            raise UnsupportedModelError(f"attention layer {layer} is called twice in one forward pass")

    def add_latent(self, layer: int, latent: Tensor) -> None:
        self.layers[layer] = LayerLayout.of_latent(latent.shape[-1])
        self.dtypes[layer] = str(latent.dtype).removeprefix("torch.")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers[layer] = LayerLayout(kv_heads=key.shape[1], k_dim=key.shape[-1], v_dim=value.shape[-1])
        self.dtypes[layer] = str(key.dtype).removeprefix("torch.")
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of one pass by the model's own attention; only the eager one supports soft-capping."""
    before = model.config.get_text_config()._attn_implementation
    has_softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if has_softcap:
        model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        if has_softcap:
            model.set_attn_implementation(before)
    return logits


def _is_repeatable(model: Any, ids: Tensor, logits: Tensor) -> bool:
    """Return whether another pass over the same tokens gives the same logits, to the bit.

    On a GPU the order of a sum may vary (`index_add_` of experts). Then two passes with deterministic algorithms count.
    """
    if torch.equal(_own_logits(model, ids), logits):
        return True
    if ids.device.type == "cpu":
        return False
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(True, warn_only=True)
            return torch.equal(_own_logits(model, ids), _own_logits(model, ids))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the root mean square of the difference over that of `want`."""
    return float((got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt())


@contextmanager
def nudged_embeddings(model: Any, dtype: str) -> Iterator[None]:
    """Make many of the embeddings' numbers differ in their last bit, for as long as the block runs.

    The change is computed from the numbers themselves, so all ranks of a split model make the same one.
    """
    half_bit = torch.finfo(getattr(torch, dtype)).eps / 2

    def nudge(module: Any, inputs: Any, output: Tensor) -> Tensor:
        numbers = output.double()
        return (numbers + numbers * half_bit * torch.sin(numbers * 1e6)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


def _split_logits(model: Any, ids: Tensor, layout: BlockLayout, compute: Callable[..., Tensor]) -> Tensor:
    """Return the logits of one pass per block, through a new pool whose blocks are used in reverse order."""
    size, length = layout.block_size, len(ids)
    pool = HotPool(layout, -(-length // size), model.device)
    table = list(range(pool.num_blocks))[::-1]
    parts: list[Tensor] = []
    with use_tierkv_attention(model):
        for start in range(0, length, size):
            stop = min(start + size, length)
            step = SequenceStep(block_table=table, num_past=start, num_new=stop - start)
            batch = build_batch(pool, [step], block_size=size, device=model.device)
            parts.append(compute(ids[start:stop], batch))
    return torch.cat(parts)
