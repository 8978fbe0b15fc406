"""SparseDecode: how much of a long sequence a decode step reads, where that was opted into."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.errors import ConfigError
from tierkv.values.checks import check_count

__all__ = ["PageCounts", "SparseDecode"]

_PARTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseDecode:
    """Options of sparse decode. Its answers are approximate, and the cache keeps no K and V of tokens computed by it.

    budget: the share of a sequence's tokens that a decode step reads, first and recent ones included: above 0, at
    most 1; 1 is exact.
    min_tokens: so many are read at least, so shorter sequences are exact. recent_tokens: the last ones, always read.
    page_tokens: what is chosen together, a divisor of the block size; None: 64, or a block if that is smaller.
    Raises ConfigError for values that do not fit each other.

    >>> SparseDecode(budget=0.1).counts(256)
    PageCounts(page=64, share=102, least=32, sinks=1, recent=128)
    """

    budget: float
    min_tokens: int = 2048
    recent_tokens: int = 128
    page_tokens: int | None = None

    def __post_init__(self) -> None:
        if type(self.budget) not in (int, float) or not 1 / _PARTS <= self.budget <= 1:
            raise ConfigError(f"the budget of sparse decode must be from {1 / _PARTS:.3f} to 1, got {self.budget!r}")
        check_count("min_tokens", self.min_tokens, least=1)
        check_count("recent_tokens", self.recent_tokens, least=1)
        if self.page_tokens is not None:
            check_count("page_tokens", self.page_tokens, least=1)

    def counts(self, block_size: int) -> PageCounts:
        """Return the same in pages. Raises ConfigError if pages do not divide blocks of so many tokens."""
        page = min(64, block_size) if self.page_tokens is None else self.page_tokens
        if block_size % page:
            raise ConfigError(f"pages of {page} tokens do not divide a block of {block_size}")
        always = 1 + self.recent_tokens // page + 2
        return PageCounts(
            page=page,
            share=int(self.budget * _PARTS),
            least=max(always, -(-self.min_tokens // page)),
            sinks=1,
            recent=self.recent_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """How many pages of a sequence are read, and which of them always.

    page: tokens of a page. Of `pages` pages, max(least, ceil(pages * share / 1024)) are read; integers, so that host
    and device agree. sinks: first pages, recent: last tokens whose pages are always read.
    """

    page: int
    share: int
    least: int
    sinks: int
    recent: int

    def read(self, length: int) -> int:
        """Return how many pages of a sequence of so many tokens are read."""
        pages = -(-length // self.page)
        return min(pages, max(self.least, -(-pages * self.share // _PARTS)))

    def scored(self, length: int) -> int:
        """Return how many leading pages have no recent token: those are scored, but for sinks."""
        return max(0, length - self.recent) // self.page

    def is_exact(self, length: int) -> bool:
        """Return whether all pages of a sequence of so many tokens are read."""
        return self.read(length) >= -(-length // self.page)
