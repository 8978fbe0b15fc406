"""SGLang's real host pools and storage factory on a CPU, where its package has no server.

torchvision has no build for a CPU-only torch of every version, and SGLang imports it for images: a stub stands in.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Sequence
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo
import transformers  # before the stub: both look for torchvision


class _Stub(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


assert transformers.__version__
if find_spec("torchvision") is None:
    sys.meta_path.append(_Finder())  # type: ignore[arg-type]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

LAYERS, HEADS, DIM, PAGE, TOKENS = 3, 2, 32, 4, 64
CPU = torch.device("cpu")


def mha_pool(
    layout: str, *, dtype: torch.dtype = torch.bfloat16, v_dim: int = DIM, seed: int = 0, page: int = PAGE
) -> Any:
    """Return a real MHA host pool of random content. Its K and V differ in their dim where v_dim says so."""
    device = [torch.zeros(TOKENS, HEADS, dim, dtype=dtype) for dim in (DIM, v_dim) for _ in range(LAYERS)]
    pointers = torch.tensor([tensor.data_ptr() for tensor in device], dtype=torch.uint64)
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=tuple(device[:LAYERS]),
            v=tuple(device[LAYERS:]),
            k_data_ptrs=pointers[:LAYERS],
            v_data_ptrs=pointers[LAYERS:],
            layout=KVBufferLayout.NHD,
        ),
        page_size=page,
        head_num=HEADS,
        head_dim=DIM,
        v_head_dim=v_dim,
        dtype=dtype,
        device=CPU,
    )
    kind = MHATokenToKVPoolHost if v_dim == DIM else AsymmetricMHATokenToKVPoolHost
    with host_memory_budget_scope(1 << 30):
        pool = kind(
            info, 2.0, 0, page, layout, pin_memory=False, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS
        )
    return filled(pool, seed)


def mla_pool(layout: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """Return a real MLA host pool of random content."""
    width = DIM + 16
    device = [torch.zeros(TOKENS, 1, width, dtype=dtype) for _ in range(LAYERS)]
    info = MLABufferInfo(
        buffers=tuple(device),
        data_ptrs=torch.tensor([tensor.data_ptr() for tensor in device], dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=DIM,
        qk_rope_head_dim=16,
        kv_cache_dim=width,
        dtype=dtype,
        device=CPU,
    )
    with host_memory_budget_scope(1 << 30):
        pool = MLATokenToKVPoolHost(
            info,
            2.0,
            0,
            PAGE,
            layout,
            pin_memory=False,
            device_capacity_tokens=TOKENS,
            start_layer=0,
            end_layer=LAYERS,
            target_layer_num=LAYERS,
        )
    return filled(pool, seed)


def buffers_of(pool: Any) -> list[torch.Tensor]:
    names = ("k_buffer", "v_buffer") if hasattr(pool, "head_num") else ("kv_buffer",)
    return [getattr(pool, name) for name in names]


def filled(pool: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for buffer in buffers_of(pool):
        buffer.copy_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype))
    return pool


def page_of(pool: Any, page: int) -> bytes:
    """Return all bytes of a page, by SGLang's addresses of its runs."""
    import ctypes

    indices = torch.arange(page * pool.page_size, (page + 1) * pool.page_size)
    addresses, sizes = pool.get_page_buffer_meta(indices)
    return b"".join(ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True))


def storage_config(folder: Path, *, interface_v1: int = 1, model_name: str = "tiny", **changes: Any) -> Any:
    """Return SGLang's configuration of a backend. changes: fields of it, or options of tierkv."""
    fields: dict[str, Any] = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0}
    fields |= {"attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": False}
    fields |= {"is_page_first_layout": False}
    fields |= {name: changes.pop(name) for name in [*changes] if name in HiCacheStorageConfig.__dataclass_fields__}
    extra = {
        "backend_name": "tierkv",
        "module_path": "tierkv.integrations.sglang",
        "class_name": "TierkvHiCache",
        "interface_v1": interface_v1,
        "path": str(folder),
        "weights": "weights-a",
        "engine": "random pages",
        "warm_bytes": 1 << 20,
        "min_free_bytes": 0,
        **changes,
    }
    return HiCacheStorageConfig(model_name=model_name, extra_config=extra, **fields)


def open_backend(folder: Path, pool: Any, **changes: Any) -> Any:
    """Open a backend as SGLang's controller does: through its factory, then with the pool."""
    backend = StorageBackendFactory.create_backend("dynamic", storage_config(folder, **changes), pool)
    try:
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()
    except BaseException:
        backend.close()
        raise
    return backend


def page_keys(tokens: Sequence[int], page_size: int = PAGE) -> list[str]:
    """Return SGLang's keys: sha256 of the digest of the page before and the token ids as little-endian uint32."""
    keys, digest = [], b""
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        ids = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page_size])
        digest = sha256(digest + ids).digest()
        keys.append(digest.hex())
    return keys


def publish_server(folder: Path, **arguments: Any) -> None:
    """Make this process an SGLang scheduler of one rank, as its settings are concerned."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    server = ServerArgs(model_path=str(folder), device="cpu", skip_tokenizer_init=True, **arguments)
    runtime_context.publish(server, role="scheduler")
    runtime_context.get_parallel().override_permanently(tp_rank=0, pp_rank=0, attn_tp_rank=0, attn_dp_rank=0)


class Controller:
    """SGLang's real HybridCacheController with its threads, its scheduler's part done here. Context manager.

    The pool on the device is a stand-in, because nothing is copied to it.
    """

    def __init__(self, folder: Path, pool: Any, **options: Any) -> None:
        from sglang.srt.mem_cache.hicache_storage import PoolName
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
        from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry

        self.pool = pool
        device = types.SimpleNamespace(
            device="cpu", layer_num=LAYERS, layer_shard_enabled=False, register_layer_transfer_counter=lambda _: None
        )
        kv = PoolEntry(
            name=PoolName.KV,
            host_pool=pool,
            device_pool=device,
            layer_mapper=lambda layer: layer,
            is_primary_index_anchor=True,
        )
        extra = storage_config(folder).extra_config
        extra = {name: value for name, value in {**extra, **options}.items() if value is not None}
        self.controller: Any = HybridCacheController(
            types.SimpleNamespace(get_kvcache=lambda: device),
            HostPoolGroup([kv]),
            PAGE,
            None,
            threading.Event(),
            storage_backend="dynamic",
            model_name="tiny",
            storage_backend_extra_config=extra,
        )

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.controller.detach_storage_backend()

    def back_up(self, tokens: Sequence[int], first_page: int = 0) -> int:
        """Have the backup thread store tokens that lie from a page on. Return how many were stored."""
        indices = torch.arange(first_page * PAGE, first_page * PAGE + len(tokens))
        self.controller.write_storage(indices, list(tokens), hash_value=page_keys(tokens))
        return self.controller.ack_backup_queue.get(timeout=60).completed_tokens

    def prefetch(self, tokens: Sequence[int], first_page: int = 0) -> tuple[int, int]:
        """Have the prefetch threads load tokens to a page and those after it. Return how many were found, and came."""
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

        operation = self.controller.prefetch(CacheRequestHandle("request", 0), list(tokens))
        operation = self.controller.prefetch_hit_queue.get(timeout=120)
        found = operation.storage_hit_count
        operation.host_indices = torch.arange(first_page * PAGE, first_page * PAGE + found)
        self.controller.prefetch_buffer.put(operation)
        came = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=60)
            came = ack.completed_tokens if ack.completed_tokens is not None else came
            if ack.completed_req:
                return found, came
