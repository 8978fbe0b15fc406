"""The backend FlashInfer: its paged prefill kernels "fa2" and "fa3" over the hot pool as it is (extra `flashinfer`).

A layer's K and V are its "NHD" cache with the stride of a whole block between pages. The wrapper's `plan` works on the
CPU and copies a schedule up: once per step and shape of layers. In a graph's static batch the wrapper has buffers of
its own at fixed addresses, and is planned before each replay. Source: FlashInfer 0.6 (Ye et al., 2025).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.engine.attention_merge import add_sinks
from tierkv.engine.backends.protocol import AttentionPlan, Batch, LayerShape, PagedQuery
from tierkv.errors import ConfigError

__all__ = ["FlashInferBackend", "FlashInferLimits", "FlashInferWorkspace", "flashinfer_limits"]

_log = logging.getLogger(__name__)

_KNOWN_VERSION = "0.6"
_WORKSPACE_BYTES = 256 << 20
_GRAPH_SCHEDULE_BYTES = 2 << 20  # of 8 MiB, which FlashInfer takes by itself for each wrapper
_ALIGNED = 16  # numbers of int32: each array of a plan begins at 64 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferLimits:
    """What FlashInfer's kernels serve.

    missing: why none of them can be used at all, if so. head_dims: None: any. multiprocessors: of the device; 0 leaves
    its workspace unchecked.
    """

    devices: frozenset[str] = frozenset({"cuda"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})
    head_dims: frozenset[int] | None = frozenset({64, 128, 256})
    multiprocessors: int = 0
    missing: str | None = None


def flashinfer_limits(kernels: str, device: torch.device) -> FlashInferLimits:
    """Return what FlashInfer serves on a device. Does not import it."""
    if importlib.util.find_spec("flashinfer") is None:
        return FlashInferLimits(missing="flashinfer is not installed")
    if device.type != "cuda":
        return FlashInferLimits(missing=f"it does not run on {device.type}")
    installed = _installed_version()
    if not installed.startswith(f"{_KNOWN_VERSION}."):
        return FlashInferLimits(missing=f"tierkv knows FlashInfer {_KNOWN_VERSION}, and this is {installed}")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 or (kernels == "fa3" and major != 9):
        return FlashInferLimits(missing=f"no {kernels} kernels for compute capability {major}.{minor}")
    return FlashInferLimits(multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count)


def _installed_version() -> str:
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return "of an unknown version"


class FlashInferWorkspace:
    """Memory for partial results, made at the first use and shared by all plans: their layers run one after another."""

    def __init__(self, device: torch.device, num_bytes: int = _WORKSPACE_BYTES) -> None:
        self.device = device
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        self._memory: Tensor | None = None

    def get(self) -> Tensor:
        """Return the memory: [num_bytes] uint8."""
        with self._lock:
            if self._memory is None:
                self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
            return self._memory


@dataclass(slots=True)
class _Build:
    """The compilation of the kernels for some layers."""

    thread: threading.Thread | None = None
    error: str | None = None
    is_done: bool = False


@dataclass(slots=True)
class _Slot:
    """A wrapper that is planned anew in each step. planned: the number of its present plan."""

    wrapper: Any
    copied: torch.cuda.Event | None
    planned: int = 0


@dataclass(slots=True)
class _GraphBuffers:
    """The blocks that a graph reads at a fixed address, and the page-locked memory that its plans are made from."""

    blocks: Tensor
    host: Tensor


class FlashInferBackend:
    """FlashInfer's `BatchPrefillWithPagedKVCacheWrapper`, with one of its backends. For one thread, as a runner is.

    kernels: "fa2", or "fa3" for Hopper. limits: what it serves; workspace: shared with the other backend.
    """

    def __init__(self, kernels: str, *, limits: FlashInferLimits, workspace: FlashInferWorkspace) -> None:
        self.name = f"flashinfer-{kernels}"
        self._kernels = kernels
        self._limits = limits
        self._workspace = workspace
        self._slots: dict[tuple[LayerShape, int], _Slot] = {}
        self._builds: dict[LayerShape, _Build] = {}

    def why_not(self, layer: LayerShape, batch: Batch | None = None) -> str | None:
        """Return why it does not serve a layer, or a batch of it; None if it does."""
        limits = self._limits
        if limits.missing:
            return limits.missing
        if layer.device not in limits.devices:
            return f"it does not run on {layer.device}"
        if layer.dtype not in limits.dtypes:
            return f"it does not know {layer.dtype}"
        if layer.k_dim != layer.v_dim or (limits.head_dims is not None and layer.k_dim not in limits.head_dims):
            return f"it has no kernels for head dims {layer.k_dim} and {layer.v_dim}"
        build = self._builds.get(_kernel_of(layer))
        if build is not None and build.error is not None:
            return build.error
        needed = self._split_bytes(layer, batch)
        if needed > self._workspace.num_bytes:
            return f"its partial results need {needed} bytes, more than its workspace of {self._workspace.num_bytes}"
        return None

    def prepare(self, layer: LayerShape, *, wait: bool) -> bool:
        """Return whether its kernels for a layer are compiled; True too if they cannot be: see `why_not`.

        The first use on a machine takes one to two minutes of nvcc, later ones load a file. wait: until it is done.
        """
        kernel = _kernel_of(layer)
        build = self._builds.get(kernel)
        if build is None:
            build = self._builds[kernel] = _Build()
            build.thread = threading.Thread(
                target=self._build, args=(kernel, build), name=f"build {self.name}", daemon=True
            )
            build.thread.start()
        if wait and build.thread is not None:
            build.thread.join()
        return build.is_done

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch. A plan of a batch that is not static ends with the next one of its shape and part."""
        if batch.kv_range is not None:
            return _GraphPlan(self._graph_wrapper(batch), layer, batch, self._workspace.device)
        slot = self._slots.get((layer, batch.part))
        if slot is None:
            slot = self._slots[layer, batch.part] = _Slot(self._wrapper(self._workspace.get()), self._event())
        return _EagerPlan(slot, layer, batch, self._workspace.device)

    def _split_bytes(self, layer: LayerShape, batch: Batch | None) -> int:
        """Return the bytes of fa2's partial results at most, as its scheduler counts them; fa3 has none."""
        if self._kernels != "fa2" or not self._limits.multiprocessors:
            return 0
        programs, rows = 2 * self._limits.multiprocessors // layer.kv_heads, 128 if layer.v_dim < 256 else 64
        if batch is not None and batch.kv_range is not None:
            sequences, tokens = len(batch.query_starts) - 1, batch.query_starts[-1]
            group = layer.heads // layer.kv_heads
            longest = (tokens - sequences + 1) * group
            rows = 16 if longest <= 16 else 64 if longest <= 64 else rows
            programs = max(programs, -(-tokens * group // rows) + sequences - 1)
        return layer.heads * programs * rows * (layer.v_dim + 1) * 4

    def _build(self, layer: LayerShape, build: _Build) -> None:
        """Compile or load the kernels, by planning a batch of one token that nothing runs."""
        device = self._workspace.device
        try:
            one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            starts = torch.tensor([0, 1], dtype=torch.int32)
            with torch.cuda.device(device if device.type == "cuda" else -1):  # a new thread has the first one
                memory = torch.empty(1 << 20, dtype=torch.uint8, device=device)
                self._wrapper(memory).plan(starts, starts, zero, one, *_sizes(layer), **_options(layer))
                self._workspace.get()
        except Exception as exc:  # noqa: BLE001 - nvcc, ninja, the loader and torch's allocator each raise their own
            build.error = f"its kernels cannot be compiled here: {type(exc).__name__}: {exc}"
            _log.warning("%s is not used: %s", self.name, build.error)
        build.is_done = True

    def _wrapper(self, workspace: Tensor, **options: Any) -> Any:
        flashinfer: Any = importlib.import_module("flashinfer")
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self._kernels, **options)

    def _graph_wrapper(self, batch: Batch) -> tuple[Any, _GraphBuffers]:
        """Return a wrapper in FlashInfer's graph mode, and its buffers."""
        sequences, blocks, device = len(batch.query_starts) - 1, batch.host_table.size, self._workspace.device
        lengths = [sequences + 1, sequences + 1, sequences, blocks]
        buffers = _cut(torch.zeros(_room_of(lengths), dtype=torch.int32, device=device), lengths)
        host = torch.zeros(_room_of(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
        memory = self._workspace.get()
        wrapper = self._wrapper(
            memory,
            use_cuda_graph=True,
            qo_indptr_buf=buffers[0],
            paged_kv_indptr_buf=buffers[1],
            paged_kv_indices_buf=buffers[3],
            paged_kv_last_page_len_buf=buffers[2],
        )
        wrapper.reset_workspace_buffer(memory, torch.empty(_GRAPH_SCHEDULE_BYTES, dtype=torch.uint8, device=device))
        return wrapper, _GraphBuffers(buffers[3], host)

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self._workspace.device.type == "cuda" else None


class _EagerPlan:
    """A plan of one step."""

    def __init__(self, slot: _Slot, layer: LayerShape, batch: Batch, device: torch.device) -> None:
        self._slot = slot
        if slot.copied is not None:
            slot.copied.synchronize()  # of the plan before: the copy of its schedule must not read this one
        table = _csr_of(batch)
        lengths = [len(each) for each in table]
        host = torch.empty(_room_of(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
        starts, kv_starts, last, blocks = _filled(host, table)
        blocks = blocks.to(device, non_blocking=True)
        slot.wrapper.plan(starts, kv_starts, blocks, last, *_sizes(layer), **_options(layer))
        if slot.copied is not None:
            slot.copied.record(torch.cuda.current_stream(device))
        slot.planned += 1
        self._number = slot.planned

    def update(self, batch: Batch) -> None:
        raise AssertionError("a batch that is not static is planned once")

    def run(self, paged: PagedQuery) -> Tensor:
        """Run the wrapper."""
        assert self._slot.planned == self._number, "the wrapper has been planned for another batch since"
        return _run(self._slot.wrapper, paged)


class _GraphPlan:
    """A plan of a static batch, which is made anew before each replay."""

    def __init__(self, made: tuple[Any, _GraphBuffers], layer: LayerShape, batch: Batch, device: torch.device) -> None:
        self._wrapper, self._buffers = made
        self._layer = layer
        self._device = device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.update(batch)

    def update(self, batch: Batch) -> None:
        """Plan for the batch's present lengths and block tables."""
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: its copies must not read this step's numbers
        starts, kv_starts, last, host_blocks = _filled(self._buffers.host, _csr_of(batch))
        blocks = self._buffers.blocks[: len(host_blocks)]
        blocks.copy_(host_blocks, non_blocking=True)  # the wrapper's own copy from the CPU would wait for the device
        self._wrapper.plan(starts, kv_starts, blocks, last, *_sizes(self._layer), **_options(self._layer))
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def run(self, paged: PagedQuery) -> Tensor:
        """Run the wrapper. A CUDA graph may capture it."""
        return _run(self._wrapper, paged)


def _run(wrapper: Any, paged: PagedQuery) -> Tensor:
    query = paged.query.contiguous()
    out = torch.empty_like(query)
    pages = (paged.keys, paged.values)
    if paged.sinks is None:
        found: Tensor = wrapper.run(query, pages, out=out)
        return found
    # Its fa2 and fa3 kernels know no sinks; they change only the denominator. The log-sum-exp is in base 2.
    out, lse = wrapper.run(query, pages, out=out, return_lse=True)
    return add_sinks(out, lse * math.log(2), paged.sinks)


def _csr_of(batch: Batch) -> tuple[npt.NDArray[np.int32], ...]:
    """Return where each sequence's queries and blocks begin, the tokens in its last block, and the blocks; int32.

    It is `csr_block_table` on the CPU, in numpy, which takes a tenth of torch's time for so little.
    """
    lengths = np.array(batch.kv_lengths, dtype=np.int32)
    counts = -(-lengths // batch.block_size)
    blocks = batch.host_table[np.arange(batch.host_table.shape[1]) < counts[:, None]]
    if len(blocks) != counts.sum():
        raise ConfigError(f"a block table of {batch.host_table.shape[1]} blocks does not hold {lengths.max()} tokens")
    last = lengths - (counts - 1) * batch.block_size
    kv_starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=kv_starts[1:])
    return np.array(batch.query_starts, dtype=np.int32), kv_starts, last, blocks


def _room_of(lengths: Sequence[int]) -> int:
    """Return how many numbers arrays of these lengths take one behind the other, each aligned."""
    return sum(-(-length // _ALIGNED) * _ALIGNED for length in lengths)


def _cut(memory: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return views of one tensor, of these lengths, each aligned."""
    views, at = [], 0
    for length in lengths:
        views.append(memory[at : at + length])
        at += -(-length // _ALIGNED) * _ALIGNED
    return views


def _filled(memory: Tensor, arrays: Sequence[npt.NDArray[np.int32]]) -> list[Tensor]:
    """Write arrays into one tensor on the CPU; return a view for each."""
    views = _cut(memory, [len(array) for array in arrays])
    for view, array in zip(views, arrays, strict=True):
        view.numpy()[:] = array
    return views


def _sizes(layer: LayerShape) -> tuple[int, int, int, int]:
    return layer.heads, layer.kv_heads, layer.k_dim, layer.block_size


def _options(layer: LayerShape) -> dict[str, Any]:
    return {
        "causal": True,
        "sm_scale": layer.scale,
        "window_left": layer.window - 1 if layer.window else -1,
        "logits_soft_cap": layer.softcap or 0.0,
        "q_data_type": layer.dtype,
        "kv_data_type": layer.dtype,
    }


def _kernel_of(layer: LayerShape) -> LayerShape:
    """Return the layer that stands for all with the same kernels: types, dims, and whether it has a window or a cap."""
    return LayerShape(
        layer.device,
        layer.dtype,
        1,
        1,
        layer.k_dim,
        layer.v_dim,
        1,
        1.0,
        1 if layer.window else None,
        1.0 if layer.softcap else None,
    )
