"""Block tables to compare on one sequence of operations: ours, a plain dict as the lower bound, peers' if installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from tierkv.index.index import Entry, Index
from tierkv.policies import DEFAULT_POLICY, make_policy
from tierkv.transfer.lookup import Lookup, look_up
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier, hash_block, iter_chain

__all__ = ["BLOCK_SIZE", "BlockTable", "DictTable", "IndexTable", "NanoVllmTable", "Prompts", "peers"]

BLOCK_SIZE = 256
ROOT = bytes(16)
_STEP = BLOCK_SIZE * TOKEN_BYTES


class BlockTable(Protocol):
    """The control plane of a cache: what it does for a request of whole blocks."""

    def prepare(self, prompt: bytes) -> Any:
        """Return a prompt of little-endian uint32 as this table takes it; not timed."""

    def match(self, prompt: Any) -> int:
        """Return how many leading blocks are cached."""

    def acquire(self, prompt: Any) -> Any:
        """Pin what is cached and take places for the rest, evicting as needed. Return a handle of the request."""

    def commit(self, request: Any) -> None:
        """Make every block of the request findable."""

    def release(self, request: Any) -> None:
        """Unpin all of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """A running request of ours: its prompt, its places, and the entries of those that were cached."""

    prompt: bytes
    slots: list[int]
    cached: list[Entry]


class IndexTable:
    """`Index`, `SlotPool` and `look_up`, used as the facade uses them."""

    def __init__(self, num_hot: int, num_warm: int = 1, *, policy: str = DEFAULT_POLICY) -> None:
        self.index = Index(
            root=ROOT, num_hot=num_hot, num_warm=num_warm, policy=make_policy(policy), clock=time.monotonic
        )

    def prepare(self, prompt: bytes) -> bytes:
        return prompt

    def match(self, prompt: bytes) -> int:
        return len(self._look_up(prompt).hot)

    def acquire(self, prompt: bytes) -> Request:
        index, pool = self.index, self.index.hot
        cached = self._look_up(prompt).hot
        slots = [entry.block_id for entry in cached if entry.block_id is not None]
        pool.pin_all(slots)
        missing = len(prompt) // _STEP - len(slots)
        if missing > pool.free_count:
            index.evict(index.select_evictions(Tier.HOT, missing - pool.free_count), Tier.HOT)
        slots += pool.allocate(missing)
        index.touch_all(cached)
        return Request(prompt, slots, cached)

    def commit(self, request: Request) -> None:
        parent = request.cached[-1].block_hash if request.cached else ROOT
        at = len(request.cached)
        named = list(iter_chain(parent, request.prompt[at * _STEP :], BLOCK_SIZE))
        added = self.index.extend(parent, named, request.slots[at:])
        assert len(added) == len(named)

    def release(self, request: Request) -> None:
        self.index.unpin_all(Tier.HOT, request.slots)

    def _look_up(self, prompt: bytes) -> Lookup:
        size = len(prompt) // TOKEN_BYTES
        return look_up(self.index, (), prompt, block_size=BLOCK_SIZE, max_tokens=size, hash_function=hash_block)


