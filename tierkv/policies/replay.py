"""Replays a request trace through the real index with a real policy; only the blocks' bytes are missing."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.index.eviction_policy import EvictionPolicy
from tierkv.index.index import Entry, Index
from tierkv.policies.traces import Request, Trace
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier, hash_block
from tierkv.values.prefill import PrefillModel

__all__ = ["Outcome", "replay_trace"]

_ROOT = bytes(16)
_TICK_S = 1e-3  # the index treats times less than 0.1 ms apart as equal


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hits of a policy on a trace. A block is a hit only if all blocks before it in its prompt are."""

    hits: int
    blocks: int
    seconds_saved: float

    @property
    def hit_rate(self) -> float:
        """Share of the trace's blocks that were hits."""
        return self.hits / self.blocks


class _Clock:
    """The arrival time of the current request; later than that of the one before."""

    def __init__(self) -> None:
        self.now = float("-inf")

    def __call__(self) -> float:
        return self.now

    def advance(self, time_s: float) -> None:
        self.now = max(time_s, self.now + _TICK_S)


def replay_trace(trace: Trace, policy: EvictionPolicy, capacity: int, prefill: PrefillModel) -> Outcome:
    """Serve a trace's requests one after the other from an empty cache of `capacity` blocks.

    A request pins the blocks that it finds, allocates and commits the others, and releases all. Then the policy evicts
    until `capacity` blocks are left. So the policy may also evict blocks that have just been computed, as Belady's
    bound may. The room of the running request is not counted.
    """
    longest = max(len(request.blocks) for request in trace.requests)
    clock = _Clock()
    index = Index(root=_ROOT, num_hot=capacity + longest, num_warm=0, policy=policy, clock=clock)
    hashes = [hash_block(_ROOT, number.to_bytes(8, "little")) for number in range(trace.num_unique)]
    padding = bytes(trace.block_size * TOKEN_BYTES)
    hits, seconds = 0, 0.0
    for request in trace.requests:
        clock.advance(request.time_s)
        num_found = _serve(index, request, trace.block_size, hashes, padding)
        hits += num_found
        seconds += prefill.seconds(0, min(num_found * trace.block_size, request.num_tokens)) if num_found else 0.0
        while (excess := index.hot.used_count - capacity) > 0:
            for entry in index.select_evictions(Tier.HOT, excess):
                index.detach(entry, Tier.HOT)
    return Outcome(hits, trace.num_blocks, seconds)


def _serve(index: Index, request: Request, block_size: int, hashes: list[BlockHash], padding: bytes) -> int:
    """Find a request's prefix, compute and commit the rest. Return how many blocks were found."""
    chain: list[tuple[BlockHash, BlockHash, bytes]] = []
    parent = _ROOT
    for at, number in enumerate(request.blocks):
        num_tokens = min(block_size, request.num_tokens - at * block_size)
        tokens = number.to_bytes(8, "little") + padding[8 : num_tokens * TOKEN_BYTES]
        chain.append((hashes[number], parent, tokens))
        parent = hashes[number]
    found: list[Entry] = []
    for block in chain:
        entry = index.get(*block)
        if entry is None:
            break
        found.append(entry)
    for entry in found:
        index.touch(entry)
        index.pin(entry, Tier.HOT)
    slots = index.hot.allocate(len(chain) - len(found))
    for block, slot in zip(chain[len(found) :], slots, strict=True):
        entry = index.insert(*block)
        assert entry is not None, "numbers of a trace have hashes that differ"
        index.attach(entry, Tier.HOT, slot)
    for entry in found:
        assert entry.block_id is not None, "what was found lies in the hot tier"
        index.unpin(Tier.HOT, entry.block_id)
    for slot in slots:
        index.unpin(Tier.HOT, slot)
    return len(found)
