"""Block tables for engines and kernels that take them as flat lists (CSR), with pages of any size that divides a block.

FlashInfer's wrappers take `kv_indptr`, `kv_indices` and `kv_last_page_len` where flash-attn takes a padded matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierkv.errors import ShapeError

__all__ = ["CsrBlockTable", "csr_block_table", "page_view"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CsrBlockTable:
    """The pages of several sequences, as FlashInfer takes them. int32, on the block table's device.

    kv_indptr: [sequences + 1], where the pages of each sequence begin in kv_indices, and where they end.
    kv_indices: [pages], then zeros up to the size of the whole block table if `num_pages` was not given.
    kv_last_page_len: [sequences], the tokens in the last page: 1 to the page's size; 0 for a sequence without tokens.
    """

    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor


def csr_block_table(
    block_table: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    page_size: int | None = None,
    pages_per_block: int | None = None,
    num_pages: int | None = None,
) -> CsrBlockTable:
    """Turn a padded block table into a flat one.

    block_table: [sequences, blocks] int32 or int64; the padding may hold anything. lengths: [sequences], tokens of each
    sequence, on the same device; not more than the table's blocks hold. block_size: tokens of a block.
    page_size: tokens of a page, a divisor of block_size; None: a page is a block.
    pages_per_block: how many page numbers a block takes: that from `page_view` for a layer of tierkv's pool; None: a
    block's pages are numbered in a row, as where each layer has a tensor of its own.
    num_pages: pages of all sequences together, where the caller knows it: kv_indices has this size then, else the size
    of the whole table.

    Does not wait for a device: it runs torch's operations on the current stream, and reads no result. So it looks at
    the numbers of a table on the CPU only. Raises ShapeError for shapes, dtypes and sizes that do not fit each other.

    >>> table = torch.tensor([[7, 3], [5, 0]], dtype=torch.int32)
    >>> csr = csr_block_table(table, torch.tensor([20, 16]), block_size=16, num_pages=3)
    >>> csr.kv_indptr.tolist(), csr.kv_indices.tolist(), csr.kv_last_page_len.tolist()
    ([0, 2, 3], [7, 3, 5], [4, 16])
    """
    page_size = block_size if page_size is None else page_size
    _check(block_table, lengths, block_size, page_size)
    ratio = block_size // page_size
    step = ratio if pages_per_block is None else pages_per_block
    if step < ratio:
        raise ShapeError(f"a block of {ratio} pages cannot take {step} page numbers")
    sequences, width = block_table.shape
    size = sequences * width * ratio if num_pages is None else num_pages
    lengths = lengths.to(torch.int64)
    counts = (lengths + (page_size - 1)) // page_size
    if lengths.device.type == "cpu":
        _check_numbers(lengths, counts, most_tokens=width * block_size, num_pages=num_pages)
    ends = counts.cumsum(0)
    kv_indptr = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    at = torch.arange(size, device=block_table.device)
    rows = torch.searchsorted(ends, at, right=True).clamp_(max=max(sequences - 1, 0))
    places = at - (ends - counts)[rows]  # of each page in its sequence
    blocks = block_table[rows, (places // ratio).clamp_(max=width - 1)].to(torch.int64)
    pages = blocks * step + places % ratio
    kv_indices = torch.where(at < ends[-1], pages, 0).to(torch.int32)
    last = lengths - (counts - 1).clamp_(min=0) * page_size
    return CsrBlockTable(kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_len=last.to(torch.int32))


def page_view(cache: Tensor, page_size: int) -> tuple[Tensor, int]:
    """Show K or V of a layer with smaller pages, without a copy. Return the view and its page numbers per block.

    cache: [blocks, block_size, kv_heads, dim] ("NHD"), or the same memory as [blocks, kv_heads, block_size, dim]
    transposed to it; the stride between blocks may be larger than a block, as in tierkv's pool, where a block has all
    layers. The view is [pages, page_size, kv_heads, dim]: page p of block b is number b * pages_per_block + p. Between
    them are pages of other layers, which no block table of this layer names.
    Raises ShapeError if the pages do not divide the block, or if their stride does not divide that of the blocks.
    """
    blocks, block_size, kv_heads, dim = cache.shape
    if page_size <= 0 or block_size % page_size:
        raise ShapeError(f"pages of {page_size} tokens do not divide a block of {block_size}")
    page_stride = page_size * cache.stride(1)
    ratio = block_size // page_size
    if ratio == 1:
        return cache, 1
    if cache.stride(0) % page_stride or cache.stride(0) < ratio * page_stride:
        raise ShapeError(f"blocks {cache.stride(0)} elements apart cannot be pages {page_stride} elements apart")
    per_block = cache.stride(0) // page_stride
    num_pages = (blocks - 1) * per_block + ratio
    if num_pages >= 1 << 31:
        raise ShapeError(f"{num_pages} pages have numbers beyond int32", hint="take larger pages")
    strides = (page_stride, *cache.stride()[1:])
    return cache.as_strided((num_pages, page_size, kv_heads, dim), strides), per_block


def _check_numbers(lengths: Tensor, counts: Tensor, *, most_tokens: int, num_pages: int | None) -> None:
    if int(lengths.min()) < 0 or int(lengths.max()) > most_tokens:
        raise ShapeError(f"lengths must be 0 to the {most_tokens} tokens of a row of blocks, got {lengths.tolist()}")
    if num_pages is not None and int(counts.sum()) != num_pages:
        raise ShapeError(f"the sequences have {int(counts.sum())} pages, not {num_pages}")


def _check(block_table: Tensor, lengths: Tensor, block_size: int, page_size: int) -> None:
    if block_table.dim() != 2 or lengths.shape != block_table.shape[:1] or not block_table.numel():
        raise ShapeError(
            f"a block table {tuple(block_table.shape)} and lengths {tuple(lengths.shape)} do not fit each other"
        )
    for name, tensor in (("block_table", block_table), ("lengths", lengths)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ShapeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if lengths.device != block_table.device:
        raise ShapeError(f"block_table is on {block_table.device}, and lengths on {lengths.device}")
    if page_size <= 0 or block_size % page_size:
        raise ShapeError(f"pages of {page_size} tokens do not divide a block of {block_size}")
