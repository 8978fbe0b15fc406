"""Request traces with the habits of many kinds of service, made from a seed: what the policies are judged on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

from tierkv.policies.traces import Request, Trace

__all__ = ["BLOCK_TOKENS", "FAMILIES", "HELD_OUT", "TraceMaker", "make_trace"]

BLOCK_TOKENS = 512

Blocks = list[int]


class TraceMaker:
    """Draws from one seed. A prompt is a list of block ids; equal ids after equal blocks are the same block."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._ids = itertools.count()
        self._requests: list[tuple[float, int, Blocks]] = []

    def blocks(self, number: int) -> Blocks:
        """Return new blocks."""
        return [next(self._ids) for _ in range(number)]

    def some_blocks(self, mean: float) -> Blocks:
        """Return one new block or more, `mean` on average: many short texts, few long ones."""
        return self.blocks(1 + min(int(self.rng.expovariate(1 / max(mean - 0.5, 0.1))), 250))

    def request(self, time_s: float, blocks: Sequence[int]) -> None:
        """Add a prompt that ends behind `blocks` with some tokens of its own, less than a block."""
        tail = self.rng.randrange(1, BLOCK_TOKENS)
        self._requests.append((time_s, len(blocks) * BLOCK_TOKENS + tail, [*blocks, *self.blocks(1)]))

    def conversation(
        self, time_s: float, prefix: Sequence[int], turns: int, *, grow: float, pause: Callable[[], float]
    ) -> Blocks:
        """Ask `turns` times, each prompt the one before and `grow` blocks more. Return the last one's blocks."""
        blocks, size = list(prefix), float(len(prefix))
        for _ in range(turns):
            size += self.rng.expovariate(1 / grow) + 0.1
            blocks += self.blocks(int(size) - len(blocks))
            self.request(time_s, blocks)
            time_s += pause()
        return blocks

    def arrivals(self, number: int, mean_s: float, start_s: float = 0.0) -> Iterator[float]:
        """Yield the times of a Poisson process."""
        time_s = start_s
        for _ in range(number):
            time_s += self.rng.expovariate(1 / mean_s)
            yield time_s

    def turns(self, mean: float) -> int:
        """Return one turn or more."""
        return 1 + int(self.rng.expovariate(1 / mean))

    def spread(self, median_s: float, sigma: float) -> float:
        """Return a pause: half of them shorter than the median, some much longer."""
        return median_s * self.rng.lognormvariate(0, sigma)

    def popular(self, number: int, exponent: float) -> list[float]:
        """Return the cumulative weights of Zipf's law."""
        return list(itertools.accumulate((rank + 1) ** -exponent for rank in range(number)))

    def trace(self, name: str) -> Trace:
        """Return the requests in the order of their times."""
        numbers: dict[tuple[int, int], int] = {}
        requests: list[Request] = []
        for time_s, num_tokens, ids in sorted(self._requests, key=lambda request: request[0]):
            blocks: Blocks = []
            for block_id in ids:
                parent = blocks[-1] if blocks else -1
                blocks.append(numbers.setdefault((parent, block_id), len(numbers)))
            requests.append(Request(time_s, num_tokens, tuple(blocks)))
        return Trace(name, BLOCK_TOKENS, tuple(requests), len(numbers))


def agents(make: TraceMaker) -> None:
    """Agents whose prompts grow with each tool's answer; most tools answer in seconds, some wait for a person."""
    tools = [make.blocks(make.rng.randint(4, 24)) for _ in range(12)]
    popular = make.popular(12, 1.0)

    def pause() -> float:
        return make.spread(4, 0.7) if make.rng.random() < 0.85 else make.spread(180, 1.0)

    for time_s in make.arrivals(420, 9):
        (head,) = make.rng.choices(tools, cum_weights=popular)
        make.conversation(time_s, head, make.turns(9), grow=1.6, pause=pause)


