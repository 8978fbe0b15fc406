"""The attention function through which any Hugging Face decoder reads and writes the paged cache.

It is registered under the name "tierkv". The model's layers call it with packed input: the new tokens of all sequences
in a row, [1, heads, T, dim]. An `AttentionBatch` in the model's keyword arguments describes the sequences. No mask
function is registered under that name, so Transformers builds no mask. Source: `paged|flash_attention_2` of Hugging
Face's continuous batching.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape, attend_cascade, can_cascade
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import AttentionPlan, BatchPart, LayerShape, PagedQuery, Planner, attend
from tierkv.engine.cascade import SharedPrefix
from tierkv.engine.sparse.decoding import MarkedSequence
from tierkv.errors import ConfigError, UnsupportedModelError

__all__ = [
    "AttentionBatch",
    "AttentionSwitch",
    "KVPool",
    "PlainModel",
    "SequenceStep",
    "attend_batch",
    "batch_of",
    "build_batch",
    "forward",
    "to_device",
    "use_attention",
    "use_tierkv_attention",
]

IMPLEMENTATION = "tierkv"
_UNSET: Any = object()
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("tierkv_batch", default=None)


class KVPool(Protocol):
    """Paged memory: of each layer [num_blocks, block_size, kv_heads, dim], with the stride of a whole block."""

    def key_cache(self, layer: int) -> Tensor: ...
    def value_cache(self, layer: int) -> Tensor: ...


class LayerLoads(Protocol):
    """A load of cached K and V that may still be in flight."""

    def wait_layer(self, layer: int) -> None: ...


@dataclass(slots=True, kw_only=True)
class SequenceStep:
    """One sequence's part of a forward pass: `num_new` tokens after `num_past` tokens with K and V.

    sequence, is_decoding: for sparse decode, see `sparse.decoding.SparseStep`.
    The engine changes it from pass to pass: 128 new objects would cost a decode step 0.1 ms.
    """

    block_table: Sequence[int]
    num_past: int
    num_new: int
    loads: LayerLoads | None = None
    sequence: MarkedSequence | None = None
    is_decoding: bool = False


@dataclass(slots=True, kw_only=True)
class AttentionBatch:
    """The metadata of one forward pass, for the attention of every layer.

    query_starts: [sequences + 1], where the new tokens of each sequence begin in the packed input.
    kv_lengths: tokens of each sequence after this pass; kv_starts_tensor is their running sum.
    block_table: [sequences, max blocks] int32, on the pool's device; host_table: the same on the CPU.
    max_new: the most new tokens of a sequence; is_even: all sequences have so many.
    block_ids, offsets: [T] int64, where K and V of each new token are written.
    cascade: the prefixes that sequences of a decode step read together, if any.
    parts: the decoding sequences and the others, if a batch has both and the decoding ones come first.
    attention, plans, kv_range, part: as in backends.protocol.Batch.
    """

    pool: KVPool
    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    host_table: npt.NDArray[np.int32]
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    attention: Planner
    block_ids: Tensor
    offsets: Tensor
    position_ids: Tensor
    loads: list[LayerLoads] = field(default_factory=list)
    cascade: CascadeBatch | None = None
    parts: tuple[BatchPart, ...] = ()
    kv_range: tuple[int, int] | None = None
    part: int = 0
    plans: dict[LayerShape, AttentionPlan] = field(default_factory=dict)
    seen_layers: set[int] = field(default_factory=set)

    def enter_layer(self, layer: int) -> None:
        """Check that a layer attends once, and make the current stream wait for its cached bytes."""
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
    attention: AttentionChoice | None = None,
    decode_attention: Planner | None = None,
) -> AttentionBatch:
    """Return the metadata of one forward pass over several sequences, in the order of the packed input.

    plan: which sequences read a prefix together; only for passes of one new token per sequence.
    attention: which backend attends; None: flash-attn where it can, else torch.
    decode_attention: which one attends the leading sequences with one new token, if that is another one.
    """
    counts = np.array([step.num_new for step in steps], dtype=np.int64)
    past = np.array([step.num_past for step in steps], dtype=np.int64)
    starts, lengths = np.concatenate(([0], counts.cumsum())), past + counts
    width = -(-int(lengths.max()) // block_size)
    tables = np.zeros((len(steps), width), dtype=np.int32)
    for row, step in enumerate(steps):
        used = step.block_table[:width]
        tables[row, : len(used)] = used
    rows = np.repeat(np.arange(len(steps)), counts)
    positions = np.arange(starts[-1]) + (past - starts[:-1])[rows]
    block_ids, offsets, position_ids = to_device(
        [tables[rows, positions // block_size].astype(np.int64), positions % block_size, positions], device
    )
    kv_starts = np.concatenate(([0], lengths.cumsum()))
    attention = attention or make_attention("auto", device)
    num_single = int((counts != 1).argmax())  # 0 if all have one new token, and if the first has more
    narrow = [tables.reshape(-1), starts, kv_starts, lengths]
    narrow += [starts[num_single:] - num_single, kv_starts[num_single:] - kv_starts[num_single]]
    table, *narrow_tensors = to_device([each.astype(np.int32) for each in narrow], device)
    batch = AttentionBatch(
        pool=pool,
        block_size=block_size,
        query_starts=starts.tolist(),
        kv_lengths=lengths.tolist(),
        block_table=table.view(len(steps), width),
        host_table=tables,
        query_starts_tensor=narrow_tensors[0],
        kv_starts_tensor=narrow_tensors[1],
        kv_lengths_tensor=narrow_tensors[2],
        max_new=int(counts.max()),
        is_even=bool((counts == counts[0]).all()),
        has_past=bool(past.any()),
        attention=(counts.max() == 1 and decode_attention) or attention,
        block_ids=block_ids,
        offsets=offsets,
        position_ids=position_ids[None],
        loads=[step.loads for step in steps if step.loads is not None],
        cascade=_build_cascade(plan, steps, lengths.tolist(), block_size, device) if plan else None,
    )
    if num_single:
        batch.parts = _parts_of(batch, num_single, (narrow_tensors[3], narrow_tensors[4]), past)
        batch.parts[0].attention = decode_attention or attention
    return batch


def _parts_of(
    batch: AttentionBatch, num_single: int, rest_starts: tuple[Tensor, Tensor], past: npt.NDArray[np.int64]
) -> tuple[BatchPart, ...]:
    """Return the leading sequences with one new token each, and the rest, of a batch.

    rest_starts: where new tokens, and K and V, of the rest begin, counted from its own first ones.
    """
    counts = np.diff(batch.query_starts)[num_single:]
    split, ends = batch.query_starts[num_single], batch.query_starts[num_single:]
    singles = BatchPart(
        tokens=slice(split),
        block_size=batch.block_size,
        query_starts=batch.query_starts[: num_single + 1],
        kv_lengths=batch.kv_lengths[:num_single],
        block_table=batch.block_table[:num_single],
        host_table=batch.host_table[:num_single],
        query_starts_tensor=batch.query_starts_tensor[: num_single + 1],
        kv_starts_tensor=batch.kv_starts_tensor[: num_single + 1],
        kv_lengths_tensor=batch.kv_lengths_tensor[:num_single],
        max_new=1,
        is_even=True,
        has_past=True,
        attention=batch.attention,
    )
    rest = BatchPart(
        tokens=slice(split, batch.query_starts[-1]),
        block_size=batch.block_size,
        query_starts=[end - split for end in ends],
        kv_lengths=batch.kv_lengths[num_single:],
        block_table=batch.block_table[num_single:],
        host_table=batch.host_table[num_single:],
        query_starts_tensor=rest_starts[0],
        kv_starts_tensor=rest_starts[1],
        kv_lengths_tensor=batch.kv_lengths_tensor[num_single:],
        max_new=batch.max_new,
        is_even=bool((counts == counts[0]).all()),
        has_past=bool(past[num_single:].any()),
        attention=batch.attention,
        part=1,
    )
    return singles, rest


def to_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Return flat arrays of one dtype as tensors on a device, by one copy that the caller does not wait for."""
    whole = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    parts: tuple[Tensor, ...] = whole.to(device).split([len(each) for each in arrays])
    return parts


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
    """Make a Hugging Face model attend through tierkv inside the `with` block."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    with use_attention(model, IMPLEMENTATION):
        yield


class AttentionSwitch:
    """Makes a Hugging Face model attend through tierkv inside each `with` block.

    In a microsecond, where `use_tierkv_attention` takes milliseconds. So between passes the model is free for others.
    """

    def __init__(self, model: Any) -> None:
        configs = _configs_of(model)
        with use_tierkv_attention(model):  # checks the model and sets the name in its configurations
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
    """Return every configuration from which a part of the model reads its attention's name, each once."""
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, Any] = {}
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return list(found.values())


