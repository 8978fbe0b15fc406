"""Looks for races: random requests of several threads on pools far too small, every block checked by its pattern.

K and V of a token are a pattern of all tokens up to it, written and read back by the GPU: so a slot that is reused
too early, a copy that is read too soon and a hit on another prompt's bytes all show, whatever their cause.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

__all__ = ["Found", "hunt", "main"]

_NUM_THREADS = 6
_BLOCK_SIZE = 16


@dataclass(slots=True)
class Found:
    """What a hunt did and saw. wrong: checks that failed; errors: what was raised, in full."""

    steps: int = 0
    checked_blocks: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def main() -> None:
    """Hunt and print what was found; the exit code is 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-codec", choices=["raw", "windows"], default="raw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = hunt(
        num_steps=arguments.steps, seed=arguments.seed, warm_codec=arguments.warm_codec, device=arguments.device
    )
    print(
        f"{found.steps} steps, {found.checked_blocks} blocks checked, {found.wrong} wrong, {len(found.errors)} errors"
    )
    print(f"{time.perf_counter() - started:.1f} s, seed {arguments.seed}, {arguments.device}, {arguments.warm_codec}")
    if found.wrong or found.errors:
        print(*found.errors[:1], sep="\n")
        raise SystemExit(1)


def hunt(*, num_steps: int, seed: int, warm_codec: str, device: str) -> Found:
    """Run `num_steps` random steps on `_NUM_THREADS` threads and return what was seen; ends with `cache.check()`."""
    layout = BlockLayout.uniform(num_layers=4, block_size=_BLOCK_SIZE, kv_heads=4, head_dim=64, dtype="bfloat16")
    found = Found()
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(
            cold_path=Path(directory) / "store",
            block_size=_BLOCK_SIZE,
            hot_bytes=48 * layout.block_bytes,
            warm_bytes=40 * layout.block_bytes,
            cold_bytes=64 << 20,
            min_free_bytes=0,
            warm_codec=warm_codec,
            piece_tokens=_BLOCK_SIZE,
            num_io_threads=4,
        )
        with TierCache(config, namespace=Namespace(weights="race hunt", layout=layout), device=device) as cache:
            with cache.acquire([0]) as sequence:
                for num_tokens in (1, 100 * _BLOCK_SIZE):  # both sides get work
                    sequence.overlap.record(1e-6 * num_tokens, num_tokens=num_tokens)
            hunters = [_Hunter(cache, found, random.Random(f"{seed} {i}")) for i in range(_NUM_THREADS)]
            threads = [
                threading.Thread(target=hunter.run, args=(num_steps // _NUM_THREADS,), daemon=True)
                for hunter in hunters
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not found.errors:
                cache.check()
    return found


class _Hunter:
    """One thread's requests, each on a stream of its own where there is a GPU."""

    def __init__(self, cache: TierCache, found: Found, dice: random.Random) -> None:
        self._cache = cache
        self._found = found
        self._dice = dice
        self._stream = torch.cuda.Stream(cache.device) if cache.device.type == "cuda" else None
        self._running: list[Sequence] = []

    def run(self, num_steps: int) -> None:
        try:
            with torch.cuda.stream(self._stream):  # None is none, on a CPU
                for _ in range(num_steps):
                    self._step()
                    with self._found.lock:
                        self._found.steps += 1
                while self._running:
                    self._cache.release(self._running.pop())
        except BaseException:  # noqa: BLE001 - whatever it is, the hunt reports it
            with self._found.lock:
                self._found.errors.append(traceback.format_exc())

    def _step(self) -> None:
        dice, running = self._dice, self._running
        choice = dice.random()
        try:
            if choice < 0.35 or not running:
                running.append(self._start())
            elif choice < 0.6:
                self._decode(dice.choice(running))
            elif choice < 0.75:
                self._check(dice.choice(running))
            elif choice < 0.8:
                running.append(self._cache.fork(dice.choice(running)))
            elif choice < 0.97 or len(running) > 3:
                self._cache.release(running.pop(dice.randrange(len(running))))  # often in the middle: an abort
            elif choice < 0.98:
                self._cache.prefetch(self._prompt())
            else:
                self._cache.evict(dice.choice([Tier.HOT, Tier.WARM]), dice.randrange(1, 9))
        except CapacityError:
            while running:
                self._cache.release(running.pop())

    def _prompt(self) -> list[int]:
        dice = self._dice
        prompt = [dice.randrange(2) for _ in range(dice.randrange(1, 8)) for _ in range(_BLOCK_SIZE // 2)]
        return prompt + [dice.randrange(2) for _ in range(dice.randrange(1, 9))]

    def _start(self) -> Sequence:
        dice, cache = self._dice, self._cache
        sequence = cache.acquire(self._prompt(), overlap=dice.random() < 0.4)
        while True:
            piece = sequence.overlap.next_piece(wait=False)
            if piece:
                self._compute(sequence, piece.start, piece.stop)
                cache.commit(sequence, piece.stop)
            elif not sequence.overlap.is_loading:
                break
            elif dice.random() < 0.1:
                return sequence  # left to itself, and released later
            else:
                time.sleep(0)
        self._check(sequence)
        cache.commit(sequence, sequence.num_tokens, partial_block=dice.random() < 0.3)
        return sequence

    def _decode(self, sequence: Sequence) -> None:
        if sequence.overlap.is_loading:
            return
        first = sequence.num_tokens
        self._cache.append(sequence, [self._dice.randrange(2) for _ in range(self._dice.randrange(1, 20))])
        self._compute(sequence, first, sequence.num_tokens)
        self._cache.commit(sequence, sequence.num_tokens)

    def _compute(self, sequence: Sequence, first: int, last: int) -> None:
        sequence.wait_all()
        for view, want in self._views(sequence, first, last):
            view[0][view[1], view[2]] = want

    def _check(self, sequence: Sequence) -> None:
        """Compare every token's K and V of every layer with what its tokens say; queued like an attention's reads."""
        if sequence.overlap.is_loading:
            return
        for layer in range(self._cache.layout.num_layers):
            sequence.wait_layer(layer)
        same = [
            (view[0][view[1], view[2]] == want).all() for view, want in self._views(sequence, 0, sequence.num_tokens)
        ]
        wrong = int((~torch.stack(same)).sum())
        with self._found.lock:
            self._found.checked_blocks += len(sequence.block_table)
            self._found.wrong += wrong

    def _views(self, sequence: Sequence, first: int, last: int) -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
        """Return (pool view, block ids, offsets) and the values [tokens, 1, 1] that belong there, layer by layer."""
        hot, device = self._cache.hot, self._cache.device
        positions = range(first, last)
        blocks = torch.tensor([sequence.block_table[p // _BLOCK_SIZE] for p in positions], device=device)
        offsets = torch.tensor([p % _BLOCK_SIZE for p in positions], device=device)
        values = _pattern(sequence.token_ids[:last], 2 * self._cache.layout.num_layers)[first:]
        on_device = torch.from_numpy(values).to(device=device, dtype=hot.dtype)
        views: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = []
        for layer in range(self._cache.layout.num_layers):
            for part, pool in enumerate((hot.key_cache(layer), hot.value_cache(layer))):
                views.append(((pool, blocks, offsets), on_device[:, 2 * layer + part, None, None]))
        return views


def _pattern(token_ids: np.ndarray[Any, np.dtype[np.uint32]], lanes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return [tokens, lanes] whole numbers from 1 to 255, which bfloat16 holds: each from all tokens up to its own."""
    state = 0x9E3779B97F4A7C15
    rows: list[int] = []
    for token in token_ids.tolist():
        state = (state ^ (token + 1)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
        rows.append(state)
    shifts = np.arange(lanes, dtype=np.uint64) * np.uint64(7)
    mixed = (np.array(rows, dtype=np.uint64)[:, None] >> shifts % np.uint64(57)) & np.uint64(0xFF)
    values: np.ndarray[Any, np.dtype[np.float32]] = np.maximum(mixed, 1).astype(np.float32)
    return values


if __name__ == "__main__":
    main()