class DictTable:
    """The least that Python can do: one dict from hash to [token ids, place, users], evicted first in, first out.

    It compares token ids, but keeps no tree, no order of use and no policy: it evicts parents before children.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks: dict[BlockHash, list[Any]] = {}
        self._order: deque[BlockHash] = deque()
        self._free = list(range(num_blocks))

    def prepare(self, prompt: bytes) -> bytes:
        return prompt

    def match(self, prompt: bytes) -> int:
        return len(self._walk(prompt))

    def acquire(self, prompt: bytes) -> tuple[bytes, list[BlockHash], list[int]]:
        found = self._walk(prompt)
        for block_hash in found:
            self.blocks[block_hash][2] += 1
        missing = len(prompt) // _STEP - len(found)
        while len(self._free) < missing:
            oldest = self._order.popleft()
            if self.blocks[oldest][2]:
                self._order.append(oldest)
            else:
                self._free.append(self.blocks.pop(oldest)[1])
        return prompt, found, [self._free.pop() for _ in range(missing)]

    def commit(self, request: tuple[bytes, list[BlockHash], list[int]]) -> None:
        prompt, found, slots = request
        parent = found[-1] if found else ROOT
        for start, slot in zip(range(len(found) * _STEP, len(prompt), _STEP), slots, strict=True):
            tokens = prompt[start : start + _STEP]
            parent = xxhash.xxh3_128_digest(parent + tokens)
            self.blocks[parent] = [tokens, slot, 1]
            self._order.append(parent)
            found.append(parent)

    def release(self, request: tuple[bytes, list[BlockHash], list[int]]) -> None:
        for block_hash in request[1]:
            self.blocks[block_hash][2] -= 1

    def _walk(self, prompt: bytes) -> list[BlockHash]:
        digest, blocks = xxhash.xxh3_128_digest, self.blocks
        parent = ROOT
        found: list[BlockHash] = []
        for start in range(0, len(prompt), _STEP):
            tokens = prompt[start : start + _STEP]
            parent = digest(parent + tokens)
            block = blocks.get(parent)
            if block is None or block[0] != tokens:
                break
            found.append(parent)
        return found


class NanoVllmTable:
    """nano-vLLM's block manager. It never matches a prompt's last block; older ones do everything in `allocate`."""

    def __init__(self, num_blocks: int) -> None:
        self._manager = importlib.import_module("nanovllm.engine.block_manager").BlockManager(num_blocks, BLOCK_SIZE)
        self._sequence = importlib.import_module("nanovllm.engine.sequence").Sequence
        self._is_old = len(inspect.signature(self._manager.allocate).parameters) == 1

    def prepare(self, prompt: bytes) -> list[int]:
        token_ids: list[int] = np.frombuffer(prompt, dtype="<u4").tolist()
        return token_ids

    def match(self, prompt: list[int]) -> int:
        if not self._is_old:
            return int(self._manager.can_allocate(self._sequence(prompt)))
        request = self.acquire(prompt)  # there is no other way to ask
        num_cached = int(request.num_cached_tokens) // BLOCK_SIZE
        self.release(request)
        return num_cached

    def acquire(self, prompt: list[int]) -> Any:
        request = self._sequence(prompt)
        room = self._manager.can_allocate(request)
        self._manager.allocate(request, *([] if self._is_old else [room]))
        return request

    def commit(self, request: Any) -> None:
        if not self._is_old:
            request.num_scheduled_tokens = request.num_tokens - request.num_cached_tokens
            self._manager.hash_blocks(request)

    def release(self, request: Any) -> None:
        self._manager.deallocate(request)


def peers(num_blocks: int) -> Iterator[tuple[str, BlockTable | str]]:
    """Yield peers' names, each with its table, or with why there is none."""
    if importlib.util.find_spec("nanovllm") is None:
        yield "nano-vLLM", "not installed, so not measured"
    else:
        try:
            yield "nano-vLLM", NanoVllmTable(num_blocks)
        except (ImportError, AttributeError, TypeError) as exc:
            yield "nano-vLLM", f"installed, but its block manager cannot be used: {exc}"
    is_there = importlib.util.find_spec("vllm") is not None
    yield "vLLM", "installed, but there is no adapter for its block pool" if is_there else "not installed, not measured"


class Prompts:
    """Prompts of random token ids in the shapes that caches see, always the same for the same seed.

    single: every block is a chain of its own. long: chains of 128 blocks. sessions: half of them begin with one of
    512 system prompts of 1 to 16 blocks, a fifth branch off an earlier session at a random depth, the others share
    nothing; each adds 1 to 200 blocks, 24 on average.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def tokens(self, num_blocks: int) -> bytes:
        """Return the token ids of some blocks as little-endian uint32."""
        return self._rng.integers(0, 150_000, size=num_blocks * BLOCK_SIZE, dtype=np.uint32).tobytes()

    def iter_chains(self, shape: str) -> Iterator[bytes]:
        """Yield prompts without end."""
        if shape == "sessions":
            yield from self._iter_sessions()
        while True:
            yield self.tokens(1 if shape == "single" else 128)

    def _iter_sessions(self) -> Iterator[bytes]:
        systems = [self.tokens(int(self._rng.integers(1, 17))) for _ in range(512)]
        recent: deque[bytes] = deque(maxlen=256)
        while True:
            kind = self._rng.random()
            head = b""
            if kind < 0.5:
                head = systems[min(int(self._rng.zipf(1.3)), 512) - 1]
            elif kind < 0.7 and recent:
                earlier = recent[int(self._rng.integers(len(recent)))]
                head = earlier[: int(self._rng.integers(1, len(earlier) // _STEP + 1)) * _STEP]
            prompt = head + self.tokens(min(int(self._rng.geometric(1 / 24)), 200))
            recent.append(prompt)
            yield prompt
