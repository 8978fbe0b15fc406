"""A hunt for wrong answers: random calls of `generate`, each compared with plain `generate` in the same process.

Run it with a number of requests:  PYTHONPATH=.:tests/engines python tests/engines/generate_hunt.py 10000
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate_models import EOS, FAMILIES, VOCABULARY, make_generator
from torch import Tensor
from transformers import DynamicCache

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.placement import Buffers
from tierkv.integrations.transformers import PersistentCache, persistent_cache
from tierkv.integrations.transformers.recorder import Recorder
from tierkv.integrations.transformers.self_test import run_model

__all__ = ["hunt", "small_store"]

BLOCK_SIZES = (1, 4, 7, 16)


def small_store(path: Path | None, **options: Any) -> BlockStoreConfig:
    """Return the options of a small store for a test."""
    chosen: dict[str, Any] = {"warm_bytes": 4 << 20, "cold_bytes": 64 << 20, "min_free_bytes": 0, "num_io_threads": 2}
    return BlockStoreConfig(cold_path=path, **{**chosen, **options})


def hunt(folder: Path, num_requests: int, *, seed: int = 0) -> Counter[str]:
    """Make random requests over all families. Return counts; raises AssertionError for the first wrong answer."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    families = sorted(FAMILIES)
    num_done = 0
    while num_done < num_requests:
        family = families[counts["models"] % len(families)]
        block_size = draw.choice(BLOCK_SIZES)
        model = make_generator(family, seed=draw.randrange(3))
        bases = [[draw.randrange(1, VOCABULARY) for _ in range(120)] for _ in range(3)]
        counts["models"] += 1
        store = folder / f"{family}-{counts['models']}"
        for life in range(2):
            num_left = min(20 if life else 10, num_requests - num_done)
            config = small_store(store, warm_bytes=draw.choice([1 << 18, 4 << 20]))
            with persistent_cache(model, config=config, block_size=block_size, compute_or_load=False) as cache:
                for _ in range(num_left):
                    _compare(cache, draw, bases, f"{family} seed {seed} request {num_done}", counts)
                    num_done += 1
                stats = cache.stats()
            counts["requests"] += stats.num_calls
            counts["hit calls"] += stats.num_hit_calls
            counts["loaded tokens"] += stats.num_loaded_tokens
            counts["saved blocks"] += stats.num_saved_blocks
            counts.update({f"uncached: {reason}": count for reason, count in stats.uncached.items()})
    return counts


def _compare(
    cache: PersistentCache, draw: random.Random, bases: list[list[int]], name: str, counts: Counter[str]
) -> None:
    """Compare one random request with plain `generate`, and sometimes append the answer to a base."""
    model = cache.model
    inputs, options = _request(draw, bases)
    seed = draw.randrange(1 << 30)
    torch.manual_seed(seed)
    want = type(model).generate(model, **inputs, **options)
    torch.manual_seed(seed)
    got = model.generate(**inputs, **options)
    assert torch.equal(got, want), f"{name}: {options}\n{inputs}\n{got}\n{want}"
    counts["new tokens"] += got.shape[1] - inputs["input_ids"].shape[1]
    if draw.random() < 0.3:
        row = draw.randrange(len(got))
        pad = int((inputs["attention_mask"][row * len(inputs["input_ids"]) // len(got)] == 0).sum())
        _check_stored(cache, got[row, pad:], counts)
    if draw.random() < 0.3:  # the next turn of a conversation
        answer = [int(token) for token in got[draw.randrange(len(got))] if token not in (0, EOS)]
        bases[draw.randrange(len(bases))] = (answer + bases[0])[:160]


def _check_stored(cache: PersistentCache, sequence: Tensor, counts: Counter[str]) -> None:
    """Compare the stored blocks of a sequence with K and V of a plain pass over it."""
    keys = cache.store.keys(sequence.numpy())
    buffers = [np.zeros(cache.store.layout.block_bytes, dtype=np.uint8) for _ in range(cache.store.contains(keys))]
    load = cache.store.load(cache.store.reserve(keys[: len(buffers)]), Buffers(buffers))
    load.synchronize()
    recorder = Recorder(DynamicCache(config=cache.model.config), cache.model.device)
    recorder.attach()
    recorder.add_pass(sequence[None], torch.arange(len(sequence))[None])
    with torch.no_grad():
        run_model(cache.model, sequence[None], recorder.cache)
    size = cache.store.block_size
    for at in range(load.num_loaded):
        numbers = torch.from_numpy(buffers[at]).view(torch.float32)
        for layer in range(cache.store.layout.num_layers):
            for tensor in recorder.keys_and_values(layer, 0, at * size, (at + 1) * size):
                want = tensor.transpose(0, 1)
                got, numbers = numbers[: want.numel()].view(want.shape), numbers[want.numel() :]
                assert torch.allclose(got, want, atol=1e-3, rtol=1e-3), f"block {at} of {sequence.tolist()}"
    counts["compared blocks"] += load.num_loaded


def _request(draw: random.Random, bases: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the inputs and options of a random request."""
    num_rows = draw.choice([1, 1, 1, 2, 3])
    rows = []
    for _ in range(num_rows):
        start = draw.choice(bases)[: draw.randrange(0, 120)]
        rows.append([*start, *(draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(1, 9)))])
    if draw.random() < 0.3:
        rows = [draw.choice(rows) for _ in rows]
    length = max(map(len, rows)) + draw.choice([0, 0, 2])
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    options: dict[str, Any] = {"max_new_tokens": draw.choice([1, 2, 5, 12, 30]), "do_sample": draw.random() < 0.4}
    if options["do_sample"]:
        options |= {"temperature": 1.3, "top_k": draw.choice([0, 20])}
    options |= draw.choice([{}, {}, {"num_beams": draw.choice([2, 3])}])
    if draw.random() < 0.3 and ("num_beams" in options or options["do_sample"]):
        options["num_return_sequences"] = min(2, options.get("num_beams", 2))
    if draw.random() < 0.4:
        options |= {"eos_token_id": EOS, "pad_token_id": 0}
    if draw.random() < 0.15:
        options["prefill_chunk_size"] = draw.choice([3, 16])
    if draw.random() < 0.2:
        options["repetition_penalty"] = 1.2
    return inputs, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_requests", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, count in sorted(hunt(Path(folder), options.num_requests, seed=options.seed).items()):
            print(f"{count:9,}  {name}")


if __name__ == "__main__":
    main()
