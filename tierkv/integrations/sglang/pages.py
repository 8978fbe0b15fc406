"""SGLang's host pools as pages: one tensor [pages, ...] for each run of bytes that a page has.

A pool says by `get_page_buffer_meta` where a page lies. The views here must lie exactly there, or the pool is refused:
so a pool with scales, a second buffer or a layout that a later SGLang brings is never half saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tierkv.errors import ConfigError

__all__ = ["kv_pool_of", "page_bytes", "page_numbers", "page_tensors"]

_BY_LAYER = "layer_first"
_BY_TOKEN = "page_first"
_BY_PAGE = ("page_first_direct", "page_head")


def kv_pool_of(pool: Any) -> Any:
    """Return the pool that holds K and V, of a pool or a group of pools."""
    anchor = getattr(pool, "anchor_entry", None)
    return pool if anchor is None else anchor.host_pool


def page_tensors(pool: Any) -> list[Tensor]:
    """Return views of a pool's buffers, each [pages, ...]. A page's runs, in order, are the bytes of its flat page.

    Raises ConfigError for a pool whose pages are not plain K and V, with the reason.
    """
    name, layout = type(pool).__name__, str(pool.layout)
    if getattr(pool, "dcp_size", 1) != 1:
        raise ConfigError("SGLang's decode context parallelism is not supported")
    if pool.layer_num != getattr(pool, "target_layer_num", pool.layer_num):
        raise ConfigError("the host pool holds the layers of a draft model too, whose weights are not in the identity")
    if layout == _BY_LAYER:
        tensors = [layer.unflatten(0, (-1, pool.page_size)) for buffer in _buffers(pool) for layer in buffer]
    elif layout == _BY_TOKEN:
        tensors = [buffer.unflatten(0, (-1, pool.page_size)) for buffer in _buffers(pool)]
    elif layout in _BY_PAGE:
        tensors = _buffers(pool)
    else:
        raise ConfigError(f"the layout {layout!r} of SGLang's host pool is not supported")
    num_pages = min(len(tensor) for tensor in tensors)
    for page in {0, num_pages - 1}:
        if _runs_of(tensors, page) != _engine_runs(pool, page):
            raise ConfigError(f"SGLang's {name} with layout {layout!r} has other buffers than K and V: not supported")
    return tensors


def page_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of one page."""
    return sum(tensor[0].nbytes for tensor in tensors)


def page_numbers(host_indices: Tensor, page_size: int, num_pages: int) -> list[int] | None:
    """Return the pages that SGLang's token indices name: page i begins at index i * page_size.

    None if one does not begin at the begin of a page, or does not exist.
    """
    starts = host_indices[::page_size].tolist()
    if len(host_indices) % page_size or any(start % page_size for start in starts):
        return None
    pages = [start // page_size for start in starts]
    return pages if all(0 <= page < num_pages for page in pages) else None


def _buffers(pool: Any) -> list[Tensor]:
    """Return K and V, or the latent of both."""
    names = ("k_buffer", "v_buffer") if hasattr(pool, "head_num") else ("kv_buffer",)
    found = [buffer for buffer in (getattr(pool, name, None) for name in names) if isinstance(buffer, torch.Tensor)]
    if not found or any(buffer.device.type != "cpu" or not buffer.is_contiguous() for buffer in found):
        raise ConfigError(f"the buffers of SGLang's {type(pool).__name__} are not plain CPU memory")
    return found


def _runs_of(tensors: list[Tensor], page: int) -> list[tuple[int, int]]:
    """Return begin and end of the memory of a page."""
    return _merged([(tensor[page].data_ptr(), tensor[page].nbytes) for tensor in tensors])


def _engine_runs(pool: Any, page: int) -> list[tuple[int, int]] | None:
    """Return begin and end of the memory of a page, as the pool says it; None if it cannot say."""
    indices = torch.arange(page * pool.page_size, (page + 1) * pool.page_size)
    try:
        addresses, sizes = pool.get_page_buffer_meta(indices)
    except (NotImplementedError, ValueError):
        return None
    return _merged(list(zip(addresses, sizes, strict=True)))


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return runs of (address, size) as sorted (begin, end), those that touch each other as one."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(runs):
        if merged and merged[-1][1] == address:
            merged[-1] = (merged[-1][0], address + size)
        else:
            merged.append((address, address + size))
    return merged