def rag(make: TraceMaker) -> None:
    """Questions over retrieved documents behind one instruction; what is asked about drifts from day to day."""
    root = make.blocks(2)
    documents = [make.some_blocks(5) for _ in range(1500)]
    popular = make.popular(1500, 0.8)
    for at, time_s in enumerate(make.arrivals(5000, 2)):
        drawn = make.rng.choices(range(1500), cum_weights=popular, k=make.rng.randint(1, 4))
        chosen = [documents[(rank + at // 12) % 1500] for rank in dict.fromkeys(drawn)]
        make.request(time_s, [*root, *itertools.chain.from_iterable(chosen)])


def batches(make: TraceMaker) -> None:
    """Jobs of many items behind one long instruction, each job once, beside people's conversations."""
    for time_s in make.arrivals(45, 160):
        head = make.some_blocks(20)
        for item_s in make.arrivals(make.rng.randint(20, 150), make.rng.uniform(0.5, 6), time_s):
            make.request(item_s, head + make.some_blocks(4))
    root = make.blocks(3)
    for time_s in make.arrivals(500, 14):
        make.conversation(time_s, root, make.turns(4), grow=1.5, pause=lambda: make.spread(60, 0.8))


def returning_chats(make: TraceMaker) -> None:
    """Conversations that rest for minutes, and are often taken up again hours later."""
    root = make.blocks(1)
    for time_s in make.arrivals(900, 30):
        blocks, at_s = root, time_s
        while True:
            blocks = make.conversation(at_s, blocks, make.turns(3), grow=1.5, pause=lambda: make.spread(45, 0.9))
            if make.rng.random() < 0.55:
                break
            at_s += make.spread(5400, 1.0)


def scans(make: TraceMaker) -> None:
    """Conversations beside long documents, most of which nobody asks about twice."""
    root = make.blocks(2)
    for time_s in make.arrivals(1400, 10):
        if make.rng.random() < 0.4:
            document = make.blocks(make.rng.randint(20, 120))
            make.conversation(time_s, document, 2 if make.rng.random() < 0.1 else 1, grow=0.3, pause=lambda: 40.0)
        else:
            make.conversation(time_s, root, make.turns(4), grow=1.3, pause=lambda: make.spread(50, 0.8))


def tenants(make: TraceMaker) -> None:
    """Tenants with instructions of their own, each awake for a part of the day; three days of a short clock."""
    day_s = 4000.0
    for number in range(60):
        head = make.some_blocks(12)
        noon_s = make.rng.uniform(0, day_s)
        rate = 0.02 * (number + 1) ** -0.7
        for time_s in make.arrivals(int(3 * day_s * rate * 2.2), 1 / (2.2 * rate)):
            if make.rng.random() < max(0.0, math.cos(2 * math.pi * (time_s - noon_s) / day_s)):
                make.conversation(time_s, head, make.turns(3), grow=2.0, pause=lambda: make.spread(35, 0.9))


def completion(make: TraceMaker) -> None:
    """Code completion: a file up to the cursor, again every few seconds; edits change it from the cursor on."""
    for time_s in make.arrivals(220, 25):
        repository = make.blocks(make.rng.randint(1, 8))
        text = make.some_blocks(25)
        cursor = make.rng.randrange(len(text) + 1)
        for _ in range(make.turns(22)):
            time_s += make.spread(6, 1.0)
            if make.rng.random() < 0.2:
                cursor = make.rng.randrange(len(text) + 1)
            if make.rng.random() < 0.35 and cursor < len(text):
                text = text[:cursor] + make.blocks(1) + text[cursor + 1 :]
                cursor += 1
            make.request(time_s, repository + text[: max(cursor, 1)])


def branches(make: TraceMaker) -> None:
    """Search over reasoning steps: many branches grow from a trunk for a minute, the best of them go on."""
    for time_s in make.arrivals(160, 30):
        trunks = [make.some_blocks(8)]
        for _ in range(make.rng.randint(2, 6)):
            grown = []
            for trunk in trunks:
                for _ in range(make.rng.randint(2, 6)):
                    branch = trunk + make.some_blocks(1.5)
                    make.request(time_s + make.rng.uniform(0, 8), branch)
                    grown.append(branch)
            trunks = make.rng.sample(grown, min(3, len(grown)))
            time_s += make.spread(15, 0.4)


def sweeps(make: TraceMaker) -> None:
    """The same evaluation sets, again and again in the same order for each checkpoint, beside some chats."""
    sets = [[make.blocks(3) + make.some_blocks(6) for _ in range(make.rng.randint(60, 400))] for _ in range(5)]
    time_s = 0.0
    for _ in range(26):
        for prompt in make.rng.choice(sets):
            time_s += make.rng.expovariate(1 / 1.5)
            make.request(time_s, prompt)
    for time_s in make.arrivals(350, 30):
        make.conversation(time_s, [], make.turns(4), grow=1.5, pause=lambda: make.spread(50, 0.8))


def news(make: TraceMaker) -> None:
    """Texts that a crowd asks about soon after they appear, and hardly later."""
    for time_s in make.arrivals(700, 12):
        text = make.some_blocks(9)
        for _ in range(min(int(make.rng.paretovariate(0.9)), 150)):
            make.request(time_s, text + make.some_blocks(0.6))
            time_s += make.spread(40, 1.6)


def assistants(make: TraceMaker) -> None:
    """Short requests at a high rate under a few long instructions, now and then in a new version."""
    heads = [make.blocks(make.rng.randint(8, 40)) for _ in range(24)]
    popular = make.popular(24, 0.7)
    for time_s in make.arrivals(5200, 0.8):
        if make.rng.random() < 0.004:
            at = make.rng.randrange(24)
            keep = make.rng.randrange(len(heads[at]))
            heads[at] = heads[at][:keep] + make.blocks(len(heads[at]) - keep)
        (head,) = make.rng.choices(heads, cum_weights=popular)
        if make.rng.random() < 0.3:
            make.conversation(time_s, head, make.turns(2), grow=1.0, pause=lambda: make.spread(15, 0.8))
        else:
            make.request(time_s, head + make.blocks(make.rng.randint(0, 3)))


def migrations(make: TraceMaker) -> None:
    """A service whose load changes all at once: chats, then one-time documents, then popular ones, then chats."""
    for part in range(6):
        start_s, kind = part * 2500.0, part % 3
        if kind == 0:
            root = make.blocks(4)
            for time_s in make.arrivals(220, 11, start_s):
                make.conversation(time_s, root, make.turns(5), grow=1.5, pause=lambda: make.spread(50, 0.8))
        elif kind == 1:
            for time_s in make.arrivals(180, 14, start_s):
                text = make.blocks(make.rng.randint(10, 90))
                make.conversation(time_s, text, make.turns(0.7), grow=0.4, pause=lambda: make.spread(120, 0.5))
        else:
            texts = [make.some_blocks(12) for _ in range(150)]
            popular = make.popular(150, 0.9)
            for time_s in make.arrivals(800, 3, start_s):
                (text,) = make.rng.choices(texts, cum_weights=popular)
                make.request(time_s, text + make.blocks(make.rng.randint(0, 2)))


FAMILIES: dict[str, Callable[[TraceMaker], None]] = {
    habit.__name__: habit for habit in (agents, rag, batches, returning_chats, scans, tenants, completion, branches)
}
"""What the default policy was built with."""

HELD_OUT: dict[str, Callable[[TraceMaker], None]] = {
    habit.__name__: habit for habit in (sweeps, news, assistants, migrations)
}
"""What was looked at only when the default policy was finished."""


def make_trace(family: str, seed: int = 0) -> Trace:
    """Return a trace of a family."""
    make = TraceMaker(seed)
    (FAMILIES | HELD_OUT)[family](make)
    return make.trace(f"{family}-{seed}")
