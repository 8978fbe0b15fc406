"""nano-vLLM's `LLM` with tiers below its KV cache."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import nanovllm
import torch
from nanovllm.utils.context import get_context

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.store import BlockStore
from tierkv.block_store.transfers import Load
from tierkv.errors import StoreError, UnsupportedModelError
from tierkv.integrations.nano_vllm.block_manager import BlockCounts, TieredBlockManager, TieredScheduler
from tierkv.integrations.nano_vllm.identity import namespace_of
from tierkv.integrations.nano_vllm.keys import SequenceKeys
from tierkv.integrations.nano_vllm.load_planner import LoadPlanner
from tierkv.integrations.nano_vllm.save_queue import SaveQueue
from tierkv.remote_tiers.urls import RemoteOption

__all__ = ["LLM", "BlockCounts"]

_log = logging.getLogger(__name__)

_SAVE_BYTES_PER_STEP = 64 << 20
"""Bytes copied to memory beside one decode step: 1.3 ms of the bus, less than a step of a small model."""

_TRIAL_TOKENS = (512, 512, 4096, 4096)  # the first of each size compiles


class LLM(nanovllm.LLM):  # type: ignore[misc]
    """nano-vLLM's engine, whose prompts and answers are found again after eviction, preemption and a restart.

    model and all other arguments: of nano-vLLM's `LLM`. path: directory of the store, which several processes may have
    open; None keeps blocks in memory only. warm_bytes: page-locked memory; one prompt loads at most half of it at
    once. cold_bytes: quota of a new store. remote: URLs of remote tiers (docs/remote.md). salt: separates tenants.
    weights: what `python -m tierkv.integrations.weights MODEL` prints; None reads all weight files for it.
    Raises UnsupportedModelError for more than one GPU and for a model whose files do not contain all its parameters,
    ConfigError and StoreError for a store that cannot be used.
    """

    _has_exited = False
    _store: BlockStore | None = None  # the engine may exit before it has one
    _attention: Sequence[Any] = ()

    def __init__(
        self,
        model: str | Path,
        *,
        path: str | Path | None = None,
        warm_bytes: int = 8 << 30,
        cold_bytes: int | None = None,
        remote: RemoteOption = (),
        salt: str = "",
        weights: str | None = None,
        **options: Any,
    ) -> None:
        if options.get("tensor_parallel_size", 1) != 1:
            raise UnsupportedModelError(
                "tierkv runs nano-vLLM on one GPU: its other ranks are processes of a class that cannot be chosen, "
                "and they cannot answer how many blocks they have",
                hint="use tensor_parallel_size=1",
            )
        config = BlockStoreConfig(
            cold_path=None if path is None else Path(path), warm_bytes=warm_bytes, cold_bytes=cold_bytes, remote=remote
        )
        super().__init__(str(model), **options)
        try:
            self._open(config, salt, weights)
        except BaseException:
            self.exit()  # the process group, its port and the GPU memory would stay
            raise

    @property
    def store(self) -> BlockStore:
        """The tiers; its `stats` count hits, misses and bytes."""
        assert self._store is not None
        return self._store

    @property
    def counts(self) -> BlockCounts:
        """Where the whole blocks of the prompts so far came from."""
        counts: BlockCounts = self.scheduler.block_manager.counts
        return counts

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Run one step of the engine, as nano-vLLM does."""
        manager, started_s = self.scheduler.block_manager, time.perf_counter()
        try:
            outputs, num_tokens = super().step()
            has_loaded = bool(manager.loads)
        finally:
            self._end_loads()
        if num_tokens > 0 and not has_loaded:
            self._planner.record_compute(num_tokens, time.perf_counter() - started_s)
        if self._saves.num_pending and self.is_finished():
            self._saves.save(self._saves.num_pending)
        return outputs, num_tokens

    def flush(self) -> None:
        """Wait until all blocks computed so far are on disk. Raises StoreError where that cannot be."""
        num_before = -1
        while num_before not in (self._saves.num_pending, 0):  # what is written makes room for what is pending
            num_before = self._saves.num_pending
            self._saves.save(num_before)
            self.store.flush()

    def exit(self) -> None:
        """Write what is not on disk yet, and end the engine. May be called twice."""
        if self._has_exited:
            return
        self._has_exited = True
        atexit.unregister(self.exit)
        try:
            if self._store is not None:
                self._planner.close()
                with self._store:
                    self.flush()
        except StoreError as exc:
            _log.warning("the last blocks are not on disk: %s", exc)
        finally:
            self._attention = ()  # it would keep the GPU memory
            super().exit()

    def _open(self, config: BlockStoreConfig, salt: str, weights: str | None) -> None:
        trials = self._time_prefills()
        store = BlockStore(config, namespace=namespace_of(self.model_runner, salt=salt, weights=weights))
        try:
            self._put_below(store)
        except BaseException:
            store.close()
            raise
        self._store = store
        for num_tokens, seconds in trials:
            self._planner.record_compute(num_tokens, seconds)

    def _put_below(self, store: BlockStore) -> None:
        """Connect the engine, which has run nothing that must be kept, with the store."""
        runner = self.model_runner
        memory = store.register([list(layer) for layer in zip(*runner.kv_cache, strict=True)])
        keys = SequenceKeys(store)
        idle = torch.cuda.Stream() if runner.kv_cache.is_cuda else None
        self._saves = SaveQueue(
            store, memory, keys, idle_stream=lambda: torch.cuda.stream(idle) if idle else nullcontext()
        )
        self._planner = LoadPlanner(store, memory, keys)
        scheduler = TieredScheduler(runner.config)
        manager = scheduler.block_manager = TieredBlockManager(
            runner.config.num_kvcache_blocks,
            runner.block_size,
            planner=self._planner,
            saves=self._saves,
            is_busy=lambda: bool(scheduler.running),
        )
        manager.on_load = self._wait_by_layer
        self.scheduler = scheduler
        self._blocks_per_step = max(1, _SAVE_BYTES_PER_STEP // store.layout.block_bytes)
        self._attention = [module for module in runner.model.modules() if hasattr(module, "k_cache")]
        self._hooks: list[Any] = []
        runner.sampler.register_forward_pre_hook(self._save_beside_step)

    def _time_prefills(self) -> list[tuple[int, float]]:
        """Return tokens and seconds of prefills of about two sizes. The engine forgets what it computed here."""
        config = self.model_runner.config
        most = min(
            config.max_model_len - 1,
            config.max_num_batched_tokens,
            config.num_kvcache_blocks * config.kvcache_block_size - 1,
        )
        sampling = nanovllm.SamplingParams(max_tokens=1, ignore_eos=True)
        found: list[tuple[int, float]] = []
        cache = self.model_runner.kv_cache
        with torch.random.fork_rng([cache.device] if cache.is_cuda else []):
            for num_tokens in _TRIAL_TOKENS:
                tokens = [len(found)] * max(1, min(num_tokens, most))  # other ones each time, so nothing is a hit
                self.add_request(tokens, sampling)
                started_s = time.perf_counter()
                while not self.is_finished():
                    super().step()
                found.append((len(tokens), time.perf_counter() - started_s))
        return found[1::2]

    def _save_beside_step(self, *_: Any) -> None:
        """Save blocks of earlier steps. Called when a step is queued on the GPU, and has yet to be waited for."""
        num_blocks = self._saves.num_pending if get_context().is_prefill else self._blocks_per_step
        self._saves.save(num_blocks)

    def _wait_by_layer(self, load: Load) -> None:
        """Have each attention layer of this step wait for its own part of a load."""
        for layer, module in enumerate(self._attention):
            self._hooks.append(module.register_forward_pre_hook(partial(_wait_for_layer, load, layer)))

    def _end_loads(self) -> None:
        self.scheduler.block_manager.loads.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _wait_for_layer(load: Load, layer: int, *_: Any) -> None:
    load.wait(layer)
