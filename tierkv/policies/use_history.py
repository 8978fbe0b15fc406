"""When recently used blocks were last used, those that have been evicted since included: a table of fixed size."""

from __future__ import annotations

from struct import Struct

import numpy as np

from tierkv.values.block import BlockHash

__all__ = ["UseHistory", "split_hash"]

_ROW_BYTES, _LINE_BYTES = 32, 64

_pack_row = Struct("=QdfIIH").pack_into  # all but the lane
split_hash = Struct("<QI").unpack_from
"""(tag, of 64 bits; what names the row) of a block hash."""


class UseHistory:
    """Columns of one row for each block used lately, and what the policy notes of it.

    A row's fields lie side by side in one cache line: rows are met at random, and to fetch a line costs more than to
    read it.

    Direct-mapped: a block's hash names its one row, and a block used later under the same row takes it over. So
    memory is fixed (32 bytes a row), every operation is O(1), and old blocks fade away at random, which is just
    what keeps a statistic of the others unbiased. Rows are told apart by 64 bits of the hash; to take one block
    for another would cost a wrong guess about its future, nothing else.

    times: last use, of a block that is cached its last noted one. earlier: uses before the block was last inserted.
    totals: all uses, up to date once the block has left. gaps: seconds that it was away; 0 if never. forks: see
    `LanePolicy.choose_lane`. num_rows: a power of two, best several times the number of blocks that the cache holds.
    """

    def __init__(self, num_rows: int) -> None:
        assert num_rows & (num_rows - 1) == 0, "a power of two"
        self.mask = num_rows - 1
        self._memory = bytearray(_ROW_BYTES * num_rows + _LINE_BYTES)
        self._start = start = -np.frombuffer(self._memory, dtype=np.uint8).ctypes.data % _LINE_BYTES
        rows = memoryview(self._memory)[start : start + _ROW_BYTES * num_rows]
        self.tags = rows.cast("Q")[0::4]  # 0: nobody's
        self.times = rows.cast("d")[1::4]
        self.gaps = rows.cast("f")[4::8]
        self.earlier = rows.cast("I")[5::8]
        self.totals = rows.cast("I")[6::8]
        self.forks = rows.cast("H")[14::16]
        self.lanes = rows.cast("B")[30::32]

    def __len__(self) -> int:
        return len(self.tags)

    def row_of(self, block_hash: BlockHash) -> tuple[int, int]:
        """Return a block's row, and the tag that the row has if it is the block's."""
        tag, low = split_hash(block_hash)
        return low & self.mask, tag or 1

    def take_over(self, row: int, tag: int, time: float, total: int) -> None:
        """Give a row to a block of which nothing else is known; its lane stays what it was."""
        _pack_row(self._memory, self._start + row * _ROW_BYTES, tag, time, 0.0, 0, total, 0)

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the row of a block, or None if it is not remembered."""
        tag, low = split_hash(block_hash)
        row: int = low & self.mask
        return row if self.tags[row] == (tag or 1) else None
