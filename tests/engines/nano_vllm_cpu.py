"""Runs nano-vLLM on a CPU. It asks for CUDA, NCCL, flash-attn and triton: each is replaced by what a CPU has.

`install` comes before nano-vLLM is imported, in a process of its own, for it replaces functions of torch.
"""

from __future__ import annotations

import importlib.machinery
import os
import socket
import sys
import types
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is worth compiling here
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed
import torch.nn.functional

__all__ = ["Memory", "install"]


class Memory:
    """What the engine believes to be the GPU's memory. The engine takes 90 % of it for its cache."""

    num_bytes = 64 << 20


def install() -> None:
    """Replace what is not there. Eager mode only: there are no CUDA graphs."""
    # Both look for optional packages while they are imported, so the stand-ins come after them.
    import torch._dynamo
    from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: F401

    flash_attn = stand_in("flash_attn")
    flash_attn.flash_attn_varlen_func = attend_varlen
    flash_attn.flash_attn_with_kvcache = attend_decode
    triton, language = stand_in("triton"), stand_in("triton.language")
    triton.jit = lambda function: function
    triton.language, language.constexpr = language, object
    packages = {"flash_attn": flash_attn, "triton": triton, "triton.language": language}
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(packages)

    replace_cuda()
    import nanovllm.layers.attention
    from nanovllm.layers.layernorm import RMSNorm
    from nanovllm.layers.sampler import Sampler

    nanovllm.layers.attention.store_kvcache = store_slots
    RMSNorm.forward = normalize
    Sampler.forward = torch.inference_mode()(
        Sampler.forward
    )  # compiled, it may write into the logits; plain torch refuses
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def stand_in(name: str) -> Any:
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def replace_cuda() -> None:
    init_process_group = torch.distributed.init_process_group
    set_default_device = torch.set_default_device
    tensor = torch.tensor
    module: Any = torch
    # nano-vLLM always takes port 2333; tests may run side by side.
    module.distributed.init_process_group = lambda _, __, **options: init_process_group(
        "gloo", f"tcp://localhost:{free_port()}", **options
    )
    module.set_default_device = lambda device: set_default_device("cpu" if device == "cuda" else device)
    module.tensor = lambda *args, pin_memory=False, **options: tensor(*args, **options)
    module.Tensor.cuda = lambda self, *args, **options: self
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats", "synchronize"):
        setattr(module.cuda, name, lambda *args: None)
    module.cuda.mem_get_info = lambda: (Memory.num_bytes, Memory.num_bytes)
    module.cuda.memory_stats = lambda: {"allocated_bytes.all.peak": 0, "allocated_bytes.all.current": 0}


def normalize(self: Any, x: Any, residual: Any = None) -> Any:
    """Compute nano-vLLM's RMSNorm. Its own writes into a copy in float32, which is no copy if the input is float32."""
    if residual is None:
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight
    return normalize(self, x + residual), x + residual


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def attend(query: Any, key: Any, value: Any, scale: float) -> Any:
    """Attend causally; the last query belongs to the last key. query: [new, heads, dim], key, value: [all, ...]."""
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found[0].transpose(0, 1)


def tokens_of(cache: Any, block_table: Any, num_tokens: int) -> Any:
    num_blocks = -(-num_tokens // cache.shape[1])
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[:num_tokens]


def attend_varlen(
    q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: float, block_table: Any, **_: Any
) -> Any:
    out = torch.empty_like(q)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        first_k, end_k = ends_k[i], ends_k[i + 1]
        if block_table is None:
            key, value = k[first_k:end_k], v[first_k:end_k]
        else:
            key, value = (tokens_of(each, block_table[i], end_k - first_k) for each in (k, v))
        new = slice(ends_q[i], ends_q[i + 1])
        out[new] = attend(q[new], key, value, softmax_scale)
    return out


def attend_decode(
    q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, block_table: Any, softmax_scale: float, **_: Any
) -> Any:
    out = torch.empty_like(q)
    for i, num_tokens in enumerate(cache_seqlens.tolist()):
        key, value = (tokens_of(each, block_table[i], num_tokens) for each in (k_cache, v_cache))
        out[i] = attend(q[i], key, value, softmax_scale)
    return out


def store_slots(key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> None:
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted].long()
    blocks, offsets = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[blocks, offsets] = key[wanted]
    v_cache[blocks, offsets] = value[wanted]
