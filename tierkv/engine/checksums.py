"""Checksums: finds changed bytes in a model's tensors by samples of all of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from math import gcd
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from tierkv.engine.model_state import local_part

__all__ = ["PHASES", "WHOLE_BYTES", "Checksums"]

PHASES = 2048
"""One sample reads every 2048th line of 1 KiB, and at least one line of each tensor; 2048 samples read all bytes."""

WHOLE_BYTES = 8 << 20
"""Up to this total size, every sample reads all bytes of the tensors."""

_LINE_BYTES = 1024

Fetch: TypeAlias = Callable[[], "npt.NDArray[np.int64]"]
"""Waits for a sample's sums, and returns them."""


class Checksums:
    """Sums of tensors' bytes at construction, compared with later sums. Construction reads all bytes once.

    The tensors must stay at their addresses. The next sample is certain to find a change of 2 MiB in a row (PHASES
    lines); one of the next PHASES samples finds a single changed word; `is_same` finds both at once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        memory = _by_memory(tensors)
        self.num_bytes: int = sum(each.numel() for each in memory)
        self.phases = 1 if self.num_bytes <= WHOLE_BYTES else PHASES
        self._samplers = [
            sampler_of(device)([each for each in memory if each.device == device], self.phases)
            for device in dict.fromkeys(each.device for each in memory)
        ]
        self._phase = 0
        self._known = [self._sums(phase) for phase in range(self.phases)]

    def start(self, after: torch.cuda.Event | None = None) -> Callable[[], bool]:
        """Start the next sample. Return a function that waits for it and returns whether its bytes are unchanged.

        On a GPU the sample follows the work of the current stream. With `after` it follows only that event, on a
        separate stream, beside the later work of the current stream.
        """
        phase, self._phase = self._phase, (self._phase + 1) % self.phases
        fetches = [sampler.start(phase, after) for sampler in self._samplers]
        known = self._known[phase]
        return lambda: all(np.array_equal(fetch(), old) for fetch, old in zip(fetches, known, strict=True))

    def is_same(self) -> bool:
        """Read all bytes; return whether they are unchanged."""
        return all(
            np.array_equal(now, old)
            for phase, known in enumerate(self._known)
            for now, old in zip(self._sums(phase), known, strict=True)
        )

    def _sums(self, phase: int) -> list[npt.NDArray[np.int64]]:
        return [sampler.start(phase, None)().copy() for sampler in self._samplers]


def sampler_of(device: torch.device) -> type[_HostSampler | _TorchSampler | _KernelSampler]:
    """Return the class that takes samples on a device."""
    if device.type == "cpu":
        return _HostSampler
    has_kernel = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return _KernelSampler if has_kernel else _TorchSampler


class _HostSampler:
    """Hashes samples in the calling thread."""

    def __init__(self, memory: list[Tensor], phases: int) -> None:
        self._lines: list[tuple[npt.NDArray[np.uint8], int]] = []
        self._ends: list[npt.NDArray[np.uint8]] = []
        for each in memory:
            found = each.numpy()
            whole = len(found) // _LINE_BYTES * _LINE_BYTES
            if whole:
                lines = found[:whole].reshape(-1, _LINE_BYTES)
                self._lines.append((lines, min(phases, len(lines))))
            if whole < len(found):
                self._ends.append(found[whole:])

    def start(self, phase: int, after: torch.cuda.Event | None = None) -> Fetch:
        samples = [lines[phase % stride :: stride] for lines, stride in self._lines]
        sums = [_digest(each.data if each.flags.c_contiguous else each.tobytes()) for each in samples]
        sums += [_digest(end.data) for end in self._ends]
        found = np.array(sums, dtype=np.uint64).view(np.int64)
        return lambda: found


class _KernelSampler:
    """Sums samples by a kernel and copies the sums to page-locked memory."""

    def __init__(self, memory: list[Tensor], phases: int) -> None:
        from tierkv.kernels import checksums

        self._sum_lines = checksums.sum_lines
        by_word: dict[int, list[tuple[int, int, int, int]]] = {}
        for each in memory:
            size = each.numel()
            word = gcd(8, each.data_ptr(), size)
            num_lines = -(-size // _LINE_BYTES)
            stride = min(phases, num_lines)
            for first in range(0, -(-num_lines // stride), checksums.LINES_PER_PIECE):
                by_word.setdefault(word, []).append((each.data_ptr(), size // word, stride, first))
        device = memory[0].device
        self._memory = memory  # keeps the memory at the addresses alive
        self._pieces = [(word, torch.tensor(each, device=device).T.contiguous()) for word, each in by_word.items()]
        self._counts = [pieces.shape[1] for _, pieces in self._pieces]
        self._device = device
        self._beside: torch.cuda.Stream | None = None

    def start(self, phase: int, after: torch.cuda.Event | None = None) -> Fetch:
        if self._device.type != "cuda":  # triton interprets the kernel
            return self._sum(phase).numpy
        # Triton launches on the current GPU, which need not be the model's.
        with torch.cuda.device(self._device):
            if after is None:
                return self._start_on_current_stream(phase)
            self._beside = self._beside or torch.cuda.Stream(self._device)
            self._beside.wait_event(after)
            with torch.cuda.stream(self._beside):
                return self._start_on_current_stream(phase)

    def _start_on_current_stream(self, phase: int) -> Fetch:
        sums = self._sum(phase)
        found = torch.empty(sums.shape, dtype=torch.int64, pin_memory=True)
        found.copy_(sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))

        def fetch() -> npt.NDArray[np.int64]:
            done.synchronize()
            return found.numpy()

        return fetch

    def _sum(self, phase: int) -> Tensor:
        sums = torch.empty(sum(self._counts), dtype=torch.int64, device=self._device)
        for (word, pieces), part in zip(self._pieces, sums.split(self._counts), strict=True):
            self._sum_lines(pieces, part, phase=phase, word_bytes=word)
        return sums


class _TorchSampler:
    """Hashes samples that torch gathers: slow, for devices without the kernel."""

    def __init__(self, memory: list[Tensor], phases: int) -> None:
        self._memory = memory
        self._phases = phases

    def start(self, phase: int, after: torch.cuda.Event | None = None) -> Fetch:
        samples = []
        for each in self._memory:
            whole = each.numel() // _LINE_BYTES * _LINE_BYTES
            lines = each[:whole].view(-1, _LINE_BYTES)
            stride = max(1, min(self._phases, len(lines)))
            samples += [lines[phase % stride :: stride].reshape(-1), each[whole:]]
        gathered = torch.cat(samples)
        return lambda: np.array([_digest(gathered.cpu().numpy().data)], dtype=np.uint64).view(np.int64)


_digest = xxhash.xxh3_64_intdigest


def _by_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the memory of tensors as bytes, each range once even if several tensors share it."""
    found: dict[tuple[torch.device, int, int], Tensor] = {}
    for tensor in tensors:
        part = local_part(tensor).detach()
        if part.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
            memory = part.as_strided((span,), (1,)).view(torch.uint8)
            found[memory.device, memory.data_ptr(), memory.numel()] = memory
    return list(found.values())
