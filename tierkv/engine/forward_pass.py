"""ForwardPass: computes the new tokens of several sequences, as a replayed CUDA graph or eagerly."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.engine.attention import PlainModel, SequenceStep, build_batch, to_device
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.flash import why_not_flash
from tierkv.engine.backends.protocol import LayerShape
from tierkv.engine.cascade import CascadeCost, SharedPrefix, plan_cascade
from tierkv.engine.graphs import Compute, GraphedModel
from tierkv.engine.models import LoadedModel
from tierkv.engine.sparse.decoding import SparseDecoding
from tierkv.engine.sparse.options import SparseDecode
from tierkv.ranks.rank_sums import can_capture

__all__ = ["ForwardPass"]


class ForwardPass:
    """Runs a model over its cache, one pass at a time. The options are `Runner`'s.

    compute: the model's forward pass, fused or plain. attention: chooses the backends.
    graphs: None if every pass runs eagerly.
    sparse: None if every pass reads all that is cached.
    cascade_steps: the number of passes in which sequences read a shared prefix together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: TierCache,
        *,
        cascade: str,
        cascade_cost: CascadeCost | None,
        use_graphs: bool | None,
        compute: Compute | None = None,
        attention: AttentionChoice,
        sparse: SparseDecode | None = None,
    ) -> None:
        self.cascade_steps: int = 0
        self._compute: Compute = compute or PlainModel(loaded.model)
        self._cache = cache
        self.attention: AttentionChoice = attention
        self._device = torch.device(loaded.model.device)
        self.sparse: SparseDecoding | None = None
        if sparse is not None:
            self.sparse = SparseDecoding(sparse, cache.hot, dense=attention)
        self.graphs: GraphedModel | None = None
        if _wants_graphs(use_graphs, cache):
            self.graphs = GraphedModel(
                loaded.model,
                cache,
                self._compute,
                attention=attention,
                decode_attention=self.sparse.attention if self.sparse else None,
            )
        # Block ids differ between ranks, and so may plans: ranks would capture and replay graphs of other shapes.
        is_alone = self.graphs is None or cache.ranks.size == 1
        may_cascade = cascade == "auto" and is_alone and attention.can_cascade(self._device.type)
        self._cascade_cost = (cascade_cost or _cascade_cost(loaded, cache)) if may_cascade else None
        self._planned: tuple[list[int], list[list[int]]] = ([], [])  # whole blocks and tables of the last plan
        self._last_plan: tuple[SharedPrefix, ...] = ()

    def run(self, steps: list[SequenceStep], token_ids: list[int]) -> Tensor:
        """Return logits [sequences, vocabulary] of each sequence's last new token."""
        is_sparse = self.sparse is not None and self.sparse.begin(steps)
        plan = () if is_sparse else self._plan(steps)
        self.cascade_steps += bool(plan)
        replayed = self.graphs.run(steps, token_ids, plan, is_sparse=is_sparse) if self.graphs else None
        if replayed is not None:
            return replayed
        size, device = self._cache.config.block_size, self._device
        batch = build_batch(
            self._cache.hot,
            steps,
            block_size=size,
            device=device,
            plan=plan,
            attention=self.attention,
            decode_attention=self.sparse.attention if self.sparse and is_sparse else None,
        )
        ends = np.array(batch.query_starts[1:], dtype=np.int64) - 1
        ids, last = to_device([np.array(token_ids, dtype=np.int64), ends], device)
        return self._compute(ids, batch, last)

    def close(self) -> None:
        """Free the CUDA graphs, once the device has replayed the last one. May be called twice."""
        if self.graphs is not None:
            with suppress(RuntimeError):  # a device that has failed replays nothing any more
                self.wait()
            self.graphs.close()

    def wait(self) -> None:
        """Block until the device has finished all launched passes."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _plan(self, steps: list[SequenceStep]) -> tuple[SharedPrefix, ...]:
        """Return which sequences of a decode step read a prefix together; none if a sequence prefills."""
        if self._cascade_cost is None or len(steps) < 2 or any(step.num_new != 1 for step in steps):
            return ()
        size = self._cache.config.block_size
        tables, past = [step.block_table for step in steps], [step.num_past for step in steps]
        whole = [count // size for count in past]
        if (whole, tables) != self._planned:  # most steps complete no block
            self._planned = (whole, [list(table) for table in tables])
            self._last_plan = plan_cascade(tables, past, block_size=size, cost=self._cascade_cost)
        return self._last_plan


def _wants_graphs(wish: bool | None, cache: TierCache) -> bool:
    """Return whether to use graphs: of a split model if its collective operations can be captured."""
    if wish is not None:
        return wish
    return cache.ranks.size == 1 or (cache.device.type == "cuda" and can_capture())


def _cascade_cost(loaded: LoadedModel, cache: TierCache) -> CascadeCost | None:
    """Return the cost of attention in a layer of the model; None if its layers cannot share a prefix."""
    layers = cache.layout.layers
    if any(layer.k_dim != layer.v_dim for layer in layers):
        return None
    is_cuda = torch.device(loaded.model.device).type == "cuda"
    if is_cuda and any(why_not_flash(layer) for layer in LayerShape.of_layout(cache.layout, "cuda")):
        return None
    kv_heads = layers[0].kv_heads
    heads = (getattr(loaded.model.config.get_text_config(), "num_attention_heads", None) or 0) // cache.ranks.size
    make = CascadeCost.of_gpu if is_cuda else CascadeCost.of_cpu
    return make(
        heads=heads - heads % kv_heads or kv_heads,
        kv_heads=kv_heads,
        head_dim=layers[0].k_dim,
        token_bytes=cache.layout.token_bytes // cache.layout.num_layers,
    )
