"""A storage backend of SGLang's HiCache ("dynamic"): pages of its host pool in a block store.

SGLang loads this module by name (docs/sglang.md); `import tierkv` never does. SGLang calls it from threads of its own,
never from the scheduler's. Source: SGLang's HiCacheStorage and its own HiCacheFile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from sglang.version import __version__ as sglang_version

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Buffers, Strided
from tierkv.errors import ConfigError, TierKVError
from tierkv.integrations.rows import DigestRows, store_config
from tierkv.integrations.sglang.identity import folder_weights, page_namespace, server_fields
from tierkv.integrations.sglang.pages import kv_pool_of, page_bytes, page_numbers, page_tensors
from tierkv.values.checks import check_flag

__all__ = ["TierkvHiCache"]

_log = logging.getLogger(__name__)

_OF_SGLANG = ("backend_name", "module_path", "class_name", "interface_v1", "file_storage_path")
_KV_POOL = "kv"


class TierkvHiCache(HiCacheStorage):  # type: ignore[misc]
    """SGLang's host pages in a tierkv store, one namespace for each rank.

    storage_config: from SGLang. Its extra_config has `path` and the other options of the store (docs/sglang.md), and:
    weights: a digest of the model's weights; by default computed from its folder. engine: what decides K and V besides,
    by default from SGLang's server arguments. adapters: a digest of all LoRA adapters. kv_dtype: of a pool of bare
    bytes. weights_are_fixed: whether the weights stay the same while the server runs; if not, the first flush of
    SGLang's cache ends the use of the store, because a flush is how new weights show.
    Raises ConfigError for a server or a pool whose pages cannot be named or stored.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        options = dict(storage_config.extra_config or {})
        for name in _OF_SGLANG:
            options.pop(name, None)
        self._config = storage_config
        self._weights: str | None = options.pop("weights", None)
        self._adapters: str = options.pop("adapters", "")
        self._engine: Any = options.pop("engine", None)
        self._kv_dtype: str | None = options.pop("kv_dtype", None)
        self._weights_are_fixed = check_flag("weights_are_fixed", options.pop("weights_are_fixed", False))
        self._options = options
        self._rows: DigestRows | None = None
        self._pool: Any = None
        self._is_writer = bool(getattr(storage_config, "is_storage_writer", True))
        self._state: object = None
        self._is_off = False
        self._lock = threading.Lock()
        if not self._engine:
            settings, model_fields = _server_settings()
            self._engine = server_fields(settings, model_fields, weights=self._weights, adapters=self._adapters)
            if not self._weights:
                started = time.monotonic()
                self._weights = folder_weights(settings)
                _log.info("tierkv has hashed the weights in %.1f s: %s", time.monotonic() - started, self._weights)
        if not self._weights:
            raise ConfigError("the weights have no digest", hint="give the option weights=, or leave out engine=")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the store for the pages of a pool. Raises ConfigError for a pool that is not plain K and V."""
        super().register_mem_pool_host(mem_pool_host)
        pool = kv_pool_of(mem_pool_host)
        tensors = page_tensors(pool)
        row_bytes = page_bytes(tensors)
        assert self._weights
        namespace = page_namespace(
            self._config,
            pool,
            row_bytes=row_bytes,
            weights=self._weights,
            engine=self._engine,
            version=sglang_version,
            adapters=self._adapters,
            kv_dtype=self._kv_dtype,
        )
        self.close()
        self._rows = DigestRows(store_config(self._options, row_bytes=row_bytes), namespace)
        self._memory = self._rows.store.register([tensors])
        self._pool = pool
        self._num_pages = self._memory.num_pages
        _log.info("tierkv keeps pages of %d bytes in %s", row_bytes, self._options.get("path"))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Accept the pool of K and V. Raises ConfigError for any other: its pages would have to be kept too."""
        if str(host_pool_name) != _KV_POOL:
            raise ConfigError(
                f"SGLang has a host pool {host_pool_name!s} beside K and V: sliding windows, states, indexers and "
                "draft models are not supported"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def exists(self, key: str) -> bool:
        """Return whether a page is there."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """Return how many leading pages are there."""
        rows = self._usable()
        return rows.count(self._keys(rows, keys)) if rows else 0

    def batch_get_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Copy pages to the host pool, without a copy between. Return for each whether it came.

        Pages after the first that did not come are not read: SGLang uses leading pages only.
        """
        rows, pages = self._usable(), self._pages(host_indices, len(keys))
        if rows is None or pages is None:
            return [False] * len(keys)
        known = self._keys(rows, keys)
        came = rows.load(known, lambda at, end: Strided(self._memory, pages[at:end]), stop_at_gap=True)
        return came + [False] * (len(keys) - len(known))

    def batch_set_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Copy pages out of the host pool, without a copy between. Return for each whether the store has it.

        A rank that is no writer keeps nothing, and returns True: another rank keeps the same bytes.
        """
        if not self._is_writer:
            return [True] * len(keys)
        rows, pages = self._usable(), self._pages(host_indices, len(keys))
        if rows is None or pages is None:
            return [False] * len(keys)
        known = self._keys(rows, keys)
        saved = rows.save(known, lambda at, end: Strided(self._memory, pages[at:end]))
        return saved + [False] * (len(keys) - len(known))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """Return a flat page, in `target_location` if that is given; None if it is not there."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Return a flat page for each key; None for one that is not there, and for all after it."""
        rows = self._usable()
        if rows is None:
            return [None] * len(keys)
        targets = target_locations
        if targets is None:
            item_bytes = self._pool.dtype.itemsize
            targets = [torch.empty(rows.row_bytes // item_bytes, dtype=self._pool.dtype) for _ in keys]
        targets = list(targets)
        if not all(_is_page(target, rows.row_bytes) for target in targets):
            return [None] * len(keys)
        known = self._keys(rows, keys)
        came = rows.load(known, lambda at, end: Buffers(targets[at:end]), stop_at_gap=True)
        pages = [target if is_here else None for target, is_here in zip(targets, came, strict=False)]
        return pages + [None] * (len(keys) - len(pages))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep a flat page. Return whether the store has it."""
        return self.batch_set([key], [value if value is not None else target_location])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep flat pages. Return whether the store has all of them."""
        if not self._is_writer:
            return True
        rows = self._usable()
        values = list(values if values is not None else target_locations or ())
        if rows is None or len(values) != len(keys):
            return False
        values = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in values]
        known = self._keys(rows, keys)
        if len(known) < len(keys) or not all(_is_page(value, rows.row_bytes) for value in values):
            return False
        return all(rows.save(known, lambda at, end: Buffers(values[at:end])))

    def clear(self) -> bool:
        """Evict all pages of this rank's namespace. Return whether that was done."""
        try:
            if self._rows:
                self._rows.clear()
            return self._rows is not None
        except TierKVError as exc:
            _log.warning("the pages were not evicted: %s", exc)
            return False

    def close(self) -> None:
        """Write what was saved and close the store. May be called twice; afterwards every page is a miss."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        rows.close()
        counts = rows.counts
        _log.info(
            "tierkv: %d pages loaded, %d not; %d stored, %d not",
            *(counts.loaded, counts.not_loaded, counts.saved, counts.not_saved),
        )

    def _usable(self) -> DigestRows | None:
        """Return the rows, unless the weights may have changed since the first call.

        SGLang does not notify a backend of new weights. But it flushes its cache then, and the pool begins anew, or it
        counts the version of the weights.
        """
        rows = self._rows
        if rows is None or self._is_off:
            return None
        if self._weights_are_fixed:
            return rows
        state = (getattr(self._pool, "slot_used", None), _weight_version())
        with self._lock:
            if self._state is None:
                self._state = state
            first = self._state
            if first[0] is state[0] and first[1] == state[1]:  # type: ignore[index]
                return rows
            self._is_off = True
        _log.warning(
            "SGLang has flushed its cache, and its weights may have changed: tierkv is not used until the server "
            "starts anew (set weights_are_fixed if they never change)"
        )
        return None

    def _keys(self, rows: DigestRows, keys: Sequence[str]) -> list[BlockKey]:
        """Return the keys of leading pages, up to one that is no hex digest."""
        known: list[BlockKey] = []
        for key in keys:
            try:
                found = rows.key(bytes.fromhex(key))
            except ValueError:
                found = None
            if found is None:
                break
            known.append(found)
        return known

    def _pages(self, host_indices: torch.Tensor, num_keys: int) -> list[list[int]] | None:
        if self._pool is None:
            return None
        pages = page_numbers(host_indices, self._pool.page_size, self._num_pages)
        if pages is None or len(pages) != num_keys:
            _log.warning("SGLang named %d pages by %d indices that are no whole pages", num_keys, len(host_indices))
            return None
        return [[page] for page in pages]


def _is_page(value: Any, row_bytes: int) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes == row_bytes


def _server_settings() -> tuple[dict[str, Any], list[str]]:
    """Return SGLang's resolved server arguments, and the names of those that describe the model.

    Raises ConfigError if this process is no SGLang server, or one of a version that does not say.
    """
    try:
        from sglang.srt.arg_groups.fields.model import Model
        from sglang.srt.runtime_context import get_context

        return get_context().resolved_server_args_dict(), [field.name for field in msgspec.structs.fields(Model)]
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(
            f"what decides K and V cannot be had from SGLang {sglang_version}: {exc}",
            hint="describe quantisation, overrides and so on by engine=, and give weights=",
        ) from exc


def _weight_version() -> object:
    """Return SGLang's version of the weights, which an update may raise; None if it has none."""
    try:
        from sglang.srt.runtime_context import get_serving

        return get_serving().weight_version
    except (ImportError, AttributeError, ValueError):
        return None
