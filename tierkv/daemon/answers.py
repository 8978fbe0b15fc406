"""Checks every answer of the daemon against its request. No other place decides whether to trust the daemon's numbers.

A daemon that is broken, of another build, or no daemon at all may answer anything. Its numbers become indices into
memory, lengths and token counts. So `DaemonClient.call` returns only answers that have passed here, and its callers
need no check of their own. The cost of a check does not grow with the numbers in an answer.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tierkv.daemon.eviction_messages import EvictedBlocks, Evictions, EvictionsSince
from tierkv.daemon.messages import (
    MOST_COUNT,
    NO_SLOT,
    ChainAnswer,
    Count,
    Evict,
    Fetch,
    Fetched,
    Found,
    FoundPartial,
    Hello,
    LoadState,
    Match,
    Message,
    Pin,
    Prefetch,
    Publish,
    Published,
    Reserve,
    Reserved,
    Saved,
    StatusReport,
    Welcome,
)
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import ConfigError, DaemonError
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, common_run
from tierkv.values.namespace import parse_description

__all__ = ["AnswerCheck", "WrongAnswerError", "plain_text"]

_PAGE_BYTES = 4096
_MOST_TEXT = 500
_COLD_FIELDS = ("blocks", "live_bytes", "quota_bytes")


class WrongAnswerError(DaemonError):
    """An impossible answer: this daemon is not trusted any more."""


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """What the answers on one connection must obey. num_slots: of the slab, for blocks of this namespace.

    flag_slots: slots that have lease flags. block_size: tokens of a whole block; 0 if the connection named no valid
    namespace.
    """

    num_slots: int = 0
    block_size: int = 0
    flag_slots: int = 0

    @classmethod
    def of(cls, hello: Hello, welcome: Welcome) -> AnswerCheck:
        """Return the check for a connection. Raises WrongAnswerError for an impossible welcome."""
        _require(0 <= welcome.pid < MOST_COUNT, "an impossible process number")
        _require(0 <= welcome.slab_bytes < MOST_COUNT, f"shared memory of {welcome.slab_bytes} bytes")
        if not hello.namespace:
            return cls()
        _require(welcome.slab_bytes > 0, "no shared memory")
        _require(0 <= welcome.most_flags <= welcome.flag_slots, f"{welcome.most_flags} flags")
        stride = -(-max(hello.block_bytes, 1) // _PAGE_BYTES) * _PAGE_BYTES  # as storage.warm.slot_stride says
        try:
            block_size = parse_description(hello.description).layout.block_size
        except ConfigError:  # a true daemon refuses such a hello
            block_size = 0
        num_slots = welcome.slab_bytes // stride
        _require(0 <= welcome.flag_slots <= num_slots, f"{welcome.flag_slots} flags for {num_slots} slots")
        return cls(num_slots, block_size, welcome.flag_slots)

    def check(self, asked: Message, answer: Message) -> None:
        """Raise WrongAnswerError unless this can be the answer to that message."""
        checked = _CHECKS.get(type(answer))
        if checked is not None:
            checked(self, asked, answer)

    def _found(self, asked: Match, answer: Found) -> None:
        """No more blocks than were asked for, in existing slots; no more tokens of the rest than it has."""
        num_asked = len(asked.hashes) // HASH_BYTES - asked.start
        slots = self._slots(answer.slots, most=num_asked)
        end = asked.start + len(slots)
        if answer.generations:
            num_bytes = len(answer.generations)
            _require(num_bytes == 2 * len(answer.slots), f"{num_bytes} bytes of generations")
            _require(all(slot < self.flag_slots or slot == NO_SLOT for slot in slots), "a slot without a lease flag")
        if answer.partial_block is not None:
            slots.append(self._partial(asked, answer.partial_block, end))
        self._distinct(slots)
        _require(0 <= answer.cursor <= 0xFFFF_FFFF, f"cursor {answer.cursor}")
        _require(answer.cursor > 0 or not asked.lease or NO_SLOT not in slots, "blocks to fetch, and no cursor for it")
        _require(0 <= answer.claim < MOST_COUNT, f"claim {answer.claim}")
        _require(asked.wants_claim or not (answer.claim or answer.is_computing), "a claim that was not asked for")
        _require(not (answer.claim and answer.is_computing), "a claim for what another client computes")
        _require(len(answer.miss) <= _MOST_TEXT, "an endless reason")

    def _partial(self, asked: Match, partial_block: FoundPartial, end: int) -> int:
        """Return the slot of a partial block whose tokens lead the rest of a prompt. end: whole blocks before it."""
        step = self.block_size * TOKEN_BYTES
        rest = asked.tokens[end * step : (end + 1) * step]
        _require(len(partial_block.block_hash) == HASH_BYTES, f"a block hash of {len(partial_block.block_hash)} bytes")
        _require(
            len(partial_block.tokens) % TOKEN_BYTES == 0 and 0 < len(partial_block.tokens) <= step,
            f"a block with {len(partial_block.tokens)} bytes of token ids",
        )
        _require(
            max(asked.min_partial_tokens, 1) <= partial_block.num_tokens <= common_run(rest, partial_block.tokens),
            f"{partial_block.num_tokens} tokens of the rest of a prompt",
        )
        return self._slot(partial_block.slot)

    def _fetched(self, asked: Fetch, answer: Fetched) -> None:
        slots = self._slots(answer.slots, most=asked.count)
        _require(NO_SLOT not in slots, "a block that was fetched to nowhere")
        self._distinct(slots)
        _require(len(answer.miss) <= _MOST_TEXT, "an endless reason")

    def _reserved(self, asked: Reserve, answer: Reserved) -> None:
        _require(
            len(answer.chains) == len(asked.chains), f"{len(answer.chains)} chains for {len(asked.chains)} asked about"
        )
        given: list[int] = []
        for chain, part in zip(asked.chains, answer.chains, strict=True):
            given += self._chain(split_numbers(chain.proposed), part)
        self._distinct(given)

    def _chain(self, proposed: Sequence[int], answer: ChainAnswer) -> Sequence[int]:
        """Return the slots that were given for blocks of a chain: only proposed blocks, each once, in order."""
        slots = self._slots(answer.slots, most=len(proposed))
        _require(NO_SLOT not in slots, "a block to be written nowhere")
        numbers = _numbers(answer.numbers, most=len(proposed))
        _require(len(numbers) == len(slots), f"{len(slots)} slots for {len(numbers)} blocks")
        _require(set(numbers) <= set(proposed), "a block to write that was not proposed")
        _require(all(a < b for a, b in itertools.pairwise(numbers)), "blocks to write that are not in order")
        for count in (answer.num_there, answer.num_busy):
            _require(0 <= count <= len(proposed), f"{count} of {len(proposed)} proposed blocks")
        _require(len(answer.refusal) <= _MOST_TEXT, "an endless refusal")
        return slots

    def _published(self, asked: Publish, answer: Published) -> None:
        slots = split_numbers(asked.slots)
        lost = _numbers(answer.lost, most=len(slots))
        _require(set(lost) <= set(slots), "a slot lost that was not published")
        _require(answer.count == len(slots) - len(lost), f"{answer.count} of {len(slots)} blocks published")

    def _count(self, asked: Message, answer: Count) -> None:
        most = MOST_COUNT
        if isinstance(asked, Pin | Prefetch):
            most = len(asked.hashes) // HASH_BYTES + 1  # and the partial block
        elif isinstance(asked, Evict):
            most = self.num_slots if asked.count < 0 else min(asked.count, self.num_slots)
        elif isinstance(asked, LoadState):
            most = 1 << 40
        _require(0 <= answer.count <= most, f"a count of {answer.count}")

    def _saved(self, asked: Message, answer: Saved) -> None:
        _require(0 <= answer.blocks < MOST_COUNT, f"{answer.blocks} blocks saved")
        _require(0 <= answer.file_bytes < MOST_COUNT, f"a file of {answer.file_bytes} bytes")

    def _status(self, asked: Message, answer: StatusReport) -> None:
        _require(math.isfinite(answer.uptime_s) and answer.uptime_s >= 0, "an impossible time")
        numbers = [
            *(answer.pid, answer.warm_bytes, answer.warm_free_bytes, answer.rss_bytes, answer.clients),
            *(answer.leased_slots, answer.reserved_slots, answer.claims, answer.pending_writes),
            *(answer.bytes_received, answer.bytes_sent, *answer.counters.values(), *answer.cold.values()),
        ]
        for tenant in answer.tenants:
            numbers += [tenant.block_bytes, tenant.warm_blocks, tenant.pinned_bytes, tenant.clients]
        for share in answer.shares:
            numbers += [share.warm_bytes, share.warm_share, share.cold_bytes, share.cold_share]
            _require(min(share.warm_limit, share.cold_limit) >= -1, "an impossible limit")
        _require(all(0 <= number < MOST_COUNT for number in numbers), "an impossible size")
        _require(not answer.cold or all(name in answer.cold for name in _COLD_FIELDS), "a cold tier without sizes")

    def _evicted(self, asked: Message, answer: EvictedBlocks) -> None:
        numbers = [answer.warm, answer.cold, answer.freed_bytes, answer.left, answer.live_bytes]
        numbers += answer.stayed.values()
        for engine in answer.engines:
            numbers += [engine.blocks, engine.in_use, engine.pinned]
            _require(len(engine.client) <= _MOST_TEXT, "an endless name")
        _require(all(0 <= number < MOST_COUNT for number in numbers), "an impossible size")
        _require(all(len(reason) <= _MOST_TEXT for reason in answer.stayed), "an endless reason")

    def _evictions(self, asked: EvictionsSince, answer: Evictions) -> None:
        _require(0 < answer.log < MOST_COUNT, f"the log {answer.log}")
        _require(0 <= answer.number < MOST_COUNT, f"eviction {answer.number}")
        for each in answer.evictions:
            _require(0 < each.number <= answer.number, f"eviction {each.number} of {answer.number}")
            _require(math.isfinite(each.at) and math.isfinite(each.older_than_s), "an impossible time")
            _require(len(each.namespace) in (0, HASH_BYTES), f"a namespace of {len(each.namespace)} bytes")
            _require(len(each.tokens) % TOKEN_BYTES == 0, f"{len(each.tokens)} bytes of token ids")
            _require(len(each.block_hashes or b"") % HASH_BYTES == 0, "block hashes that are not whole")

    def _slots(self, raw: bytes, *, most: int) -> list[int]:
        slots = _numbers(raw, most=most)
        if slots and max(slots) >= self.num_slots:  # some may be NO_SLOT
            for slot in slots:
                self._slot(slot)
        return slots.tolist()

    def _slot(self, slot: int) -> int:
        _require(0 <= slot < self.num_slots or slot == NO_SLOT, f"slot {slot} of {self.num_slots}")
        return slot

    def _distinct(self, slots: Sequence[int]) -> None:
        """Raise WrongAnswerError if two blocks of one answer have the same slot."""
        given = [slot for slot in slots if slot != NO_SLOT]
        _require(len(set(given)) == len(given), "one slot for two blocks")


def plain_text(text: str) -> str:
    """Return a daemon's text as one short line of printable characters, for errors and logs."""
    line = "".join(char if char.isprintable() else " " for char in text[:_MOST_TEXT])
    return line + ("..." if len(text) > _MOST_TEXT else "")


def _numbers(raw: bytes, *, most: int) -> array[int]:
    _require(len(raw) % 4 == 0, f"{len(raw)} bytes as a list of numbers")
    _require(len(raw) // 4 <= most, f"{len(raw) // 4} blocks of {most}")
    return split_numbers(raw)


def _require(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongAnswerError(f"it gives an impossible answer: {what}")


_CHECKS: dict[type[Message], Callable[[AnswerCheck, Any, Any], None]] = {
    Found: AnswerCheck._found,
    Fetched: AnswerCheck._fetched,
    Reserved: AnswerCheck._reserved,
    Published: AnswerCheck._published,
    Count: AnswerCheck._count,
    Saved: AnswerCheck._saved,
    StatusReport: AnswerCheck._status,
    EvictedBlocks: AnswerCheck._evicted,
    Evictions: AnswerCheck._evictions,
}
