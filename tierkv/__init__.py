"""tierkv: attention keys and values kept on GPU, in CPU memory and on disk, so that none is computed twice.

The names below are loaded on first use: `import tierkv.index.index` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierkv.background.work_queue import Priority
    from tierkv.cache import TierCache, load_cache_state, save_cache_state
    from tierkv.config import CacheConfig
    from tierkv.engine.managed_attention import ManagedFlashAttention
    from tierkv.errors import TierKVError
    from tierkv.movers.transfers import MemoryTransferManager, TransferHandle, TransferOp
    from tierkv.policies import EvictionPolicy
    from tierkv.profiling.controller import MemoryController
    from tierkv.profiling.memory_report import MemoryReport, MemoryVisualizer
    from tierkv.profiling.metrics import serve_metrics
    from tierkv.profiling.profiler import MemoryProfiler
    from tierkv.profiling.tracker import MemoryTracker
    from tierkv.ranks.group import RankGroup
    from tierkv.ranks.torch_ranks import TorchRanks
    from tierkv.values.block import Tier
    from tierkv.values.events import CacheObserver
    from tierkv.values.layout import BlockLayout
    from tierkv.values.namespace import Namespace
    from tierkv.values.stats import CacheStats

__all__ = [
    "BlockLayout",
    "CacheConfig",
    "CacheObserver",
    "CacheStats",
    "EvictionPolicy",
    "ManagedFlashAttention",
    "MemoryController",
    "MemoryProfiler",
    "MemoryReport",
    "MemoryTracker",
    "MemoryTransferManager",
    "MemoryVisualizer",
    "Namespace",
    "Priority",
    "RankGroup",
    "Tier",
    "TierCache",
    "TierKVError",
    "TorchRanks",
    "TransferHandle",
    "TransferOp",
    "__version__",
    "load_cache_state",
    "save_cache_state",
    "serve_metrics",
]

__version__ = "0.1.0"

_HOMES = {
    "BlockLayout": "tierkv.values.layout",
    "CacheConfig": "tierkv.config",
    "CacheObserver": "tierkv.values.events",
    "CacheStats": "tierkv.values.stats",
    "EvictionPolicy": "tierkv.policies",
    "ManagedFlashAttention": "tierkv.engine.managed_attention",
    "MemoryController": "tierkv.profiling.controller",
    "MemoryProfiler": "tierkv.profiling.profiler",
    "MemoryReport": "tierkv.profiling.memory_report",
    "MemoryTracker": "tierkv.profiling.tracker",
    "MemoryTransferManager": "tierkv.movers.transfers",
    "MemoryVisualizer": "tierkv.profiling.memory_report",
    "Namespace": "tierkv.values.namespace",
    "Priority": "tierkv.background.work_queue",
    "RankGroup": "tierkv.ranks.group",
    "Tier": "tierkv.values.block",
    "TierCache": "tierkv.cache",
    "TierKVError": "tierkv.errors",
    "TorchRanks": "tierkv.ranks.torch_ranks",
    "TransferHandle": "tierkv.movers.transfers",
    "TransferOp": "tierkv.movers.transfers",
    "load_cache_state": "tierkv.cache",
    "save_cache_state": "tierkv.cache",
    "serve_metrics": "tierkv.profiling.metrics",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
