"""Small request traces with the habits of real services, made from a seed; times in ms as in trace files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

BLOCK = 512
Fields = dict[str, Any]


class Maker:
    """Draws from one seed and numbers new blocks."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._numbers = count()
        self.requests: list[Fields] = []

    def blocks(self, number: int) -> list[int]:
        return [next(self._numbers) for _ in range(number)]

    def request(self, time_ms: float, blocks: list[int], tail_tokens: int = 0) -> None:
        tokens = len(blocks) * BLOCK + tail_tokens
        ids = [*blocks, *self.blocks(1 if tail_tokens else 0)]
        self.requests.append({"timestamp": int(time_ms), "input_length": tokens, "hash_ids": ids})

    def conversation(self, time_ms: float, prefix: list[int], turns: int, grow: int, pause_ms: float) -> None:
        """Ask again and again, each prompt a continuation of the one before."""
        blocks, tokens = list(prefix), len(prefix) * BLOCK
        for _ in range(turns):
            tokens += int(self.rng.expovariate(1 / grow)) + 50
            blocks += self.blocks(tokens // BLOCK - len(blocks))
            self.request(time_ms, blocks, tokens % BLOCK)
            time_ms += pause_ms * self.rng.lognormvariate(0, 0.8)

    def arrivals(self, number: int, mean_ms: float) -> Iterator[float]:
        time_ms = 0.0
        for _ in range(number):
            time_ms += self.rng.expovariate(1 / mean_ms)
            yield time_ms


def agents(make: Maker) -> None:
    """Many short steps of agents that share a few long tool descriptions."""
    tools = [make.blocks(make.rng.randint(6, 20)) for _ in range(4)]
    for time_ms in make.arrivals(120, 3000):
        make.conversation(time_ms, make.rng.choice(tools), 1 + int(make.rng.expovariate(1 / 8)), 900, 4500)


def system_prompts(make: Maker) -> None:
    """Single questions under system prompts of very different popularity."""
    prompts = [make.blocks(make.rng.randint(2, 30)) for _ in range(40)]
    weights = [1 / (rank + 1) for rank in range(40)]
    for time_ms in make.arrivals(1500, 300):
        (prompt,) = make.rng.choices(prompts, weights)
        make.request(time_ms, prompt + make.blocks(make.rng.randint(0, 5)), 100)


def scans(make: Maker) -> None:
    """Chats beside long documents that nobody asks about twice."""
    root = make.blocks(1)
    for time_ms in make.arrivals(400, 1200):
        if make.rng.random() < 0.35:
            make.request(time_ms, root + make.blocks(make.rng.randint(15, 100)))
        else:
            make.conversation(time_ms, root, 1 + int(make.rng.expovariate(1 / 4)), 1000, 55_000)


def zipf(make: Maker) -> None:
    """Questions about documents of Zipf's popularity."""
    documents = [make.blocks(make.rng.randint(3, 30)) for _ in range(400)]
    weights = [(rank + 1) ** -0.9 for rank in range(400)]
    for time_ms in make.arrivals(1500, 500):
        (document,) = make.rng.choices(documents, weights)
        make.request(time_ms, document + make.blocks(make.rng.randint(0, 1)), 200)


def drift(make: Maker) -> None:
    """Popularity that moves on: what was used last is what is used next."""
    documents = [make.blocks(make.rng.randint(3, 20)) for _ in range(300)]
    for at, time_ms in enumerate(make.arrivals(1500, 500)):
        newest = at * len(documents) // 1500
        make.request(time_ms, documents[max(0, newest - int(make.rng.expovariate(1 / 12)))], 100)


def loop(make: Maker) -> None:
    """The same documents round and round: LRU always evicts what comes next."""
    documents = [make.blocks(make.rng.randint(5, 20)) for _ in range(80)]
    for at in range(1200):
        make.request(500.0 * at, documents[at % len(documents)], 100)


def uniform(make: Maker) -> None:
    """Documents drawn evenly: the past says nothing, and no policy can know better than another."""
    documents = [make.blocks(make.rng.randint(3, 20)) for _ in range(150)]
    for time_ms in make.arrivals(1200, 500):
        make.request(time_ms, make.rng.choice(documents), 100)


def turnabout(make: Maker) -> None:
    """First only short documents are asked about again, later only long ones: what was learned first is wrong then."""
    short_ones = [make.blocks(2) for _ in range(60)]
    for at, time_ms in enumerate(make.arrivals(5000, 250)):
        is_first_part = at < 4000
        if make.rng.random() < 0.5:
            make.request(time_ms, make.rng.choice(short_ones) if is_first_part else make.blocks(2))
        else:
            long_one = make.blocks(20)
            make.request(time_ms, long_one)
            if not is_first_part:
                make.request(time_ms + 20_000, long_one)


HABITS: dict[str, Callable[[Maker], None]] = {
    habit.__name__: habit for habit in (agents, system_prompts, scans, zipf, drift, loop, uniform)
}


ONE_OFF: dict[str, Callable[[Maker], None]] = {"turnabout": turnabout}
"""What one test alone asks for."""


def make_requests(habit: str, seed: int = 0) -> list[Fields]:
    make = Maker(seed)
    (HABITS | ONE_OFF)[habit](make)
    return sorted(make.requests, key=lambda fields: fields["timestamp"])


def write_trace(path: Path, requests: list[Fields]) -> Path:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in requests))
    return path
