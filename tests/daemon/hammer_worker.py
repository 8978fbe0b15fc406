"""One of the clients that hammer a daemon: `python hammer_worker.py KIND SOCKET SECONDS SEED`; 0 if all was well.

It works for so long, and at least so much that on a slow machine it has met the others' blocks.

raw: over the protocol, each block's bytes a function of all its tokens. cache: a TierCache with a pattern for a model.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import xxhash
from raw_client import LAYOUT, NAMESPACE, connect

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import (
    NO_SLOT,
    Chain,
    EndClaim,
    Fetch,
    Fetched,
    Found,
    Match,
    Publish,
    Published,
    Release,
    Reserve,
    Reserved,
)
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError
from tierkv.storage.warm import Slab
from tierkv.values.block import hash_block, iter_chain

MIN_REQUESTS = 50
STEP = LAYOUT.block_size * 4


def random_prompt(dice: random.Random) -> bytes:
    return np.array([dice.randrange(2) for _ in range(dice.randrange(1, 40))], dtype="<u4").tobytes()


def pattern(prefix: bytes) -> np.ndarray:
    """Return the bytes of the block at the end of a prefix."""
    seed = xxhash.xxh3_64_digest(prefix)
    return np.resize(np.frombuffer(seed, dtype=np.uint8), LAYOUT.block_bytes)


def one_request(client: DaemonClient, slots: np.ndarray, tokens: bytes) -> int:
    hashes = [h for h, _ in iter_chain(NAMESPACE.digest, tokens, LAYOUT.block_size)]
    ask = Match(hashes=b"".join(hashes), tokens=tokens, lease=True, wants_claim=True)
    found = client.call(ask, Found)
    held = array("I")
    num_read = 0
    for at, slot in enumerate(split_numbers(found.slots)):
        if slot == NO_SLOT:
            fetched = split_numbers(client.call(Fetch(cursor=found.cursor, first=at, count=1), Fetched).slots)
            if not fetched:
                break
            slot = fetched[0]
        held.append(slot)
        assert np.array_equal(slots[slot], pattern(tokens[: (at + 1) * STEP])), f"block {at} is not its own"
        num_read += 1
    if found.partial_block and found.partial_block.slot != NO_SLOT:
        held.append(found.partial_block.slot)
        prefix = tokens[: len(split_numbers(found.slots)) * STEP] + found.partial_block.tokens
        assert np.array_equal(slots[found.partial_block.slot], pattern(prefix)), "a partial block is not its own"
    client.post(Release(slots=held.tobytes(), cursors=array("I", [found.cursor] if found.cursor else []).tobytes()))
    if len(tokens) % STEP:
        hashes.append(hash_block(hashes[-1] if hashes else NAMESPACE.digest, tokens[len(hashes) * STEP :]))
    chain = Chain(b"".join(hashes), tokens, array("I", range(len(hashes))).tobytes())
    given = client.call(Reserve(chains=[chain]), Reserved).chains[0]
    for at, slot in zip(split_numbers(given.numbers), split_numbers(given.slots), strict=True):
        slots[slot] = pattern(tokens[: (at + 1) * STEP])
    if given.slots:
        client.call(Publish(slots=given.slots), Published)
    if found.claim:
        client.post(EndClaim(claim=found.claim))
    return num_read


def hammer_raw(socket: Path, until: float, dice: random.Random) -> int:
    num_read = num_requests = 0
    while time.monotonic() < until or num_requests < MIN_REQUESTS:
        try:
            with connect(socket) as client:
                slab = Slab.attach(client.take_descriptor(), client.welcome.slab_bytes)
                slots = slab.slots(LAYOUT.block_bytes)
                for _ in range(dice.randrange(1, 400)):
                    num_read += one_request(client, slots, random_prompt(dice))
                    num_requests += 1
                    if time.monotonic() > until and num_requests >= MIN_REQUESTS:
                        break
        except DaemonError:
            time.sleep(0.05)
    return num_read


def hammer_cache(socket: Path, until: float, dice: random.Random) -> int:
    from pattern_engine import PatternEngine

    from tierkv.cache import TierCache
    from tierkv.config import CacheConfig
    from tierkv.values.namespace import Namespace

    config = CacheConfig(
        socket=socket, block_size=4, hot_bytes=12 * LAYOUT.block_bytes, compute_wait_s=0.2, daemon_timeout_s=1.0
    )
    with TierCache(config, namespace=Namespace(weights="cache", layout=LAYOUT)) as cache:
        engine = PatternEngine(cache)
        num_requests = 0
        while time.monotonic() < until or num_requests < MIN_REQUESTS:
            num_requests += 1
            prompt = [dice.randrange(2) for _ in range(dice.randrange(1, 30))]
            sequence = engine.start(prompt, partial_block=dice.random() < 0.3)
            engine.check(sequence)
            cache.release(sequence)
        cache.check()
        return cache.stats().hits


if __name__ == "__main__":
    kind, path, seconds, seed = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    print("ready", flush=True)
    work = hammer_raw if kind == "raw" else hammer_cache
    print(work(path, time.monotonic() + seconds, random.Random(seed)))
