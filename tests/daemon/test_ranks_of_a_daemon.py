"""The ranks of split models over one daemon: each has its own slice's blocks, and none waits for another model's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from daemon_process import BLOCK_BYTES, Start
from pattern_engine import PatternEngine, tiny_layout
from test_life_and_death import eventually
from torch import distributed

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

SIZE = 2
PROMPT = list(range(17))


@contextmanager
def open_ranks(socket: Path) -> Iterator[list[PatternEngine]]:
    """Open both ranks of one model, each with an engine whose K and V are its own."""
    config = CacheConfig(block_size=4, hot_bytes=16 * BLOCK_BYTES, socket=socket, compute_wait_s=60.0)
    votes = distributed.HashStore()
    with ExitStack() as opened:
        engines: list[PatternEngine] = []
        for rank in range(SIZE):
            namespace = Namespace(weights="w", layout=tiny_layout(), tp_rank=rank, tp_size=SIZE)
            ranks = TorchRanks(votes, rank=rank, size=SIZE, timeout_s=60)
            cache = opened.enter_context(TierCache(config, namespace=namespace, ranks=ranks))
            engines.append(PatternEngine(cache, seed=rank))
        yield engines
        for engine in engines:
            engine.cache.check()


def start_all(threads: ThreadPoolExecutor, engines: list[PatternEngine]) -> list[Sequence]:
    futures = [threads.submit(engine.start, PROMPT) for engine in engines]
    return [future.result(60) for future in futures]


def release_all(engines: list[PatternEngine], sequences: list[Sequence]) -> None:
    for engine, sequence in zip(engines, sequences, strict=True):
        engine.cache.release(sequence)
        engine.cache.flush()


def test_another_copy_of_a_split_model_finds_the_blocks_of_the_first_rank_by_rank(start_daemon: Start) -> None:
    socket = start_daemon().socket
    with open_ranks(socket) as first, open_ranks(socket) as second, ThreadPoolExecutor(SIZE) as threads:
        release_all(first, start_all(threads, first))
        found = start_all(threads, second)
        assert [sequence.cached_tokens[Tier.WARM] for sequence in found] == [16, 16]
        release_all(second, found)


def has_voted(engine: PatternEngine) -> bool:
    ranks = engine.cache.ranks
    assert isinstance(ranks, TorchRanks)
    return ranks._num_rounds > 0


def test_two_copies_of_a_split_model_never_wait_for_each_other_crosswise(start_daemon: Start) -> None:
    daemon = start_daemon()
    with open_ranks(daemon.socket) as left, open_ranks(daemon.socket) as right, ThreadPoolExecutor(4) as threads:
        early, late = [left[0], right[1]], [left[1], right[0]]
        running = [threads.submit(engine.start, PROMPT) for engine in early]
        eventually(lambda: all(map(has_voted, early)))  # each waits for its other rank
        running += [threads.submit(engine.start, PROMPT) for engine in late]
        found = [future.result(30) for future in running]
        assert daemon.status().claims == 0
        release_all([*early, *late], found)
