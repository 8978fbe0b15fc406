"""Several threads on pools far too small, with and without failures injected everywhere: every byte is checked."""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pattern_engine import PatternEngine, tiny_warm

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, StoreError
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.offload import Offloading
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

NUM_THREADS = 6
ROUNDS = 150


def failing(call: Callable[..., Any], rate: float, dice: random.Random, reason: MissReason | None = None) -> Any:
    """Return `call`, which now fails at random: with a miss of that reason, or with a StoreError."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if dice.random() < rate:
            if reason:
                return reason
            raise StoreError("injected")
        return call(*arguments, **options)

    return wrapped


def one_request(engine: PatternEngine, dice: random.Random) -> None:
    cache = engine.cache
    prompt = [dice.randrange(2 if dice.random() < 0.3 else 3) for _ in range(dice.randrange(1, 30))]
    sequence = engine.start(prompt, partial_block=dice.random() < 0.5, overlap=dice.random() < 0.5)
    forked = None
    try:
        engine.decode(
            sequence, [dice.randrange(3) for _ in range(dice.randrange(1, 9))], partial_block=dice.random() < 0.3
        )
        if dice.random() < 0.2:
            forked = cache.fork(sequence)
            engine.decode(forked, [1, 2])
            engine.check(forked)
        if dice.random() < 0.1:
            cache.defragment([running for running in (sequence, forked) if running])
            engine.check(forked or sequence)
        engine.check(sequence)
    finally:
        for running in (sequence, forked):
            if running:
                cache.release(running)
    if dice.random() < 0.05:
        cache.evict(dice.choice([Tier.HOT, Tier.WARM]), 3)
    if dice.random() < 0.02:
        cache.blocks.set_limit(dice.randrange(32, 41))
    if dice.random() < 0.02:
        cache.blocks.set_offloading(dice.choice([None, Offloading(threshold=0.5)]))


def refusing(demote: Callable[..., list[bool]], rate: float, dice: random.Random) -> Callable[..., list[bool]]:
    """Return `demote`, which now finds at random that a block does not fit when it is compressed."""
    return lambda *args, **options: [fits and dice.random() >= rate for fits in demote(*args, **options)]


@pytest.mark.parametrize("warm_codec", ["raw", "windows"])
@pytest.mark.parametrize("has_failures", [False, True])
def test_concurrent_requests_see_only_their_own_bytes_and_leak_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_failures: bool, warm_codec: str
) -> None:
    layout, warm_bytes = tiny_warm(6, warm_codec)
    config = CacheConfig(
        cold_path=tmp_path / "store",
        block_size=4,
        hot_bytes=40 * layout.block_bytes,
        warm_bytes=warm_bytes,
        warm_codec=warm_codec,
        piece_tokens=4,
        cold_bytes=16 << 20,
        min_free_bytes=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors: list[str] = []
    with TierCache(config, namespace=Namespace(weights="w", layout=layout), device=device) as cache:
        if has_failures:
            dice, mover, cold = random.Random(0), cache._tiers.memory.mover, cache.cold
            assert cold
            for target, name, rate, reason in (
                (mover, "promote", 0.03, None),
                (mover, "demote", 0.03, None),
                (cold, "put", 0.05, None),
                (cold, "read_into", 0.03, MissReason.IO_ERROR),
                (cold, "read_into", 0.03, MissReason.CORRUPT),
                (cold, "find_longest_run", 0.03, None),
            ):
                setattr(target, name, failing(getattr(target, name), rate, dice, reason))
            if compression := cache._tiers.memory.compression:
                windows = compression.mover
                monkeypatch.setattr(windows, "promote", failing(windows.promote, 0.03, dice))
                monkeypatch.setattr(windows, "demote", failing(refusing(windows.demote, 0.1, dice), 0.03, dice))
        engine = PatternEngine(cache)

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(ROUNDS):
                try:
                    one_request(engine, dice)
                except CapacityError:
                    continue
                except BaseException:  # noqa: BLE001 - whatever it is, the test reports it
                    errors.append(traceback.format_exc())
                    return

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a request hangs"
        assert not errors, errors[0]
        cache.check()
        stats = cache.stats()
        # Whether a block is still warm when it is asked for again is a matter of timing, with pools so small.
        assert all(stats.tiers[tier].hits for tier in (Tier.HOT, Tier.COLD)), "a tier was never used"
        assert sum(stats.miss_reasons.values()) == stats.misses
