"""The attention function that lets any Hugging Face decoder read and write the paged cache.

It is registered under the name "tierkv" and called by the model's own layers with packed input: every
sequence's new tokens one behind the other, [1, heads, T, dim], positions restarting. One `AttentionBatch`, passed
through the model's keyword arguments, says which sequence is where.

No mask function is registered under that name: Transformers then builds no mask at all. Source: the way
Hugging Face's own continuous batching drives `paged|flash_attention_2`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape, attend_cascade, can_cascade
from tierkv.engine.attention_paged import PagedQuery, attend
from tierkv.engine.cascade import SharedPrefix
from tierkv.errors import ConfigError, UnsupportedModelError

__all__ = [
    "AttentionBatch",
    "AttentionSwitch",
    "KVPool",
    "SequenceStep",
    "build_batch",
    "forward",
    "use_attention",
    "use_tierkv_attention",
]

IMPLEMENTATION = "tierkv"
_UNSET: Any = object()
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("tierkv_batch", default=None)


class KVPool(Protocol):
    """Paged memory: per layer [num_blocks, block_size, kv_heads, dim], strided, one page a whole block apart."""

    def key_cache(self, layer: int) -> Tensor: ...
    def value_cache(self, layer: int) -> Tensor: ...


class Waits(Protocol):
    """Something whose cached K and V may still be on their way."""

    def wait_layer(self, layer: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """One sequence's part in a forward pass: `num_new` tokens after `num_past` that have K and V already."""

    block_table: Sequence[int]
    num_past: int
    num_new: int
    loads: Waits | None = None


@dataclass(slots=True, kw_only=True)
class AttentionBatch:
    """What the attention of every layer needs to know of one forward pass.

    query_starts: [sequences + 1] where each one's new tokens begin in the packed input. kv_lengths: tokens of
    each sequence after this pass; kv_starts_tensor is their running sum. block_table: [sequences, max blocks]
    int32, on the pool's device. max_new: new tokens of a sequence at most; is_even: all have as many.
    block_ids, offsets: [T] int64, where K and V of each new token are written.
    cascade: the prefixes that sequences of a decode step read together, if any do.
    """

    pool: KVPool
    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    block_ids: Tensor
    offsets: Tensor
    position_ids: Tensor
    loads: list[Waits] = field(default_factory=list)
    cascade: CascadeBatch | None = None
    seen_layers: set[int] = field(default_factory=set)

    def enter_layer(self, layer: int) -> None:
        """Check that a layer attends once, and wait for its cached bytes."""
        if layer in self.seen_layers:
            raise UnsupportedModelError(f"attention layer {layer} is called twice in one forward pass")
        self.seen_layers.add(layer)
        for load in self.loads:
            load.wait_layer(layer)


