"""What sparse decode does to a trained decoder on a real text: its attention in each layer, and its next tokens.

The text is the documentation of Python. All tokens before the last ones are computed exactly; the last ones are decoded
one by one, each given the text's own token, by exact and by sparse attention. So errors add up as in a request.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sparse_error import Attended
from tierkv.engine.attention import SequenceStep, build_batch, forward, use_attention, use_tierkv_attention
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import Planner
from tierkv.engine.model_support import probe_layout
from tierkv.engine.sparse.attention import SparseAttention
from tierkv.engine.sparse.bounds import KeyBounds
from tierkv.engine.sparse.options import SparseDecode
from tierkv.storage.hot import HotPool

__all__ = ["LogitRow", "decoder_attention", "load_decoder", "logit_rows"]

_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRow:
    """How far the logits of a budget are from the exact ones, over all decoded tokens.

    error: relative difference of the logits. kl: divergence of the next token's distribution, in nats, on average.
    same_best: the part of tokens whose most likely next token is the same. perplexity: of the text's own tokens.
    """

    budget: float
    page: int
    tokens: int
    error: float
    kl: float
    same_best: float
    perplexity: float


def load_decoder(path: Path, tokens: int, device: torch.device) -> tuple[Any, list[int]]:
    """Return a Transformers decoder, and the first `tokens` token ids of the text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    text = "\n".join(pydoc_data.topics.topics.values())[: tokens * 8]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    assert len(ids) == tokens, f"the text has only {len(ids)} tokens"
    return model, ids


def decoder_attention(model: Any, ids: Sequence[int], *, num_queries: int, num_layers: int) -> list[Attended]:
    """Return what the last token of several prefixes attends to, in several layers. Prefixes are whole blocks."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    count = model.config.num_hidden_layers
    layers = sorted({round(at * (count - 1) / max(1, num_layers - 1)) for at in range(num_layers)})

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            kept[module.layer_idx] = (query[0], key[0], value[0])
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("tierkv_recorded", record)
    with torch.inference_mode(), use_attention(model, "tierkv_recorded"):
        model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    found: list[Attended] = []
    for layer in layers:
        query, key, value = (each.transpose(0, 1).float() for each in kept[layer])
        for back in range(num_queries):
            length = (len(ids) // _BLOCK - back) * _BLOCK
            found.append(Attended("a decoder", query[length - 1 : length], key[:length], value[:length]))
    return found


def logit_rows(
    model: Any, ids: Sequence[int], *, decoded: int, budgets: Sequence[float], pages: Sequence[int]
) -> Iterator[LogitRow]:
    """Yield a row for exact attention (budget 1), and for each budget and page size."""
    device = torch.device(model.device)
    layout = probe_layout(model, block_size=_BLOCK)
    pool = HotPool(layout, -(-len(ids) // _BLOCK), device)
    dense = make_attention("auto", device)
    table = list(range(pool.num_blocks))
    past = len(ids) - decoded

    def compute(start: int, stop: int, planner: Planner | None) -> Tensor:
        step = SequenceStep(block_table=table, num_past=start, num_new=stop - start)
        batch = build_batch(pool, [step], block_size=_BLOCK, device=device, attention=dense, decode_attention=planner)
        last = torch.tensor([stop - start - 1], device=device)
        return forward(model, torch.tensor(ids[start:stop], device=device), batch, logits_to_keep=last)[0]

    def decode(planner: Planner | None, bounds: KeyBounds | None) -> tuple[Tensor, Tensor]:
        sequence = _Private()
        logits: list[Tensor] = []
        for at in range(past, len(ids)):
            step = SequenceStep(block_table=table, num_past=at, num_new=1)
            if bounds is not None:
                bounds.update([(sequence, step)])
            logits.append(compute(at, at + 1, planner))
        stacked = torch.stack(logits).double()
        return stacked.log_softmax(-1), stacked

    with torch.inference_mode(), use_tierkv_attention(model):
        for start in range(0, past, 1024):
            compute(start, min(start + 1024, past), None)
        exact = decode(None, None)
        yield _row(1.0, 0, exact, exact, ids[past + 1 :])
        for page in pages:
            for budget in budgets:
                counts = SparseDecode(budget=budget, min_tokens=1, page_tokens=page).counts(_BLOCK)
                bounds = KeyBounds(pool, counts)
                found = decode(SparseAttention(counts, bounds, dense), bounds)
                yield _row(budget, page, found, exact, ids[past + 1 :])


def _row(
    budget: float, page: int, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], following: Sequence[int]
) -> LogitRow:
    """Compare log-probabilities and logits [decoded, vocabulary]. following: the text's token after each but one."""
    near, exact = got[0], want[0]
    own = near[: len(following)].gather(1, torch.tensor(following, device=near.device)[:, None])
    return LogitRow(
        budget=budget,
        page=page,
        tokens=near.shape[0],
        error=float((got[1] - want[1]).norm() / want[1].norm()),
        kl=float((exact.exp() * (exact - near)).sum(-1).mean()),
        same_best=float((near.argmax(-1) == exact.argmax(-1)).double().mean()),
        perplexity=math.exp(-float(own.mean())),
    )


class _Private:
    """A sequence without registered blocks."""

    chain: tuple[bytes, ...] = ()

    def wait_all(self) -> None:
        """Do nothing: its K and V are there."""
