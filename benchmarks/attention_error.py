"""What a lossy codec does to attention: softmax attention over a block's K and V, against the exact ones.

Every token of the block is attended to, without a mask and without positions: K is compared as it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tierkv.errors import ShapeError
from tierkv.storage.codec import Bytes, iter_runs
from tierkv.storage.codecs import Codec
from tierkv.storage.codecs_lossy import Floats, float_format
from tierkv.storage.record import BlockInfo, Buffer, decode_record, encode_record
from tierkv.storage.record_header import as_bytes
from tierkv.values.layout import BlockLayout, Run

__all__ = ["AttentionError", "attention_error", "codec_error"]

_RANDOM_QUERIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionError:
    """Of the output vectors of all queries, heads and layers: |approximate - exact| / |exact|.

    max_logit_deviation: how far a logit, scaled by 1 / sqrt(k_dim), is off at most.
    """

    mean: float
    p99: float
    max: float
    max_logit_deviation: float


def attention_error(
    exact: Buffer,
    approximate: Buffer,
    *,
    layout: BlockLayout,
    num_tokens: int | None = None,
    queries: Sequence[Floats] | None = None,
    seed: int = 0,
) -> AttentionError:
    """Return how attention over one block differs from that over another one of the same layout.

    exact, approximate: layout.block_bytes each. num_tokens: only so many leading tokens of them.
    queries: for each layer [queries, heads, k_dim], heads a multiple of kv_heads; normal random ones where None.
    Raises ShapeError if the queries do not fit the layout, ConfigError for a dtype that no lossy codec takes.
    """
    count = layout.block_size if num_tokens is None else num_tokens
    both = [_unpack(as_bytes(block), layout, count) for block in (exact, approximate)]
    errors: list[npt.NDArray[np.float64]] = []
    deviation = 0.0
    for number, layer in enumerate(layout.layers):
        if queries is None:
            shape = (_RANDOM_QUERIES, layer.kv_heads, layer.k_dim)
            query = np.random.default_rng((seed, number)).standard_normal(shape)
        else:
            query = np.asarray(queries[number], dtype=np.float64)
        if query.ndim != 3 or query.shape[1] % layer.kv_heads or query.shape[2] != layer.k_dim:
            raise ShapeError(f"queries of shape {query.shape} for {layer}")
        exact_kv, near_kv = (runs[2 * number : 2 * number + 2] for runs in both)
        output, logits = _attend(query, *exact_kv)
        near_output, near_logits = _attend(query, *near_kv)
        norms = np.linalg.norm(output, axis=-1)
        distance = np.linalg.norm(near_output - output, axis=-1)
        errors.append((distance / np.where(norms > 0, norms, 1)).reshape(-1))
        deviation = max(deviation, float(np.abs(near_logits - logits).max()))
    found = np.concatenate(errors)
    return AttentionError(
        mean=float(found.mean()),
        p99=float(np.quantile(found, 0.99)),
        max=float(found.max()),
        max_logit_deviation=deviation,
    )


def codec_error(
    codec: Codec,
    block: Buffer,
    *,
    layout: BlockLayout,
    queries: Sequence[Floats] | None = None,
    seed: int = 0,
) -> AttentionError:
    """Return what a codec does to attention over a whole block: nothing, if it is a lossless one."""
    tokens = np.zeros(layout.block_size, dtype="<u4").tobytes()
    info = BlockInfo.first(tokens, namespace=bytes(16))
    record = encode_record(info, block, layout=layout, codec=codec)
    back = np.empty(layout.block_bytes, dtype=np.uint8)
    reason = decode_record(
        record.data, back, expected=info, layout=layout, lossy_codec=codec.name if codec.is_lossy else ""
    )
    assert reason is None
    return attention_error(block, back, layout=layout, queries=queries, seed=seed)


def _unpack(block: Bytes, layout: BlockLayout, num_tokens: int) -> list[npt.NDArray[np.float64]]:
    """Return K and V of each layer in turn, [heads, tokens, dim]."""
    if block.size != layout.block_bytes or not 0 < num_tokens <= layout.block_size:
        raise ShapeError(f"{num_tokens} tokens of a block of {block.size} bytes do not fit the layout")
    return [_as_numbers(values, run) for run, values in iter_runs(block, layout.runs, num_tokens)]


def _as_numbers(values: Bytes, run: Run) -> npt.NDArray[np.float64]:
    form = float_format(run.dtype)
    words = values.view(form.word)
    floats = np.empty(words.size, dtype=np.float32)
    form.widen(words, floats)
    numbers: npt.NDArray[np.float64] = floats.reshape(-1, run.heads, run.dim).transpose(1, 0, 2).astype(np.float64)
    return numbers


def _attend(
    query: npt.NDArray[np.float64], keys: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return outputs [kv_heads, group, queries, v_dim] and logits [kv_heads, group, queries, tokens]."""
    kv_heads, _, k_dim = keys.shape
    grouped = query.reshape(len(query), kv_heads, -1, k_dim).transpose(1, 2, 0, 3)
    logits = grouped @ keys[:, None].transpose(0, 1, 3, 2) / np.sqrt(k_dim)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ values[:, None], logits
