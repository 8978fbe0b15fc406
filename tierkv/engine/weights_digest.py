"""The digest of a model's weights, which a start computes once: as fast as the bus of the GPU and memory allow."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local

import torch
import xxhash
from torch import Tensor

from tierkv.engine.model_reader import read_state
from tierkv.engine.model_state import ModelState, local_part
from tierkv.errors import UnsupportedModelError

__all__ = ["weights_digest"]

_PIECE_BYTES = 16 << 20
_MAX_THREADS = 8
_PIECES_AHEAD = 4  # of each thread


def weights_digest(model: torch.nn.Module, state: ModelState | None = None) -> str:
    """Return xxh3-128, in hex, over name, dtype, shape and bytes of every tensor that a model holds.

    These are parameters, all buffers (rope frequencies among them) and tensors in plain attributes. So weights that
    were quantised, merged with an adapter or changed in memory make another model, and the device makes no difference.
    Reads all weights once, in pieces that several threads copy and hash. state: the model's, if the caller has read it
    already. Raises UnsupportedModelError if weights are not in memory.
    """
    state = state or read_state(model)
    digest = xxhash.xxh3_128()
    for part in _parts(model, state):
        digest.update(part)
    return digest.hexdigest()


def _parts(model: torch.nn.Module, state: ModelState) -> Iterator[bytes]:
    """Yield each tensor's description and then the digests of its pieces, which are made ahead."""
    ahead: deque[bytes | Future[bytes]] = deque()
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="tierkv-weights") as threads:
        hasher = _PieceHasher()
        for name, tensor in sorted(state.tensors.items()):
            if name in state.volatile:
                continue
            if tensor.device.type == "meta":
                raise UnsupportedModelError(f"{type(model).__name__} is not all in memory: {name} is not")
            split = f"{tensor.placements}|" if hasattr(tensor, "placements") else ""
            own = local_part(tensor).detach()
            ahead.append(f"{name}|{own.dtype}|{tuple(own.shape)}|{split}".encode())
            for piece in _pieces(own):
                ahead.append(threads.submit(hasher.digest, piece))
                while len(ahead) > num_threads * _PIECES_AHEAD:
                    yield _result(ahead.popleft())
        while ahead:
            yield _result(ahead.popleft())


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's bytes in pieces of bounded size, where the tensor is."""
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()  # other streams read it
    yield from flat.split(_PIECE_BYTES)


def _result(part: bytes | Future[bytes]) -> bytes:
    return part if isinstance(part, bytes) else part.result()


class _PieceHasher:
    """Hashes pieces in any thread. Those of a GPU pass through page-locked memory, which each thread has of its own."""

    def __init__(self) -> None:
        self._of_thread = local()

    def digest(self, piece: Tensor) -> bytes:
        """Return xxh3-128 over a flat piece of bytes."""
        if not piece.is_cuda:
            return xxhash.xxh3_128_digest(piece.cpu().numpy().data)
        own = self._of_thread
        if not hasattr(own, "memory"):
            own.memory = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            own.streams = {}
        if piece.device not in own.streams:
            own.streams[piece.device] = torch.cuda.Stream(piece.device)
        stream, memory = own.streams[piece.device], own.memory[: piece.numel()]
        with torch.cuda.stream(stream):
            memory.copy_(piece, non_blocking=True)
        stream.synchronize()
        return xxhash.xxh3_128_digest(memory.numpy().data)
