"""GraphedModel: forward passes of few new tokens, captured once as CUDA graphs and replayed.

With cached K and V, a GPU computes the few new tokens in less time than Python needs to launch the kernels; a replay
launches all at once. Each graph has static inputs for a number of sequences, of new tokens and of blocks in the table,
all rounded up. Padding writes into the pool's scratch block, which nothing reads. All graphs share one memory for what
lies between the layers, and one for the logits.
Source: the decode graphs of vLLM and nano-vLLM; extended to the few uncached tokens of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention import AttentionBatch, PlainModel, SequenceStep
from tierkv.engine.attention_cascade import CascadeShape
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.flash import MAX_SHORT_TOKENS
from tierkv.engine.backends.protocol import Planner
from tierkv.engine.cascade import SharedPrefix
from tierkv.engine.graph_inputs import MIN_TABLE_BLOCKS, GraphInputs, GraphShape, LoadEvents
from tierkv.engine.model_state import local_part
from tierkv.ranks.group import UNABLE, agree_min

__all__ = ["MAX_GRAPH_ROWS", "Compute", "GraphedModel", "graph_shape"]

_log = logging.getLogger(__name__)
_MIN_OWN_BLOCKS = 4

MAX_GRAPH_ROWS = 256
"""Sequences of a graph at most, and new tokens if there are several of a sequence: beyond it a pass takes longer than
the launch of its kernels."""


class Compute(Protocol):
    """A model's forward pass over packed tokens; returns logits [kept, vocabulary], in `out` if that is given."""

    def __call__(
        self, input_ids: Tensor, batch: AttentionBatch, logits_to_keep: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor: ...


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: GraphInputs
    logits: Tensor


class GraphedModel:
    """Replays forward passes of a model over a cache; returns None for passes that must run eagerly.

    compute: the model's forward pass; None for that of its own modules. attention: chooses the backends.
    decode_attention: attends the sequences with one new token of sparse passes, if there are such passes.
    A shape is captured at its second use, or by `capture_decoding`; none is while kernels are compiled. If a capture
    fails, such passes run eagerly from then on: on every rank of a split model if it fails on one, since padded passes
    and others do not meet in the same collective operations.
    """

    def __init__(
        self,
        model: Any,
        cache: TierCache,
        compute: Compute | None = None,
        *,
        attention: AttentionChoice,
        decode_attention: Planner | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._decode_attention = decode_attention
        self._cache = cache
        self._compute: Compute = compute or PlainModel(model)
        self._graphs: dict[GraphShape, _Graph] = {}
        self._seen: set[GraphShape] = set()
        self._is_usable = model.device.type == "cuda" and attention.can_capture(cache.layout, "cuda")
        self._is_mixed_usable = True
        self._logits: Tensor | None = None
        if self._is_usable:
            self._load_events = LoadEvents(cache.layer_groups, model.device)
            self._memory = torch.cuda.graph_pool_handle()
            # A capture needs a stream of the model's GPU; torch's own capture stream may be of another GPU.
            self._stream = torch.cuda.Stream(model.device)
            self._side = torch.cuda.Stream(model.device)  # for a cascade's own pass, beside the shared pass
            # A graph reads weights at their addresses, also if a caller moves them before the next check of the model.
            self._weights = [local_part(parameter.detach()) for parameter in model.parameters()]

    def run(
        self,
        steps: Sequence[SequenceStep],
        token_ids: Sequence[int],
        plan: Sequence[SharedPrefix] = (),
        *,
        is_sparse: bool = False,
    ) -> Tensor | None:
        """Return logits [sequences, vocabulary] of each sequence's last token, or None to run eagerly.

        token_ids: the new tokens of all steps, packed. plan: which steps read a prefix together. is_sparse: those
        with one new token read chosen pages. The next call overwrites the result.
        """
        if not self._is_usable:
            return None
        shape = graph_shape(steps, plan, block_size=self._cache.config.block_size)
        if shape is None:
            return None
        if is_sparse:
            shape = replace(shape, is_sparse=True)
        if shape.rest_tokens and not self._is_mixed_usable:
            return None
        if shape not in self._graphs:
            if shape not in self._seen:
                self._seen.add(shape)
                return None
            if self._attention.is_building:  # a graph would keep the backend that serves meanwhile
                return None
            if not self._capture(shape):
                return None
        found = self._graphs[shape]
        found.inputs.fill(steps, token_ids, plan)
        self._load_events.record([step.loads for step in steps if step.loads is not None])
        found.graph.replay()
        return found.logits[: len(steps)]

    def close(self) -> None:
        """Free all graphs and their memory; every pass runs eagerly from then on. May be called twice.

        A process group does not end while there are graphs of its collective operations.
        """
        self._is_usable = False
        self._graphs.clear()
        self._logits = None

    def capture_decoding(self, *, max_sequences: int, max_tokens: int) -> int:
        """Capture the decode steps of up to so many sequences of up to so many tokens each. Return how many graphs."""
        if not self._is_usable:
            return 0
        counts = {_sequences_of(count) for count in range(1, min(max_sequences, MAX_GRAPH_ROWS) + 1)}
        blocks = _blocks_of(max_tokens, self._cache.config.block_size)
        captured = 0
        for count in sorted(counts, reverse=True):  # the largest first: the others find room in its memory
            width = MIN_TABLE_BLOCKS
            while width <= blocks and self._is_usable:
                captured += self._capture(GraphShape(count, 1, width))
                if self._decode_attention is not None and self._is_usable:
                    captured += self._capture(GraphShape(count, 1, width, is_sparse=True))
                width *= 2
        return captured

    def _capture(self, shape: GraphShape) -> bool:
        """Capture a shape. Return whether every rank could."""
        captured = self._try_capture(shape)
        if captured is None and self._attention.is_building:
            return False
        if not self._is_captured_everywhere(captured is not None):
            if shape.rest_tokens:
                self._is_mixed_usable = False
            else:
                self._is_usable = False
            return False
        assert captured is not None
        self._graphs[shape] = captured
        return True

    def _is_captured_everywhere(self, is_captured: bool) -> bool:
        """Return whether all ranks have captured the same shape, the same on every rank."""
        if self._cache.ranks.size == 1:
            return is_captured
        return agree_min(self._cache.ranks, 1 if is_captured else UNABLE, topic=b"capture").lowest == 1

    def _try_capture(self, shape: GraphShape) -> _Graph | None:
        inputs = GraphInputs(
            shape,
            self._cache,
            self._model.device,
            self._load_events,
            self._side,
            attention=self._attention,
            decode_attention=self._decode_attention if shape.is_sparse else None,
        )
        graph = torch.cuda.CUDAGraph()
        try:
            # Rounded sizes may need other variants of the kernels than the eager passes: no capture may compile them.
            found = self._compute(inputs.token_ids, inputs.batch, inputs.last)
            if self._logits is None:
                self._logits = found.new_empty(MAX_GRAPH_ROWS + 1, found.shape[-1])
            out = self._logits[: shape.rows]
            # Other threads copy blocks meanwhile; only this mode allows that.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                inputs.batch.seen_layers.clear()
                self._compute(inputs.token_ids, inputs.batch, inputs.last, out)
        except RuntimeError as exc:
            _log.info("%s cannot be captured as a CUDA graph and runs eagerly: %s", type(self._model).__name__, exc)
            return None
        return _Graph(graph, inputs, out)


def graph_shape(steps: Sequence[SequenceStep], plan: Sequence[SharedPrefix], *, block_size: int) -> GraphShape | None:
    """Return the shape of the graph that serves a pass; None if the pass runs eagerly.

    Sequences are rounded up to 1, 2, 4 or a multiple of 8; new tokens to 1, 16, 32 or, of one sequence up to 512 of
    them, a multiple of 64: Python needs longer to launch such a pass than the GPU to compute it. One sequence that
    prefills beside decoding ones has graphs of its own: of 64, 128, 256 or 512 tokens, the others in steps of 32.
    """
    longest = max(step.num_past + step.num_new for step in steps)
    num_new = max(step.num_new for step in steps)
    if num_new > MAX_SHORT_TOKENS or len(steps) > MAX_GRAPH_ROWS:
        return None
    if len(steps) > 1 and steps[-1].num_new > 1 and all(step.num_new == 1 for step in steps[:-1]):
        rest = max(64, _power_of_two(num_new))
        count = _mixed_sequences_of(len(steps) - 1)
        return GraphShape(count, 1, _blocks_of(longest + rest, block_size), rest_tokens=rest)
    padded = _new_tokens_of(num_new)
    count = _sequences_of(len(steps)) if padded == 1 else _power_of_two(len(steps))
    if count > 1 and count * padded > MAX_GRAPH_ROWS:
        return None
    cascade = _cascade_shape(steps, plan, count, block_size) if plan else None
    return GraphShape(count, padded, _blocks_of(longest + padded, block_size), cascade)


def _sequences_of(count: int) -> int:
    """Round a number of decoding sequences up: by at most 7 of up to 128, by at most 15 of more."""
    if count <= 8:
        return _power_of_two(count)
    step = 8 if count <= 128 else 16
    return -(-count // step) * step


def _mixed_sequences_of(count: int) -> int:
    """Round a number of decoding sequences up by more: their rows cost little beside a prompt's tokens."""
    return _power_of_two(count) if count <= 8 else -(-count // 32) * 32


def _new_tokens_of(count: int) -> int:
    """Round the new tokens of each sequence up."""
    if count == 1:
        return 1
    return max(16, _power_of_two(count)) if count <= 64 else -(-count // 64) * 64


def _blocks_of(tokens: int, block_size: int) -> int:
    return max(MIN_TABLE_BLOCKS, _power_of_two(-(-tokens // block_size)))


def _cascade_shape(
    steps: Sequence[SequenceStep], plan: Sequence[SharedPrefix], sequences: int, block_size: int
) -> CascadeShape:
    """Return the sizes of a plan's tensors, rounded up so that few graphs serve many batches.

    Shared blocks are rounded up by an eighth at most, because flash-attn splits the table's width, not the prefix.
    """
    exact = CascadeShape.of(plan, [step.num_past + step.num_new for step in steps], block_size=block_size)
    eighth = max(1, _power_of_two(exact.shared_blocks) // 16)
    return CascadeShape(
        sequences=sequences,
        groups=_power_of_two(exact.groups),
        members=sequences if exact.is_whole else _power_of_two(exact.members),
        shared_blocks=-(-exact.shared_blocks // eighth) * eighth,
        own_blocks=max(_MIN_OWN_BLOCKS, _power_of_two(exact.own_blocks)),
        is_whole=exact.is_whole,
    )


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length() if count > 1 else 1