@contextmanager
def use_attention(model: Any, implementation: str) -> Iterator[None]:
    """Make a Hugging Face model attend by another implementation inside the `with` block."""
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

    input_ids: [T] int64. logits_to_keep: [kept] positions in the packed input; None keeps all.
    A context variable holds the batch too, for the few models that drop unknown keyword arguments.
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
        logits = logits[logits_to_keep]  # the model ignores logits_to_keep
    return logits


def batch_of(options: dict[str, Any]) -> Any:
    """Return the batch of the present pass: of a module's keyword arguments, or this thread's. Raises ConfigError."""
    batch = options.get("tierkv") or _current.get()
    if batch is None:
        raise ConfigError(
            "a model with tierkv's attention was called without a tierkv batch",
            hint="another thread uses the model while a runner computes with it",
        )
    return batch


class PlainModel:
    """Runs a model's own modules; it must attend through tierkv meanwhile."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self, input_ids: Tensor, batch: AttentionBatch, logits_to_keep: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return logits [kept, vocabulary], in `out` if that is given."""
        logits = forward(self._model, input_ids, batch, logits_to_keep=logits_to_keep)
        return logits if out is None else out.copy_(logits)


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
    batch = batch_of({"tierkv": tierkv})
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    _check_call(module, query, attention_mask, options)
    batch.enter_layer(layer)
    if not isinstance(batch, AttentionBatch):
        return batch.attend(layer, query, key, value), None
    # The keyword counts even if None: Exaone4 sets module.sliding_window on full-attention layers too.
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
        layer=layer,
    )
    return attend_batch(paged, batch).unsqueeze(0), None


def attend_batch(paged: PagedQuery, batch: AttentionBatch, *, is_written: bool = False) -> Tensor:
    """Write K and V of the new tokens, unless they are written, and attend. Return [T, heads, v_dim], contiguous."""
    if batch.cascade is not None and can_cascade(paged):
        return attend_cascade(paged, batch.cascade, side=batch.cascade.side)
    if not is_written:
        paged.keys[batch.block_ids, batch.offsets] = paged.new_keys
        paged.values[batch.block_ids, batch.offsets] = paged.new_values
    return attend(paged, batch)


def _check_call(module: nn.Module, query: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for a call that paged attention would compute wrongly."""
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} makes an attention mask of its own")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise UnsupportedModelError(f"{type(module).__name__} attends to later tokens")
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} adds a position bias to its scores")
    if query.shape[0] != 1:
        raise ConfigError(f"tierkv's attention takes packed input, got a batch of {query.shape[0]}")
