"""Drives vLLM's real TieringOffloadingManager as its scheduler does, without an engine."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.kv_offload import config as offload_config
from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from tierkv.integrations.vllm.tier import TierkvTier

CHUNK = 64 * 1024
STEP_S = 0.005


def made(cls: type, **values: Any) -> Any:
    """Return a value of vLLM's from those fields that this version has."""
    known = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in known})


def offloading_config(tier: dict[str, Any], *, num_chunks: int = 8, **changes: Any) -> Any:
    """Return vLLM's configuration of one group of two layers. changes: of the parallel configuration."""
    parallel = {"rank": 0, "world_size": 1, "tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1}
    parallel |= {"data_parallel_index": 0, "data_parallel_size": 1, "is_parallelism_agnostic": True, **changes}
    return offload_config.OffloadingConfig(
        groups=(made(offload_config.OffloadingGroupConfig, tokens_per_block=16, layer_names=("l0", "l1"), group_id=0),),
        worker_kv_bytes_per_block=CHUNK,
        enable_kv_cache_events=False,
        extra_config={
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": CHUNK * num_chunks * parallel["world_size"],
            "secondary_tiers": [tier],
        },
        engine_id=uuid.uuid4().hex,
        model=offload_config.OffloadingModelConfig(
            "tiny", "bfloat16", *[4096] * (len(fields(offload_config.OffloadingModelConfig)) - 2)
        ),
        cache=offload_config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=made(offload_config.OffloadingParallelConfig, data_parallel_rank_local=None, **parallel),
    )


def tier_options(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "type": "TierkvTier",
        "module_path": "tierkv.integrations.vllm.tier",
        "path": str(folder),
        "weights": "weights-a",
        "engine": "random rows",
        "warm_bytes": 64 * CHUNK,
        "min_free_bytes": 0,
        **options,
    }


class Life:
    """One life of an engine: a manager over a CPU tier and tierkv's. Context manager."""

    def __init__(
        self, folder: Path, *, num_chunks: int = 8, parallel: dict[str, Any] | None = None, **options: Any
    ) -> None:
        config = offloading_config(tier_options(folder, **options), num_chunks=num_chunks, **(parallel or {}))
        self.manager: Any = OffloadingSpecFactory.create_spec(config).get_manager()
        (self.tier,) = self.manager.secondary_tiers
        assert isinstance(self.tier, TierkvTier)
        self.lock = getattr(self.manager, "lock", None) or contextlib.nullcontext()  # 0.33 has one

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.manager.shutdown()

    def begin(self) -> Any:
        request = ReqContext(req_id=uuid.uuid4().hex)
        with self.lock:
            self.manager.on_new_request(request)
        return request

    def end(self, request: Any) -> None:
        with self.lock:
            self.manager.on_request_finished(request)
        self.step()

    def step(self) -> None:
        with self.lock:
            self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=set(), preempted_req_ids=set()))

    def reset(self) -> None:
        """Reset vLLM's cache, as for new weights."""
        with self.lock:
            self.manager.reset_cache()
            if hasattr(self.manager, "on_reset_flushed"):  # since 0.33
                self.manager.on_reset_flushed()

    def rest(self) -> None:
        """Step until no job is under way."""
        for _ in range(2000):
            self.step()
            if not self.manager._transfer_jobs:
                return
            time.sleep(STEP_S)
        raise AssertionError("a job never ended")

    def store(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> int:
        """Have the manager store chunks as from the GPU. Return how many it took."""
        request = self.begin()
        with self.lock:
            prepared = self.manager.prepare_store(keys, request)
            assert prepared is not None
            spec = prepared.store_spec
            for key, chunk in zip(prepared.keys_to_store, getattr(spec, "chunk_ids", spec.block_ids), strict=True):
                self.row(chunk)[:] = payloads[list(keys).index(key)]
            self.manager.complete_store(prepared.keys_to_store, request, True)
        self.rest()
        self.end(request)
        return len(prepared.keys_to_store)

    def ask(self, keys: Sequence[bytes], request: Any, *, steps: int = 2000) -> tuple[list[str], list[list[str]]]:
        """Look up all keys once a step until no answer is "later". Return the last answers, and the distinct ones."""
        seen: list[list[str]] = []
        for _ in range(steps):
            with self.lock:
                answers = [self.manager.lookup(key, request).name for key in keys]
            self.step()
            kinds = sorted(set(answers))
            if not seen or seen[-1] != kinds:
                seen.append(kinds)
            if not {"RETRY", "HIT_PENDING"} & set(answers):
                return answers, seen
            time.sleep(STEP_S)
        raise AssertionError(f"the scheduler asks for ever: {answers}")

    def read(self, keys: Sequence[bytes], request: Any) -> list[bytes]:
        """Return the bytes of chunks that lie in the CPU tier, as the GPU would get them."""
        with self.lock:
            spec = self.manager.prepare_load(keys, request)
            found = [bytes(self.row(chunk)) for chunk in getattr(spec, "chunk_ids", spec.block_ids)]
            self.manager.complete_load(keys, request)
        return found

    def row(self, chunk: Any) -> memoryview:
        view = self.manager.primary_tier.get_kv_memoryview()
        return view.cast("B")[int(chunk) * view.strides[0] :][:CHUNK]


def key_of(number: int, group: int = 0) -> bytes:
    return make_offload_key(number.to_bytes(4, "big") * 8, group)


def payload_of(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, CHUNK, dtype=np.uint8).tobytes()
