"""Sampling: chooses the next tokens of a batch on the device, each independently of the rest of the batch.

Random numbers are counted, not stepped: they are a hash of a request's seed, of the number of its token, and of the
token id. So no generator has a state, and a request that starts again at some token goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from tierkv.engine import draws
from tierkv.errors import ConfigError

_gpu_choose: Callable[..., None] | None
try:
    from tierkv.kernels.sampling import choose_tokens as _choose_kernel

    _gpu_choose = _choose_kernel
except ModuleNotFoundError:  # triton has no wheel for this machine
    _gpu_choose = None

__all__ = ["BatchSampler", "Choice", "Sampler", "Sampling", "SamplingOptions"]

_LEAST = 1e-30  # the smallest temperature and top_p: smaller ones change no choice, and float32 would round them to 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen.

    temperature: 0 is greedy. top_k: keep the k most likely tokens; 0 keeps all. top_p: keep the most likely tokens up
    to this share of the probability, in (0, 1]; 1 keeps all.
    seed: an integer of 64 bits. The same seed gives the same answers, whatever else is in the batch; None gives new
    ones each time. Equal prompts of one batch get different answers in both cases.
    top_logprobs: with each token its log-probability by the model, and those of so many most likely tokens; None: none.
    Raises ConfigError for values out of these ranges.

    >>> SamplingOptions(temperature=0.7, top_p=0.9, seed=1).seed
    1
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "top_logprobs"):
            value = getattr(self, name)
            if not (name != "top_k" and value is None) and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"temperature and top_k must not be negative and top_p must lie in (0, 1]: {self}")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ConfigError(f"top_logprobs must not be negative, got {self.top_logprobs}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be an integer of 64 bits, got {self.seed}")


class Sampler:
    """The sampling of one request: its options, its seed, and how many tokens it has drawn.

    num_drawn: tokens chosen so far. A token depends on the seed, on this number and on its logits alone, so a request
    that is computed again from some token on gets the same tokens.
    """

    def __init__(self, options: SamplingOptions, *, number: int = 0, state: int | None = None) -> None:
        """Start with the options' seed. number: the index of this prompt among equal prompts of the call.

        state: of another sampler, which then draws the same tokens.
        """
        self.options = options
        self.num_drawn: int = 0
        seed = options.seed
        if state is not None:
            self._seed = state
        else:
            self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else _seed_of(seed, number) % (1 << 64)
        self._row_start = (b"", 0)  # of `settings`: what stays the same, and for which vocabulary
        self._row_end = struct.pack("<i", options.top_logprobs is not None)

    @property
    def state(self) -> int:
        """The number on which all draws depend."""
        return self._seed

    @property
    def is_plain(self) -> bool:
        """Whether the token is the most likely one, without a log-probability."""
        return not self.options.temperature and self.options.top_logprobs is None

    def settings(self, vocabulary: int) -> bytes:
        """Return the settings of the next token's row: `draws.COLUMNS` numbers of 32 bits."""
        if self._row_start[1] != vocabulary:
            options = self.options
            temperature = max(options.temperature, _LEAST) if options.temperature else 0.0
            numbers = (temperature, min(options.top_k, vocabulary), max(options.top_p, _LEAST))
            self._row_start = (struct.pack("<fif", *numbers), vocabulary)
        key = xxhash.xxh3_64_intdigest(self.num_drawn.to_bytes(8, "little"), self._seed)
        return self._row_start[0] + key.to_bytes(8, "little") + self._row_end


