"""The self-test of a model whose latents are cached: layer by layer, then of the logits.

In 16 bits, the logits alone say little of a model with experts: one rounding sends a token to other experts. So every
attention module is compared with its own class's forward pass on equal hidden states, where nothing is amplified.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch, forward
from tierkv.engine.mla.attention import MlaAttention
from tierkv.engine.mla.layers import MlaInput, MlaLayer
from tierkv.engine.mla.seams import ModuleSeams
from tierkv.engine.model_support import context_of, relative_error, self_test
from tierkv.errors import UnsupportedModelError
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

__all__ = ["LAYER_TOLERANCE", "check_latent", "layer_error", "token_error"]

LAYER_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""The relative error of one attention module that rounding may cause, root mean square. Measured with random models:
5e-7 in float32, 5e-3 in bfloat16; wrong heads, positions or scales show 0.05 to 1.8."""

_ROUNDING = 2.0
"""It may also be such a multiple of what a change of the hidden states' last bit causes in the same module."""

_WAYS = ("absorbed", "expanded")
_MAX_TOKENS = 1024  # of a block of the test: as `self_test`


class TestedLatent(Protocol):
    """What is tested: a LatentAttention."""

    layers: list[MlaLayer]
    attention: MlaAttention

    def __enter__(self) -> None: ...
    def __exit__(self, *exc_info: object) -> None: ...


def check_latent(model: Any, layout: BlockLayout, latent: TestedLatent) -> None:
    """Raise UnsupportedModelError unless a model over latents computes what it computes by itself, up to rounding.

    Costs two passes over at most 2 blocks and 3 tokens, and `self_test`.
    """
    for layer, error, tolerance in layer_error(model, layout, latent):
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__} fails the self-test: attention of layer {layer} over latents differs by "
                f"{error:.1%} from its own"
            )
    passes = 0

    def compute(input_ids: Tensor, batch: AttentionBatch) -> Tensor:
        nonlocal passes
        passes += 1
        with latent.attention.only(_WAYS[passes % 2]):  # by turns, so that both are tested
            return forward(model, input_ids, batch)

    self_test(model, layout, compute, latent=latent, measure=token_error)


def token_error(got: Tensor, want: Tensor) -> float:
    """Return the median over tokens of the relative error of their logits [tokens, vocabulary].

    A token that went to other experts does not count more than others.
    """
    difference = (got.double() - want.double()).square().mean(-1)
    return float((difference / want.double().square().mean(-1)).sqrt().median())


def layer_error(model: Any, layout: BlockLayout, latent: TestedLatent) -> list[tuple[int, float, float]]:
    """Return for each layer its number, its error over latents (the larger of both ways), and what is tolerated.

    The hidden states are those of one pass of the model over random tokens, which attends by the model's own classes.
    """
    size = min(layout.block_size, _MAX_TOKENS)
    length = min(2 * size + 3, context_of(model) or 1 << 30)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0)).to(model.device)
    tested = BlockLayout(block_size=size, dtype=layout.dtype, layers=layout.layers)
    comparison = _Comparison(latent.attention, tested, length, torch.device(model.device))
    with torch.inference_mode(), ModuleSeams(latent.layers, comparison.handler_of):
        model(input_ids=ids[None], use_cache=False)
    latent.attention.end_pass()
    return comparison.found


class _Comparison:
    """Runs each attention module three times: by its class, with hidden states nudged, and over latents in blocks."""

    def __init__(self, attention: MlaAttention, layout: BlockLayout, length: int, device: torch.device) -> None:
        self.found: list[tuple[int, float, float]] = []
        self._attention = attention
        self._layout = layout
        self._pool = HotPool(layout, -(-length // layout.block_size), device)
        self._table = list(range(self._pool.num_blocks))[::-1]
        self._length = length
        self._device = device

    def handler_of(self, layer: MlaLayer) -> Any:
        """Return what is called in place of a layer's module; it returns what the module's class does."""

        def handler(replaced: Any, hidden_states: Tensor, position_embeddings: Any = None, **options: Any) -> Any:
            result = replaced(hidden_states, position_embeddings=position_embeddings, **options)
            want = result[0][0]
            half_bit = torch.finfo(hidden_states.dtype).eps / 2
            wide = hidden_states.double()
            nudged = (wide + wide * half_bit * torch.sin(wide * 1e6)).to(hidden_states.dtype)
            near = replaced(nudged, position_embeddings=position_embeddings, **options)[0][0]
            new = layer.project(hidden_states, position_embeddings)
            error = max(relative_error(self._attend(layer, new, way), want) for way in _WAYS)
            rounding = max(LAYER_TOLERANCE.get(self._layout.dtype, 0.0), _ROUNDING * relative_error(near, want))
            self.found.append((layer.index, error, rounding))
            return result

        return handler

    def _attend(self, layer: MlaLayer, new: MlaInput, way: str) -> Tensor:
        """Return the module's result [tokens, hidden], computed block by block over the pool."""
        parts: list[Tensor] = []
        size = self._layout.block_size
        for start in range(0, self._length, size):
            span = slice(start, min(start + size, self._length))
            step = SequenceStep(block_table=self._table, num_past=start, num_new=span.stop - start)
            batch = build_batch(self._pool, [step], block_size=size, device=self._device)
            part = MlaInput(query=new.query[span], query_rope=new.query_rope[span], latent=new.latent[span])
            with self._attention.only(way):
                parts.append(self._attention.attend(layer, part, self._pool, batch))
        return layer.output(torch.cat(parts))[0]