def build_batch(
    pool: KVPool,
    steps: Sequence[SequenceStep],
    *,
    block_size: int,
    device: torch.device,
    plan: Sequence[SharedPrefix] = (),
) -> AttentionBatch:
    """Return the metadata of one forward pass over several sequences, in the order of the packed input.

    plan: which of them read a prefix together; only where each has one new token.
    """
    query_starts = [0]
    positions: list[int] = []
    block_ids: list[int] = []
    offsets: list[int] = []
    for step in steps:
        span = range(step.num_past, step.num_past + step.num_new)
        query_starts.append(query_starts[-1] + step.num_new)
        positions += span
        block_ids += [step.block_table[position // block_size] for position in span]
        offsets += [position % block_size for position in span]
    kv_lengths = [step.num_past + step.num_new for step in steps]
    width = -(-max(kv_lengths) // block_size)
    padded = [[*step.block_table[:width], *[0] * (width - len(step.block_table))] for step in steps]
    return AttentionBatch(
        pool=pool,
        block_size=block_size,
        query_starts=query_starts,
        kv_lengths=kv_lengths,
        block_table=torch.tensor(padded, dtype=torch.int32, device=device),
        query_starts_tensor=torch.tensor(query_starts, dtype=torch.int32, device=device),
        kv_starts_tensor=torch.tensor([0, *accumulate(kv_lengths)], dtype=torch.int32, device=device),
        max_new=max(step.num_new for step in steps),
        is_even=len({step.num_new for step in steps}) == 1,
        has_past=any(step.num_past for step in steps),
        kv_lengths_tensor=torch.tensor(kv_lengths, dtype=torch.int32, device=device),
        block_ids=torch.tensor(block_ids, dtype=torch.int64, device=device),
        offsets=torch.tensor(offsets, dtype=torch.int64, device=device),
        position_ids=torch.tensor([positions], dtype=torch.int64, device=device),
        loads=[step.loads for step in steps if step.loads is not None],
        cascade=_build_cascade(plan, steps, kv_lengths, block_size, device) if plan else None,
    )


def _build_cascade(
    plan: Sequence[SharedPrefix],
    steps: Sequence[SequenceStep],
    kv_lengths: Sequence[int],
    block_size: int,
    device: torch.device,
) -> CascadeBatch:
    shape = CascadeShape.of(plan, kv_lengths, block_size=block_size)
    cascade = CascadeBatch(shape, block_size=block_size, scratch_block=0, device=device)
    cascade.fill(plan, [step.block_table for step in steps], kv_lengths)
    return cascade


@contextmanager
def use_tierkv_attention(model: Any) -> Iterator[None]:
    """Let a Hugging Face model attend through tierkv inside the block, and as before after it."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    with use_attention(model, IMPLEMENTATION):
        yield


class AttentionSwitch:
    """Lets a Hugging Face model attend through tierkv inside each `with` block, and as before outside of it.

    The same as `use_tierkv_attention`, in a microsecond instead of milliseconds, so that a runner can do it for each
    pass, and between two passes the model is everybody's: `model.generate` works, and so does a second runner.
    """

    def __init__(self, model: Any) -> None:
        configs = _configs_of(model)
        with use_tierkv_attention(model):  # which finds out, and checks, where the name belongs
            self._configs = [each for each in configs if each._attn_implementation_internal == IMPLEMENTATION]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [each._attn_implementation_internal for each in self._configs]
        for each in self._configs:
            each._attn_implementation_internal = IMPLEMENTATION

    def __exit__(self, *exc_info: object) -> None:
        for each, before in zip(self._configs, self._before, strict=True):
            each._attn_implementation_internal = before


def _configs_of(model: Any) -> list[Any]:
    """Return every configuration that a part of the model reads its attention's name from, each once."""
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return list(found.values())


@contextmanager
def use_attention(model: Any, implementation: str) -> Iterator[None]:
    """Let a Hugging Face model attend by another implementation inside the block; nothing to do if it does."""
    before = model.config.get_text_config()._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def forward(model: Any, input_ids: Tensor, batch: Any, *, logits_to_keep: Tensor | None = None) -> Tensor:
    """Run one forward pass over packed tokens. Return logits [kept, vocabulary].

    input_ids: [T] int64. logits_to_keep: [kept] positions in the packed input; all of them without it.
    The batch also travels in a context variable, for the few models that drop unknown keyword arguments.
    """
    options = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
    token = _current.set(batch)
    try:
        output = model(
            input_ids=input_ids[None], position_ids=batch.position_ids, use_cache=False, tierkv=batch, **options
        )
    finally:
        _current.reset(token)
    logits: Tensor = output.logits[0]
    if logits_to_keep is not None and logits.shape[0] != logits_to_keep.shape[0]:
        logits = logits[logits_to_keep]  # a model that knows no logits_to_keep
    return logits


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: Any = _UNSET,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tierkv: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write K and V of the new tokens, attend through the block table. Return ([1, T, heads, v_dim], None).

    query: [1, heads, T, dim]; key, value: [1, kv_heads, T, dim], rotated and not repeated.
    """
    batch = tierkv if tierkv is not None else _current.get()
    if batch is None:
        raise ConfigError(
            "a model with tierkv's attention was called without a tierkv batch",
            hint="another thread uses the model while a runner computes with it",
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    _check_call(module, query, attention_mask, options)
    batch.enter_layer(layer)
    if not isinstance(batch, AttentionBatch):
        return batch.attend(layer, query, key, value), None
    # The keyword counts even as None: Exaone4 sets module.sliding_window on full-attention layers too.
    window = getattr(module, "sliding_window", None) if sliding_window is _UNSET else sliding_window
    paged = PagedQuery(
        query=query[0].transpose(0, 1),
        new_keys=key[0].transpose(0, 1),
        new_values=value[0].transpose(0, 1),
        keys=batch.pool.key_cache(layer),
        values=batch.pool.value_cache(layer),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(window) if window else None,
        softcap=float(softcap) if softcap else None,
        sinks=s_aux,
    )
    if batch.cascade is not None and can_cascade(paged, batch.block_size):
        return attend_cascade(paged, batch.cascade, side=batch.cascade.side).unsqueeze(0), None
    paged.keys[batch.block_ids, batch.offsets] = paged.new_keys
    paged.values[batch.block_ids, batch.offsets] = paged.new_values
    return attend(paged, batch).unsqueeze(0), None


def _check_call(module: nn.Module, query: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for anything that the paged path would silently get wrong."""
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} makes an attention mask of its own")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise UnsupportedModelError(f"{type(module).__name__} attends to later tokens")
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} adds a position bias to its scores")
    if query.shape[0] != 1:
        raise ConfigError(f"tierkv's attention takes packed input, got a batch of {query.shape[0]}")
