"""GenerateCall: one cached call of `generate`, from the plan before its prefill to the save after its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.block_store.keys import BlockKeys
from tierkv.block_store.store import BlockStore
from tierkv.errors import TierKVError
from tierkv.integrations.transformers.blocks import BlockCopier, ComputingIsFaster, Prefix
from tierkv.integrations.transformers.identity import ModelGuard
from tierkv.integrations.transformers.recorder import Recorder
from tierkv.integrations.transformers.rows import Row, Uncached, check_request, has_plain_positions, rows_of
from tierkv.integrations.transformers.statistics import StatsRecorder

__all__ = ["CachedModel", "GenerateCall"]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """What all calls of one model share. caches_padding: padded rows may be cached."""

    model: Any
    store: BlockStore
    blocks: BlockCopier
    guard: ModelGuard
    stats: StatsRecorder
    caches_padding: bool


class _UnknownPrefill(Exception):  # noqa: N818 - the call goes on as plain `generate`
    """The prefill does not begin where the loaded prefix ends."""


class GenerateCall:
    """One call of `generate`. Used by one thread.

    Transformers calls, in this order: `prefill` once, `add_pass` before each forward pass, and `finish`.
    fault: why the call is not cached; set before the prefill, or by it.
    """

    def __init__(self, cached: CachedModel, fault: str | None) -> None:
        self.fault = fault
        self._cached = cached
        self._recorder: Recorder | None = None
        self._rows: list[Row] = []
        self._config: Any = None
        self._prompt: Tensor | None = None  # while the prefill runs: what it computes, padding included
        self._is_prefilled = False
        self._saved: set[bytes] = set()

    def prefill(
        self, original: Callable[..., Any], input_ids: Tensor, config: Any, arguments: dict[str, Any], **options: Any
    ) -> Any:
        """Run the prefill over what is not in the store. arguments: of the forward pass; the cache is one of them."""
        if self.fault is None and not self._is_prefilled:
            try:
                return self._cached_prefill(original, input_ids, config, arguments, **options)
            except Uncached as exc:
                self.fault = str(exc)
        return original(input_ids, config, arguments, **options)

    def add_pass(self, inputs: Mapping[str, Any]) -> None:
        """Record a forward pass that follows. inputs: its arguments."""
        recorder = self._recorder
        if recorder is None or not any(each is recorder.cache for each in inputs.values()):
            return
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if ids is None or positions is None or not self._is_known(recorder, ids, positions):
            if self._prompt is not None and recorder.num_slots:
                raise _UnknownPrefill
            recorder.detach()
            self._recorder = None
            return
        recorder.add_pass(ids, positions)

    def detach(self) -> None:
        """End the recording. Nothing is saved of a call that raises."""
        if self._recorder is not None:
            self._recorder.detach()

    def finish(self, result: Any) -> None:
        """Save what is new. result: what `generate` returned."""
        recorder, self._recorder = self._recorder, None
        if recorder is None or not self._is_prefilled:
            self.fault = self.fault or "no prefill that tierkv knows"
            return
        sequences = result if isinstance(result, Tensor) else result.sequences
        with self._saving():
            self._check_recorded(recorder)
            tokens = recorder.tokens().numpy()
            for row, index, num_tokens in self._kept_rows(tokens, sequences.cpu().numpy()):
                own = tokens[index, row.pad : row.pad + num_tokens]
                self._save_row(recorder, row, index, self._cached.store.keys(own))

    def _cached_prefill(
        self, original: Callable[..., Any], input_ids: Tensor, config: Any, arguments: dict[str, Any], **options: Any
    ) -> Any:
        cached, slots = self._cached, input_ids.shape[-1]
        name = check_request(cached.model, config, arguments)
        found = rows_of(input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))
        if not cached.caches_padding and any(pad for _, pad, _ in found):
            raise Uncached("padding: K and V of this model depend on it")
        if fault := cached.guard.fault():
            raise Uncached(fault)
        cache, before = arguments[name], dict(arguments)
        self._config = config
        self._recorder = recorder = Recorder(cache, cached.model.device)
        try:
            self._rows = [Row(indices, pad, tokens, cached.store.keys(tokens)) for indices, pad, tokens in found]
            prefix = self._load(slots)
            recorder.attach()
            if prefix:
                self._fill(recorder, prefix, input_ids)
        except (TierKVError, torch.OutOfMemoryError) as exc:
            self._start_anew(arguments, before, name)
            raise Uncached(f"{type(exc).__name__}: {exc}") from exc
        self._prompt = input_ids
        start = time.perf_counter()
        try:
            outputs = original(input_ids, config, arguments, **options)
        except _UnknownPrefill:
            self._start_anew(arguments, before, name)
            raise Uncached("a prefill that tierkv does not know") from None
        finally:
            self._prompt = None
        self._is_prefilled = True
        self._count(prefix, input_ids, start)
        if self._recorder is recorder and recorder.has_windows:  # later they no longer have the whole prompt
            self._save_prompt(recorder)
        return outputs

    def _start_anew(self, arguments: dict[str, Any], before: dict[str, Any], name: str) -> None:
        """End the recording, and make the arguments of the prefill what they were, with an empty cache."""
        self.detach()
        self._recorder = None
        cache = type(before[name])(config=self._cached.model.config.get_text_config(decoder=True))
        arguments.clear()
        arguments.update({**before, name: cache})

    def _load(self, num_slots: int) -> Prefix | None:
        """Return K and V of the slots that are in the store and worth loading."""
        cached = self._cached
        num_covered = cached.blocks.find(self._rows, num_slots)
        if num_covered <= min(row.pad for row in self._rows):
            return None
        try:
            return cached.blocks.load(self._rows, num_covered, num_prompt_slots=num_slots)
        except ComputingIsFaster:
            cached.stats.add(num_computed_by_choice=1)
            return None

    def _fill(self, recorder: Recorder, prefix: Prefix, input_ids: Tensor) -> None:
        """Put K and V of a prefix into the cache, for every row of the batch."""
        source = np.zeros(len(input_ids), dtype=np.int64)
        for at, row in enumerate(self._rows):
            source[row.indices] = at
        device = prefix.layers[0][0].device
        order = None if len(self._rows) == len(source) else torch.from_numpy(source).to(device)
        pads = torch.tensor([self._rows[at].pad for at in source])[:, None]
        recorder.add_pass(input_ids[:, : prefix.num_slots].clone(), torch.arange(prefix.num_slots)[None] - pads)
        for layer in range(len(prefix.layers)):
            keys, values = prefix.layers[layer]
            prefix.layers[layer] = (torch.empty(0), torch.empty(0))  # one layer at a time is there twice
            if order is not None:
                keys, values = keys[order], values[order]
            recorder.cache.update(keys, values, layer)

    def _count(self, prefix: Prefix | None, input_ids: Tensor, start: float) -> None:
        """Record what the prefill took and how many tokens it computed."""
        cached = self._cached
        num_loaded = prefix.num_slots if prefix else 0
        if cached.model.device.type == "cuda":
            torch.cuda.current_stream(cached.model.device).synchronize()
        num_computed = input_ids.shape[0] * (input_ids.shape[1] - num_loaded)
        cached.blocks.choice.record_compute(num_computed, time.perf_counter() - start)
        loaded = [max(0, num_loaded - row.pad) for row in self._rows]
        cached.stats.add(
            num_hit_calls=bool(num_loaded),
            num_loaded_tokens=sum(loaded),
            num_computed_tokens=sum(len(row.tokens) for row in self._rows) - sum(loaded),
        )

    def _is_known(self, recorder: Recorder, ids: Any, positions: Any) -> bool:
        """Return whether a pass has tokens and positions, and in a prefill goes on where the slots so far end."""
        if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.dim() != 2:
            return False
        if ids.dim() != 2 or positions.shape[1] != ids.shape[1]:
            return False
        if self._prompt is None:
            return True
        first = recorder.num_slots
        want = self._prompt[:, first : first + ids.shape[1]]
        return want.shape == ids.shape and torch.equal(want.to(ids.device), ids)

    def _save_prompt(self, recorder: Recorder) -> None:
        """Save the new whole blocks of the prompts."""
        with self._saving():
            self._check_recorded(recorder)
            for row in self._rows:
                self._save_row(recorder, row, row.indices[0], row.keys)
                row.num_known = len(row.keys)
            recorder.keep_last(self._cached.store.block_size)
        if self.fault:
            recorder.detach()
            self._recorder = None

    def _save_row(self, recorder: Recorder, row: Row, index: int, keys: BlockKeys) -> None:
        """Save the blocks of one row of the batch that are not known."""
        start = row.num_known
        while start < len(keys) and keys[start].block_hash in self._saved:
            start += 1
        if start >= len(keys):
            return

        def keys_and_values(layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
            return recorder.keys_and_values(layer, index, row.pad + first, row.pad + end)

        num_saved = self._cached.blocks.save(keys, start, len(keys), keys_and_values)
        self._saved.update(key.block_hash for key in keys[start:])
        self._cached.stats.add(num_saved_blocks=num_saved)

    def _check_recorded(self, recorder: Recorder) -> None:
        """Raise Uncached unless all that was computed may be saved."""
        pads = [0] * sum(len(row.indices) for row in self._rows)
        for row in self._rows:
            for index in row.indices:
                pads[index] = row.pad
        if not recorder.is_complete(self._cached.store.layout):
            raise Uncached("the cache has not what the passes wrote")
        if not has_plain_positions(recorder.positions().numpy(), pads):
            raise Uncached("positions that do not count from 0")
        if fault := self._cached.guard.fault():
            raise Uncached(fault)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Turn what prevents a save into the call's fault."""
        try:
            yield
        except Uncached as exc:
            self.fault = f"not saved: {exc}"
        except (TierKVError, torch.OutOfMemoryError) as exc:
            self.fault = f"not saved: {type(exc).__name__}: {exc}"

    def _kept_rows(self, tokens: npt.NDArray[Any], sequences: npt.NDArray[Any]) -> Iterator[tuple[Row, int, int]]:
        """Yield the rows to save: the row, its index in the batch, and how many of its own tokens.

        Of beams only what is in a returned sequence. tokens: of all slots; sequences: what `generate` returns.
        """
        num_rows = len(tokens)
        num_beams = self._config.num_beams or 1
        num_returned = max(1, len(sequences) * num_beams // num_rows)
        rows = {index: row for row in self._rows for index in row.indices}
        for at, sequence in enumerate(sequences):
            first = at // num_returned * num_beams
            row = rows[first]
            own = self._without_padding(sequence[row.pad :], len(row.tokens))
            counts = [_num_equal(own, tokens[index, row.pad :]) for index in range(first, first + num_beams)]
            best = int(np.argmax(counts))
            yield row, first + best, counts[best]

    def _without_padding(self, own: npt.NDArray[Any], num_prompt_tokens: int) -> npt.NDArray[Any]:
        """Return a sequence without what follows the token that ended it."""
        ends = self._config.eos_token_id
        is_end = np.isin(own[num_prompt_tokens:], [] if ends is None else ends)
        return own[: num_prompt_tokens + int(is_end.argmax()) + 1] if is_end.any() else own


def _num_equal(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> int:
    """Return how many leading tokens are equal."""
    count = min(len(left), len(right))
    differs = left[:count] != right[:count]
    return int(differs.argmax()) if differs.any() else count
