"""When recently used blocks were last used, those that have been evicted since included: a table of fixed size."""

from __future__ import annotations

from array import array

from tierkv.block import BlockHash

__all__ = ["UseHistory"]


class UseHistory:
    """Columns of one row for each block used lately, and what the policy notes of it.

    Direct-mapped: a block's hash names its one row, and a block used later under the same row takes it over. So
    memory is fixed (31 bytes a row), every operation is O(1), and old blocks fade away at random, which is just
    what keeps a statistic of the others unbiased. Rows are told apart by 64 bits of the hash; to take one block
    for another would cost a wrong guess about its future, nothing else.

    times: last use, of a block that is cached its last noted one. earlier: uses before the block was last inserted.
    totals: all uses, up to date once the block has left. gaps: seconds that it was away; 0 if never. forks: see
    `LanePolicy.choose_lane`. num_rows: a power of two, best several times the number of blocks that the cache holds.
    """

    def __init__(self, num_rows: int) -> None:
        assert num_rows & (num_rows - 1) == 0, "a power of two"
        self._mask = num_rows - 1
        self.tags = array("Q", bytes(8 * num_rows))  # 0: nobody's
        self.times = array("d", bytes(8 * num_rows))
        self.gaps = array("f", bytes(4 * num_rows))
        self.earlier = array("I", bytes(4 * num_rows))
        self.totals = array("I", bytes(4 * num_rows))
        self.forks = array("H", bytes(2 * num_rows))
        self.lanes = array("B", bytes(num_rows))

    def __len__(self) -> int:
        return len(self.tags)

    def row_of(self, block_hash: BlockHash) -> tuple[int, int]:
        """Return a block's row, and the tag that the row has if it is the block's."""
        return int.from_bytes(block_hash[8:12], "little") & self._mask, int.from_bytes(block_hash[:8], "little") or 1

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the row of a block, or None if it is not remembered."""
        row, tag = self.row_of(block_hash)
        return row if self.tags[row] == tag else None
