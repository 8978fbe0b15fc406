"""DeepSeek-V2-Lite's shape with random weights: the latent of MLA in the cache against expanded K and V.

Bytes a token, a decode step of many long sequences and its attention alone, the load of a long prompt from the warm
tier, and how far the logits are apart. `--cpu` runs a small shape, to see that this script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.ttft import machine
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.mla.model import LatentAttention, choose_mla
from tierkv.engine.mla.self_test import layer_error
from tierkv.engine.model_support import probe_layout, relative_error
from tierkv.ranks.group import OneRank
from tierkv.storage.hot import HotPool
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["Row", "main"]

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LITE: dict[str, Any] = {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163_840,
    "rope_parameters": _YARN,
}
"""The configuration of DeepSeek-V2-Lite."""

_SMALL = LITE | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_BLOCK = 256  # tokens
_AIMS = {"bytes a token": 8.0, "decode step": 3.0, "warm load": 6.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of both layouts. ratio: expanded over latent; at_least: the aim for it."""

    what: str
    expanded: str
    latent: str
    ratio: float
    at_least: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One of both layouts of a model. attention: what puts it in place, besides tierkv's own attention."""

    layout: BlockLayout
    attention: Callable[[], AbstractContextManager[None]]


def main() -> None:
    """Run the benchmark and print its table; `--json FILE` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on a CPU, with a small shape and few tokens")
    parser.add_argument("--layers", type=int, help="of the model, in place of all")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--tokens", type=int, help="of each decoding sequence")
    parser.add_argument("--restored", type=int, help="tokens that are loaded from the warm tier")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    is_cpu = options.cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if is_cpu else "cuda")
    usual = (2, 1024, 2048, 3) if is_cpu else (16, 8192, 32_768, 10)
    sequences, tokens, restored, repeats = (
        given or default
        for given, default in zip(
            (options.sequences, options.tokens, options.restored, options.repeats), usual, strict=True
        )
    )
    model = _make_model(_SMALL if is_cpu else LITE, options.layers, device)
    choice = choose_mla(model, "latent", block_size=_BLOCK, ranks=OneRank())
    latent = choice.latent
    assert latent is not None
    described = {**machine(device), "kernel": latent.kernel, "dtype": str(model.dtype)}
    described |= {"layers": str(model.config.num_hidden_layers), "fallbacks": str(choice.fallbacks)}
    print("  ".join(f"{name}: {value}" for name, value in described.items()), flush=True)
    ways = {
        "expanded": _Way(layout=probe_layout(model, block_size=_BLOCK), attention=nullcontext),
        "latent": _Way(layout=choice.layout, attention=lambda: latent),
    }
    print(f"{'what':<58}{'expanded':>16}{'latent':>16}{'ratio':>8}  aim", flush=True)
    rows: list[Row] = []
    for row in _rows(model, latent, ways, device, sequences, tokens, restored, repeats):
        rows.append(row)
        aim = "" if row.at_least is None else f">= {row.at_least:g} {'met' if row.ratio >= row.at_least else 'MISSED'}"
        print(f"{row.what:<58}{row.expanded:>16}{row.latent:>16}{row.ratio:>8.2f}  {aim}", flush=True)
    for text in _differences(model, choice.layout, latent, ways, device):
        print(text, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": described, "rows": [asdict(row) for row in rows]}, indent=1))


def _rows(
    model: Any,
    latent: LatentAttention,
    ways: dict[str, _Way],
    device: torch.device,
    sequences: int,
    tokens: int,
    restored: int,
    repeats: int,
) -> Iterator[Row]:
    sizes = {name: float(way.layout.token_bytes) for name, way in ways.items()}
    yield _row("bytes a token", sizes, lambda value: f"{value:.0f}", aim="bytes a token")
    steps: dict[str, float] = {}
    attention: dict[str, float] = {}
    for name, way in ways.items():
        steps[name], attention[name] = _decode_s(model, latent, way, device, sequences, tokens, repeats)
    yield _row(f"decode step, {sequences} sequences of {tokens}", steps, _ms, aim="decode step")
    yield _row("attention modules of such a step", attention, _ms, aim="decode step")
    loads = {name: _warm_load_s(way.layout, device, restored, repeats) for name, way in ways.items()}
    yield _row(f"warm load of {restored // _BLOCK * _BLOCK} tokens", loads, _ms, aim="warm load")


def _row(what: str, found: dict[str, float], text: Callable[[float], str], *, aim: str) -> Row:
    return Row(
        what=what,
        expanded=text(found["expanded"]),
        latent=text(found["latent"]),
        ratio=found["expanded"] / found["latent"],
        at_least=_AIMS[aim] if torch.cuda.is_available() or aim == "bytes a token" else None,  # of an H200
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _make_model(shape: dict[str, Any], layers: int | None, device: torch.device) -> Any:
    changes = {"num_hidden_layers": layers} if layers else {}
    config = transformers.DeepseekV2Config(**shape | changes, eos_token_id=None, bos_token_id=None)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = transformers.DeepseekV2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _decode_s(
    model: Any, latent: LatentAttention, way: _Way, device: torch.device, sequences: int, tokens: int, repeats: int
) -> tuple[float, float]:
    """Return the median seconds of a decode step, and of its attention modules alone.

    Nothing is computed for the past: random numbers stand for it, whose attention takes as long.
    """
    blocks = -(-(tokens + repeats + 8) // _BLOCK)
    pool = HotPool(way.layout, sequences * blocks, device)
    for block in pool.blocks:
        block.normal_()
    places = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)).view(sequences, blocks)
    steps = [SequenceStep(block_table=table.tolist(), num_past=tokens, num_new=1) for table in places]
    ids = torch.arange(sequences, device=device)
    hidden = torch.randn(1, sequences, model.config.hidden_size, device=device, dtype=model.dtype)

    def batch_of_step() -> AttentionBatch:
        for step in steps:
            step.num_past += 1
        return build_batch(pool, steps, block_size=_BLOCK, device=device)

    def step() -> None:
        forward(model, ids, batch_of_step())

    def attention_alone() -> None:
        batch = batch_of_step()
        positions = model.model.rotary_emb(hidden, batch.position_ids)
        for layer in model.model.layers:
            layer.self_attn(hidden_states=hidden, position_embeddings=positions, attention_mask=None, tierkv=batch)

    with torch.inference_mode(), use_tierkv_attention(model), way.attention():
        found = _median_s(step, device, repeats)
        for each in steps:
            each.num_past = tokens
        alone = _median_s(attention_alone, device, repeats)
    latent.attention.end_pass()  # it holds the last batch, and so the pool
    pool.close()
    return found, alone


def _median_s(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    times: list[float] = []
    for repeat in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        if repeat > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_load_s(layout: BlockLayout, device: torch.device, tokens: int, repeats: int) -> float:
    """Return the median seconds from `acquire` of a prompt in the warm tier until all its layers have arrived."""
    blocks = tokens // _BLOCK
    config = CacheConfig(
        block_size=_BLOCK,
        hot_bytes=(blocks + 2) * layout.block_bytes,
        warm_bytes=(blocks + 8) * layout.block_bytes,
        min_free_bytes=0,
    )
    prompt = torch.randint(0, 1 << 16, (blocks * _BLOCK + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    times: list[float] = []
    with TierCache(config, namespace=Namespace(weights="random", layout=layout), device=device) as cache:
        sequence = cache.acquire(prompt)
        for block in sequence.block_table:
            cache.hot.blocks[block].normal_()
        cache.commit(sequence, len(prompt) - 1)
        cache.release(sequence)
        for repeat in range(repeats + 1):
            cache.flush()
            cache.evict(Tier.HOT)
            _wait(device)
            started = time.perf_counter()
            sequence = cache.acquire(prompt)
            for layer in range(layout.num_layers):
                sequence.wait_layer(layer)
            _wait(device)
            if repeat:
                times.append(time.perf_counter() - started)
            assert sequence.cached_tokens[Tier.WARM] == blocks * _BLOCK, sequence.cached_tokens
            cache.release(sequence)
    return statistics.median(times)


def _differences(
    model: Any, layout: BlockLayout, latent: LatentAttention, ways: dict[str, _Way], device: torch.device
) -> Iterator[str]:
    """Yield in words how far logits through the cache are from the model's own, and each attention module's results."""
    found = layer_error(model, layout, latent)
    worst = max(error for _, error, _ in found)
    yield f"attention modules over latents: relative error {worst:.2e} at most, {found[0][2]:.0e} or more tolerated"
    length = 2 * _BLOCK + 3
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode():
        want: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    for name, way in ways.items():
        pool = HotPool(way.layout, 3, device)
        parts: list[Tensor] = []
        with torch.inference_mode(), use_tierkv_attention(model), way.attention():
            for start in range(0, length, _BLOCK):
                new = min(_BLOCK, length - start)
                step = SequenceStep(block_table=[2, 0, 1], num_past=start, num_new=new)
                batch = build_batch(pool, [step], block_size=_BLOCK, device=device)
                parts.append(forward(model, ids[start : start + new], batch))
        got = torch.cat(parts)
        yield (
            f"logits of {length} tokens, {name}: difference {float((got - want).abs().max()):.2e} at most, where they "
            f"are up to {float(want.abs().max()):.1f}; relative, root mean square, {relative_error(got, want):.2e}"
        )


if __name__ == "__main__":
    main()
