"""A secondary tier of vLLM's own KV offloading (TieringOffloadingSpec): chunks of the CPU tier in a block store.

vLLM loads this module by name (docs/vllm-tier.md); `import tierkv` never does. One source for vLLM 0.26 to 0.33: later
versions have more fields in their values, and load a tier by `module_path`, where 0.26 wants it registered.
Source: vLLM's SecondaryTierManager and its own FileSystemTierManager.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_offload import base as offload_base
from vllm.v1.kv_offload.base import LookupResult, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Buffers
from tierkv.errors import ConfigError
from tierkv.integrations.rows import DigestRows, store_config
from tierkv.integrations.vllm.tier_identity import chunk_namespace, engine_fields, folder_weights
from tierkv.integrations.weights import weights_digest
from tierkv.values.checks import check_flag

__all__ = ["TierkvOffloadingConnector", "TierkvTier", "TierkvTieringSpec"]

_log = logging.getLogger("vllm.tierkv")  # below vLLM's own logger, which shows its messages

_NAME = "TierkvTier"
_ATTENTION_PACKAGES = ("flashinfer-python", "flash-attn")
_LAYOUT_SETTINGS = ("VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND")
_GROUP_BYTES = 4
_LOAD_THREADS = 2
_MOST_LOST = 1 << 16
_MOST_PENDING = 64


class TierkvTier(SecondaryTierManager):  # type: ignore[misc]
    """vLLM's chunks in a tierkv store. vLLM's scheduler calls every public method; none of them waits for a disk.

    path, and the other options of the store: see docs/vllm-tier.md. weights: a digest of the model's weights; by
    default computed from its folder. engine: what decides K and V besides, from TierkvOffloadingConnector; with vLLM's
    own OffloadingConnector, which does not pass it on, a text that the user keeps true. adapters: a digest of all LoRA
    adapters. locality: LOCAL or REMOTE, for vLLM's filters. weights_are_fixed: whether the weights stay the same while
    the engine runs; if not, the first reset of vLLM's cache ends the use of the store, because a reset is how new
    weights show.
    Raises ConfigError for an engine whose chunks cannot be named.
    """

    if hasattr(offload_base, "Medium"):  # since 0.32
        medium = offload_base.Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        weights: str | None = None,
        engine: Mapping[str, Any] | str | None = None,
        adapters: str = "",
        weights_are_fixed: bool = False,
        locality: str | None = None,
        backpressure_detector: Any = None,
        module_path: str | None = None,
        **options: Any,
    ) -> None:
        detector = {} if backpressure_detector is None else {"backpressure_detector": backpressure_detector}
        super().__init__(offloading_spec, primary_kv_view, tier_type, **detector)
        if locality is not None:
            self.locality = offload_base.Locality(locality)
        if not engine:
            raise ConfigError(
                "vLLM's OffloadingConnector does not pass on what decides K and V",
                hint="use TierkvOffloadingConnector, or describe quantisation, overrides and so on by engine=",
            )
        assert primary_kv_view.strides
        self._row_bytes: int = primary_kv_view.strides[0]
        self._weights_are_fixed = check_flag("weights_are_fixed", weights_are_fixed)
        store = store_config(options, row_bytes=self._row_bytes)  # before the weights are read, which takes seconds
        config = offloading_spec.config
        namespace = chunk_namespace(
            config,
            row_bytes=self._row_bytes,
            weights=weights or weights_digest(config.model.name),
            engine=engine,
            version=vllm_version,
            adapters=adapters,
        )
        self._is_off = False
        self._rows = DigestRows(store, namespace)
        self._memory = primary_kv_view.cast("B")
        self._lookups = _Lookups(self._rows, tier_type)
        # Loads never queue behind stores: a request waits for a load.
        self._loaders = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="tierkv-vllm-load")
        self._storers = ThreadPoolExecutor(1, thread_name_prefix="tierkv-vllm-store")
        self._running: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[tuple[Any, Sequence[Any]]] = queue.SimpleQueue()
        self._lost: set[Any] = set()  # keys whose load failed: the lookup's verdict on them is out of date
        self._lock = threading.Lock()
        _log.info("tierkv keeps chunks of %d bytes in %s", self._row_bytes, options.get("path"))

    def on_new_request(self, req_context: Any) -> Any:
        """Ask for new chunks only."""
        return RequestOffloadingContext()

    def lookup(self, key: Any, req_context: Any) -> Any:
        """Return HIT or MISS, or RETRY until the lookup thread has asked the store."""
        if self._is_off or key in self._lost:
            return LookupResult.MISS
        is_found = self._lookups.lookup(key, req_context)
        if is_found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if is_found else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        """Give this step's lookups to the lookup thread."""
        self._lookups.flush()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget the lookups of a request."""
        self._lookups.cleanup(req_context.req_id)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        """Record a use of chunks that vLLM has in its own memory, so that they are evicted later here.

        Left out while many jobs are pending.
        """
        if keys and not self._is_off and len(self._running) < _MOST_PENDING:
            self._start(self._storers, self._touch, list(keys))

    def submit_store(self, job_metadata: Any) -> None:
        """Take chunks over from the CPU tier, in the store thread."""
        self._submit(self._storers, self._store, job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        """Copy chunks to the CPU tier, in a load thread."""
        self._submit(self._loaders, self._load, job_metadata)

    def get_finished_jobs(self) -> Iterable[Any]:
        """Return the results of the jobs that have ended since the last call."""
        results: list[Any] = []
        while True:
            try:
                result, failed = self._finished.get_nowait()
            except queue.Empty:
                return results
            if failed and hasattr(self._lookups, "mark_miss"):  # since 0.32; `_lost` does it in 0.26
                self._lookups.mark_miss(failed)
            results.append(result)

    def drain_jobs(self) -> None:
        """Wait for all jobs: vLLM resets its cache, perhaps because the weights are about to change."""
        wait(self._snapshot())
        if not self._weights_are_fixed and not self._is_off:
            self._is_off = True
            _log.warning(
                "vLLM has reset its cache, and its weights may change: tierkv is not used until the engine starts anew "
                "(set weights_are_fixed if they never change)"
            )

    def shutdown(self) -> None:
        """End all jobs, write what was stored, close the store. May be called twice."""
        self._lookups.shutdown()
        for threads in (self._loaders, self._storers):
            threads.shutdown()
        self._memory.release()
        self._rows.close()
        counts = self._rows.counts
        _log.info(
            "tierkv: %d chunks loaded, %d not; %d stored, %d not",
            *(counts.loaded, counts.not_loaded, counts.saved, counts.not_saved),
        )

    # --- in threads of its own

    def _submit(self, threads: ThreadPoolExecutor, work: Any, job: Any) -> None:
        if self._is_off:
            self._finished.put((_result(job_id=job.job_id, success=False), list(job.keys)))
            return
        self._start(threads, self._work, work, job)

    def _start(self, threads: ThreadPoolExecutor, work: Any, *arguments: Any) -> None:
        future = threads.submit(work, *arguments)
        with self._lock:
            self._running.add(future)
        future.add_done_callback(self._forget)

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._running.discard(future)

    def _snapshot(self) -> list[Future[None]]:
        with self._lock:
            return list(self._running)

    def _work(self, work: Any, job: Any) -> None:
        """Run a job. vLLM waits for the result of each, whatever happens here."""
        keys = list(job.keys)
        started = time.monotonic()
        done = [False] * len(keys)
        try:
            done = work(keys, [int(chunk) for chunk in getattr(job, "chunk_ids", getattr(job, "block_ids", ()))])
        except Exception:  # noqa: BLE001 - the outermost call of its thread, and vLLM waits for the result
            _log.exception("a job of %d chunks has failed", len(keys))
        come = [key for key, is_done in zip(keys, done, strict=True) if is_done]
        failed = [key for key, is_done in zip(keys, done, strict=True) if not is_done]
        if job.is_promotion:
            self._lose(failed)
        result = _result(
            job_id=job.job_id,
            success=not failed,
            successful_keys=tuple(come) if failed and come and job.is_promotion else None,
            transfer_time=time.monotonic() - started,
            transfer_bytes=len(come) * self._row_bytes,
        )
        self._finished.put((result, failed if job.is_promotion else ()))

    def _store(self, keys: Sequence[Any], chunks: Sequence[int]) -> list[bool]:
        known = [(at, key) for at, key in enumerate(map(self._key, keys)) if key is not None]
        places = [self._row(chunks[at]) for at, _ in known]
        saved = self._rows.save([key for _, key in known], lambda start, end: Buffers(places[start:end]))
        done = [False] * len(keys)
        for (at, _), is_saved in zip(known, saved, strict=True):
            done[at] = is_saved
        with self._lock:
            self._lost.difference_update(key for key, is_saved in zip(keys, done, strict=True) if is_saved)
        return done

    def _load(self, keys: Sequence[Any], chunks: Sequence[int]) -> list[bool]:
        known = [key for key in map(self._key, keys) if key is not None]
        if len(known) < len(keys):  # a lookup never says that such a key is there
            return [False] * len(keys)
        places = [self._row(chunk) for chunk in chunks]
        return self._rows.load(known, lambda start, end: Buffers(places[start:end]))

    def _touch(self, keys: Sequence[Any]) -> None:
        self._rows.touch([key for key in map(self._key, keys) if key is not None])

    def _lose(self, keys: Sequence[Any]) -> None:
        with self._lock:
            if len(self._lost) > _MOST_LOST:
                self._lost.clear()  # at worst, a load fails once more
            self._lost.update(keys)

    def _key(self, key: Any) -> BlockKey | None:
        return _key_of(self._rows, key)

    def _row(self, chunk: int) -> memoryview:
        return self._memory[chunk * self._row_bytes : (chunk + 1) * self._row_bytes]


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """Asks the store in a thread of its own; the scheduler gets "not yet" until it has."""

    def __init__(self, rows: DigestRows, tier_type: str) -> None:
        self._rows = rows
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[Any], req_context: Any) -> Iterable[bool]:
        """Return for each chunk whether the store has it."""
        return self._rows.found([_key_of(self._rows, key) for key in keys])


class TierkvTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiering. To name it by `spec_module_path` loads this module, which is how 0.26 learns of the tier."""


class TierkvOffloadingConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's OffloadingConnector, whose tiers of the type TierkvTier get the identity of the model from vLLM.

    Loaded by `kv_connector_module_path`. Raises ConfigError for an engine whose chunks cannot be named.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        extra.setdefault("spec_name", "TieringOffloadingSpec")
        if role == KVConnectorRole.SCHEDULER:  # it owns the tiers
            for options in extra.get("secondary_tiers", ()):
                if options.get("type") == _NAME:
                    _complete(options, vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)


def _complete(options: dict[str, Any], vllm_config: Any) -> None:
    """Add the model's identity to the options of a tier."""
    weights, adapters = options.get("weights"), options.get("adapters", "")
    options["engine"] = {
        **engine_fields(vllm_config, weights=weights, adapters=adapters),
        "device": _device(),
        "packages": {name: _package_version(name) for name in _ATTENTION_PACKAGES},
    }
    if not weights:
        started = time.monotonic()
        options["weights"] = folder_weights(vllm_config)
        _log.info("tierkv has hashed the weights in %.1f s: %s", time.monotonic() - started, options["weights"])


def _device() -> list[str]:
    """Return what vLLM chooses attention backends and their layouts by, beside its configuration and packages."""
    capability = torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else ""
    chosen = [os.environ.get(name, "") for name in _LAYOUT_SETTINGS]
    return [str(current_platform.device_type), str(current_platform.get_device_name()), capability, *chosen]


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _key_of(rows: DigestRows, key: Any) -> BlockKey | None:
    """Return the key of a chunk: vLLM's is a block hash and 4 bytes of the KV cache group."""
    raw = bytes(key)
    return rows.key(raw[:-_GROUP_BYTES], int.from_bytes(raw[-_GROUP_BYTES:], "big"))


def _result(**values: Any) -> Any:
    """Return a JobResult of those values that this version of vLLM knows."""
    known = {field.name for field in fields(JobResult)}
    return JobResult(**{name: value for name, value in values.items() if name in known})


def _register() -> None:
    """Make the tier known by its name. vLLM 0.26 finds it in no other way, and asks in several processes."""
    if _NAME not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier(_NAME, __name__, _NAME)


_register()