@dataclass(slots=True)  # not frozen: that triples the time to make one, for each new token
class Choice:
    """A chosen token. With `top_logprobs`: its log-probability, and (token id, log-probability) of the most likely."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampling:
    """Tokens that the device chooses; `BatchSampler.start` makes it."""

    def __init__(
        self, packed: Tensor, samplers: Sequence[Sampler], listed: Sequence[int], done: torch.cuda.Event | None
    ) -> None:
        """packed: int32 on the CPU, valid after `done`: [2, rows], then the lists of the most likely tokens.

        listed: the rows that want such a list.
        """
        self._packed = packed
        self._samplers = samplers
        self._listed = listed
        self._done = done

    def wait(self) -> list[Choice]:
        """Block until the device has chosen, and return a choice for each row."""
        if self._done is not None:
            self._done.synchronize()
        count = len(self._samplers)
        numbers = self._packed.numpy()
        ids = numbers[:count].tolist()
        if all(sampler.options.top_logprobs is None for sampler in self._samplers):
            return [Choice(token) for token in ids]
        logprobs = numbers[count : 2 * count].view(np.float32).tolist()
        tops = _lists_of(numbers[2 * count :], self._listed)
        found = []
        for row, sampler in enumerate(self._samplers):
            wanted = sampler.options.top_logprobs
            if wanted is None:
                found.append(Choice(ids[row]))
            else:
                found.append(Choice(ids[row], logprobs[row], tops.get(row, ())[:wanted]))
        return found


class BatchSampler:
    """Chooses a token for each row of a batch, on the device of the logits: by one kernel on CUDA, else by torch."""

    def start(self, logits: Tensor, samplers: Sequence[Sampler], *, rows: Sequence[int] | None = None) -> Sampling:
        """Launch the choice on the current stream, and one copy to page-locked memory. Advance each sampler.

        logits: [sequences, vocabulary]; later work of the same stream may overwrite them. rows: which rows to choose
        for, ascending; None: all. samplers: one for each of these rows. Log-probabilities are the model's own, before
        temperature, `top_k` and `top_p`.
        """
        if rows is not None:
            logits = _rows_of(logits, rows)
        assert logits.shape[0] == len(samplers)
        vocabulary = logits.shape[-1]
        is_plain = all(sampler.is_plain for sampler in samplers)
        settings = None if is_plain else _settings_of(samplers, vocabulary, is_pinned=logits.is_cuda)
        chosen = _choose(logits, settings, samplers)
        wanted = [sampler.options.top_logprobs or 0 for sampler in samplers]
        listed = [row for row, count in enumerate(wanted) if count]
        parts = [chosen.flatten()]
        if listed:
            ids, logprobs = draws.most_likely(_rows_of(logits, listed), min(max(wanted), vocabulary))
            parts += [ids.to(torch.int32).flatten(), logprobs.view(torch.int32).flatten()]
        packed = parts[0] if len(parts) == 1 else torch.cat([part.to(chosen.device) for part in parts])
        done = None
        if packed.is_cuda:
            fetched = torch.empty(packed.shape, dtype=torch.int32, pin_memory=True)
            packed = fetched.copy_(packed, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(logits.device))
        for sampler in samplers:  # the last act: a choice that fails can be made again
            sampler.num_drawn += 1
        return Sampling(packed, samplers, listed, done)


def _choose(logits: Tensor, settings: Tensor | None, samplers: Sequence[Sampler]) -> Tensor:
    """Return [2, rows] int32, as `draws.choose_tokens` does, on the device if it can."""
    if logits.is_cuda and _gpu_choose is not None and logits.dtype != torch.float64:
        out = torch.empty(2, len(samplers), dtype=torch.int32, device=logits.device)
        with torch.cuda.device(logits.device):  # Triton launches on the current GPU, which need not be the model's
            _gpu_choose(
                logits if logits.stride(-1) == 1 else logits.contiguous(),
                None if settings is None else settings.to(logits.device, non_blocking=True),
                out,
                is_sampled=any(sampler.options.temperature for sampler in samplers),
                has_logprobs=any(sampler.options.top_logprobs is not None for sampler in samplers),
            )
        return out
    if settings is None:
        ids = logits.argmax(-1).to(torch.int32)
        return torch.stack([ids, torch.zeros_like(ids)])
    return draws.choose_tokens(logits, settings.numpy())


def _rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the named rows, ascending; a view if they are the first ones."""
    if rows[-1] == len(rows) - 1:
        return logits[: len(rows)]
    return logits[torch.tensor(rows, device=logits.device)]


def _settings_of(samplers: Sequence[Sampler], vocabulary: int, *, is_pinned: bool) -> Tensor:
    """Return [rows, COLUMNS] int32 on the CPU."""
    table = torch.empty(len(samplers), draws.COLUMNS, dtype=torch.int32, pin_memory=is_pinned)
    rows = b"".join([sampler.settings(vocabulary) for sampler in samplers])
    table.numpy()[:] = np.frombuffer(rows, dtype=np.int32).reshape(-1, draws.COLUMNS)
    return table


def _lists_of(numbers: npt.NDArray[np.int32], listed: Sequence[int]) -> dict[int, tuple[tuple[int, float], ...]]:
    """Return the most likely tokens of the listed rows, by row."""
    if not listed:
        return {}
    ids, logprobs = numbers.reshape(2, len(listed), -1)
    lists = zip(ids.tolist(), logprobs.view(np.float32).tolist(), strict=True)
    return {row: tuple(zip(*each, strict=True)) for row, each in zip(listed, lists, strict=True)}


def _seed_of(seed: int, number: int) -> int:
    """Return the seed itself for the first of equal prompts, and derived seeds for the others."""
    if not number:
        return int(seed)
    return xxhash.xxh3_64_intdigest(f"{seed}|{number}".encode())
