"""tierkv: a persistent, tiered cache for the attention keys and values (KV) of language models.

**What is public.** The names in `__all__` below, the methods and attributes of these classes without a leading
underscore, and the `tierkv` command. Everything else is private and may change in any release: import from `tierkv`
itself, not from the modules below it.

Each name is loaded when it is first used: `import tierkv` loads no torch, and no other module of tierkv.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierkv.background.handle import Handle
    from tierkv.background.work_queue import Priority
    from tierkv.block_store.config import BlockStoreConfig
    from tierkv.block_store.keys import BlockKey, BlockKeys, digest_namespace
    from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
    from tierkv.block_store.placement import Buffers, Strided
    from tierkv.block_store.reservation import Reservation
    from tierkv.block_store.store import BlockStore
    from tierkv.cache import TierCache, load_cache_state, save_cache_state
    from tierkv.config import CacheConfig
    from tierkv.engine.backends.csr import CsrBlockTable, csr_block_table, page_view
    from tierkv.engine.engine import Engine, EngineStats
    from tierkv.engine.generation import Generation, GenerationOptions, TokenEvent
    from tierkv.engine.managed_attention import ManagedFlashAttention
    from tierkv.engine.models import LoadedModel, load_model, split_model
    from tierkv.engine.runner import Runner, open_runner
    from tierkv.engine.sampling import SamplingOptions
    from tierkv.engine.sparse.options import SparseDecode
    from tierkv.engine.token_stream import TokenStream
    from tierkv.errors import (
        CapacityError,
        ClosedError,
        ConfigError,
        CorruptBlockError,
        DaemonError,
        DaemonGoneError,
        FormatVersionError,
        NamespaceMismatchError,
        QueueFullError,
        RankError,
        ShapeError,
        StoreBusyError,
        StoreError,
        TierKVError,
        TransferCancelledError,
        UnsupportedModelError,
    )
    from tierkv.movers.transfers import MemoryTransferManager, TransferHandle, TransferOp
    from tierkv.policies import CacheBlock, EvictionPolicy, make_policy
    from tierkv.profiling.controller import MemoryController
    from tierkv.profiling.memory_report import MemoryReport, MemoryVisualizer
    from tierkv.profiling.metrics import MetricsServer, serve_metrics
    from tierkv.profiling.profiler import MemoryProfiler
    from tierkv.profiling.tracker import MemoryTracker
    from tierkv.ranks.group import RankGroup
    from tierkv.ranks.torch_ranks import TorchRanks
    from tierkv.requests.defragment import LayoutReport
    from tierkv.requests.evict import EvictedEverywhere
    from tierkv.requests.prefetch import PrefetchHandle
    from tierkv.requests.prefixes import Match
    from tierkv.requests.sequence import Sequence
    from tierkv.storage.cold import ColdStore
    from tierkv.storage.state_file import SavedState
    from tierkv.values.block import Tier
    from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion, RequestEvent, Span
    from tierkv.values.layout import BlockLayout
    from tierkv.values.namespace import Namespace
    from tierkv.values.stats import CacheStats

__all__ = [
    "BlockEvent",
    "BlockKey",
    "BlockKeys",
    "BlockLayout",
    "BlockStore",
    "BlockStoreConfig",
    "Buffers",
    "CacheBlock",
    "CacheConfig",
    "CacheObserver",
    "CacheStats",
    "CapacityError",
    "ClosedError",
    "ColdStore",
    "ConfigError",
    "CorruptBlockError",
    "CsrBlockTable",
    "DaemonError",
    "DaemonGoneError",
    "Engine",
    "EngineStats",
    "EventKind",
    "EvictedEverywhere",
    "EvictionPolicy",
    "FormatVersionError",
    "Generation",
    "GenerationOptions",
    "Handle",
    "LayoutReport",
    "LoadOrCompute",
    "LoadedModel",
    "ManagedFlashAttention",
    "Match",
    "MemoryController",
    "MemoryProfiler",
    "MemoryRegion",
    "MemoryReport",
    "MemoryTracker",
    "MemoryTransferManager",
    "MemoryVisualizer",
    "MetricsServer",
    "Namespace",
    "NamespaceMismatchError",
    "Origin",
    "PrefetchHandle",
    "Priority",
    "QueueFullError",
    "RankError",
    "RankGroup",
    "RequestEvent",
    "Reservation",
    "Runner",
    "SamplingOptions",
    "SavedState",
    "Sequence",
    "ShapeError",
    "Span",
    "SparseDecode",
    "StoreBusyError",
    "StoreError",
    "Strided",
    "Tier",
    "TierCache",
    "TierKVError",
    "TokenEvent",
    "TokenStream",
    "TorchRanks",
    "TransferCancelledError",
    "TransferHandle",
    "TransferOp",
    "UnsupportedModelError",
    "__version__",
    "csr_block_table",
    "digest_namespace",
    "load_cache_state",
    "load_model",
    "make_policy",
    "open_runner",
    "page_view",
    "save_cache_state",
    "serve_metrics",
    "split_model",
]

__version__ = "0.1.0"

_HOMES = {
    "Handle": "tierkv.background.handle",
    "Priority": "tierkv.background.work_queue",
    "BlockStoreConfig": "tierkv.block_store.config",
    "digest_namespace": "tierkv.block_store.keys",
    "BlockKeys": "tierkv.block_store.keys",
    "BlockKey": "tierkv.block_store.keys",
    "LoadOrCompute": "tierkv.block_store.load_or_compute",
    "Origin": "tierkv.block_store.load_or_compute",
    "Strided": "tierkv.block_store.placement",
    "Buffers": "tierkv.block_store.placement",
    "Reservation": "tierkv.block_store.reservation",
    "BlockStore": "tierkv.block_store.store",
    "TierCache": "tierkv.cache",
    "load_cache_state": "tierkv.cache",
    "save_cache_state": "tierkv.cache",
    "CacheConfig": "tierkv.config",
    "CsrBlockTable": "tierkv.engine.backends.csr",
    "csr_block_table": "tierkv.engine.backends.csr",
    "page_view": "tierkv.engine.backends.csr",
    "Engine": "tierkv.engine.engine",
    "EngineStats": "tierkv.engine.engine",
    "Generation": "tierkv.engine.generation",
    "GenerationOptions": "tierkv.engine.generation",
    "TokenEvent": "tierkv.engine.generation",
    "ManagedFlashAttention": "tierkv.engine.managed_attention",
    "LoadedModel": "tierkv.engine.models",
    "load_model": "tierkv.engine.models",
    "split_model": "tierkv.engine.models",
    "Runner": "tierkv.engine.runner",
    "open_runner": "tierkv.engine.runner",
    "SamplingOptions": "tierkv.engine.sampling",
    "SparseDecode": "tierkv.engine.sparse.options",
    "TokenStream": "tierkv.engine.token_stream",
    "CapacityError": "tierkv.errors",
    "ClosedError": "tierkv.errors",
    "ConfigError": "tierkv.errors",
    "CorruptBlockError": "tierkv.errors",
    "DaemonError": "tierkv.errors",
    "DaemonGoneError": "tierkv.errors",
    "FormatVersionError": "tierkv.errors",
    "NamespaceMismatchError": "tierkv.errors",
    "QueueFullError": "tierkv.errors",
    "RankError": "tierkv.errors",
    "ShapeError": "tierkv.errors",
    "StoreBusyError": "tierkv.errors",
    "StoreError": "tierkv.errors",
    "TierKVError": "tierkv.errors",
    "TransferCancelledError": "tierkv.errors",
    "UnsupportedModelError": "tierkv.errors",
    "MemoryTransferManager": "tierkv.movers.transfers",
    "TransferHandle": "tierkv.movers.transfers",
    "TransferOp": "tierkv.movers.transfers",
    "CacheBlock": "tierkv.policies",
    "EvictionPolicy": "tierkv.policies",
    "make_policy": "tierkv.policies",
    "MemoryController": "tierkv.profiling.controller",
    "MemoryReport": "tierkv.profiling.memory_report",
    "MemoryVisualizer": "tierkv.profiling.memory_report",
    "MetricsServer": "tierkv.profiling.metrics",
    "serve_metrics": "tierkv.profiling.metrics",
    "MemoryProfiler": "tierkv.profiling.profiler",
    "MemoryTracker": "tierkv.profiling.tracker",
    "RankGroup": "tierkv.ranks.group",
    "TorchRanks": "tierkv.ranks.torch_ranks",
    "LayoutReport": "tierkv.requests.defragment",
    "EvictedEverywhere": "tierkv.requests.evict",
    "PrefetchHandle": "tierkv.requests.prefetch",
    "Match": "tierkv.requests.prefixes",
    "Sequence": "tierkv.requests.sequence",
    "ColdStore": "tierkv.storage.cold",
    "SavedState": "tierkv.storage.state_file",
    "Tier": "tierkv.values.block",
    "BlockEvent": "tierkv.values.events",
    "CacheObserver": "tierkv.values.events",
    "EventKind": "tierkv.values.events",
    "MemoryRegion": "tierkv.values.events",
    "RequestEvent": "tierkv.values.events",
    "Span": "tierkv.values.events",
    "BlockLayout": "tierkv.values.layout",
    "Namespace": "tierkv.values.namespace",
    "CacheStats": "tierkv.values.stats",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value  # the next use of the name does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
