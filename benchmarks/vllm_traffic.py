"""Mixed traffic through vLLM's connector for some minutes: memory, descriptors, threads and the store must not grow.

Prompts share beginnings, which change; answers are continued; requests are aborted; vLLM's cache is emptied, and the
connector reset. Warm memory and quota are small, so that both are soon full and evict. Every few seconds the engine
comes to rest and is measured. What grows is compared with what it was after the warm-up, the first third of the time.
`--plain` is vLLM without the connector. On a CPU or a GPU:  python -m benchmarks.vllm_traffic --minutes 10
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.random_models import save_model

__all__ = ["Sample", "growth", "main"]

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler, worker and store in this process, which is measured
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",  # it keeps 1024, and would grow for minutes
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
_VOCABULARY = 32000
_RUNNING = 8
_SLACK = {
    "memory_mib": 8.0,
    "descriptors": 2,
    "threads": 2,
    "objects": 1000,  # as many as there are warm blocks, which a reset empties
    "known": 8,
    "pinned_slots": 0,
    "store_mib": 8.0,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What is measured at rest.

    memory_mib: resident memory of the process's own. mapped_mib: of files, such as the store's, and the warm memory.
    objects: of tierkv's classes. known: what the connector knows of requests, none of which there is any more.
    store_mib: of the store's files on disk.
    """

    minute: float
    requests: int
    memory_mib: float
    mapped_mib: float
    descriptors: int
    threads: int
    objects: int
    known: int
    warm_blocks: int
    pinned_slots: int
    store_mib: float


def main() -> None:
    """Run the traffic; print a line for each sample, and fail if anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--warm-mib", type=int, default=1024 if on_gpu else 16)
    parser.add_argument("--cold-mib", type=int, default=4096 if on_gpu else 32, help="quota of the store")
    parser.add_argument("--plain", action="store_true", help="vLLM without the connector")
    arguments = parser.parse_args()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="tierkv-traffic-") as folder:
        samples = _run(arguments, Path(folder))
    grown = growth(samples, mapped_mib=arguments.warm_mib + arguments.cold_mib)
    for name, (before, after) in grown.items():
        print(f"{name} has grown from {before:g} to {after:g}")
    sys.exit(bool(grown))


def growth(samples: list[Sample], *, mapped_mib: float) -> dict[str, tuple[float, float]]:
    """Return what is larger at the end than after the warm-up, by more than its slack: medians of a third each.

    mapped_mib: of the store and the warm memory, which are not resident until they are used again after a reset.
    """
    third = len(samples) // 3
    found = {}
    for name, slack in {**_SLACK, "mapped_mib": mapped_mib}.items():
        before, after = (
            median(getattr(each, name) for each in part) for part in (samples[third : 2 * third], samples[-third:])
        )
        if after > before + slack:
            found[name] = (before, after)
    return found


def _run(arguments: argparse.Namespace, folder: Path) -> list[Sample]:
    on_gpu = torch.cuda.is_available()
    _save_model(folder / "model", arguments.layers, on_gpu=on_gpu)
    from vllm import LLM

    llm = LLM(
        str(folder / "model"),
        dtype="bfloat16" if on_gpu else "float32",
        max_model_len=8192 if on_gpu else 2048,
        max_num_batched_tokens=8192 if on_gpu else 1024,
        max_num_seqs=_RUNNING,
        block_size=16 if on_gpu else 32,
        num_gpu_blocks_override=3000 if on_gpu else 200,
        enforce_eager=True,
        enable_prefix_caching=True,
        **({"gpu_memory_utilization": 0.6, "attention_backend": "FLASH_ATTN"} if on_gpu else {}),
        **({} if arguments.plain else {"kv_transfer_config": _transfer_config(folder / "store", arguments)}),
    )
    traffic = _Traffic(llm.llm_engine, random.Random(arguments.seed), most_tokens=7000 if on_gpu else 1500)
    samples: list[Sample] = []
    started = time.monotonic()
    while time.monotonic() < started + 60 * arguments.minutes:
        traffic.run(arguments.every)
        if traffic.dice.random() < 0.5:
            assert llm.reset_prefix_cache(reset_connector=not arguments.plain and traffic.dice.random() < 0.1)
        samples.append(_measure(traffic, folder / "store", (time.monotonic() - started) / 60))
        print(json.dumps(asdict(samples[-1])), flush=True)
    print(json.dumps(traffic.counts()), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return samples


class _Traffic:
    """Random requests to vLLM's engine, which is stepped here."""

    def __init__(self, engine: Any, dice: random.Random, *, most_tokens: int) -> None:
        self.engine, self.dice, self.most_tokens = engine, dice, most_tokens
        self.num_requests = self.num_aborted = 0
        self._stems = [self._tokens(most_tokens // 2) for _ in range(6)]
        self._prompts: dict[str, list[int]] = {}

    def run(self, seconds: float) -> None:
        """Keep the engine busy for some seconds, then let it come to rest."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.engine.has_unfinished_requests():
            while time.monotonic() < end and len(self._prompts) < 2 * _RUNNING:
                self._add()
            for output in self.engine.step():
                if output.finished:
                    prompt = self._prompts.pop(output.request_id)
                    if self.dice.random() < 0.3:  # the next turn of a conversation
                        self._remember(prompt + list(output.outputs[0].token_ids))
            if self._prompts and self.dice.random() < 0.01:
                aborted = self.dice.choice(list(self._prompts))
                del self._prompts[aborted]
                self.engine.abort_request([aborted])
                self.num_aborted += 1

    def counts(self) -> dict[str, int]:
        """Return the connector's counters of both sides."""
        found: dict[str, int] = {"requests": self.num_requests, "aborted": self.num_aborted}
        for side in self._connectors():
            side._statistics.drain()
            for name, count in side._statistics.total.items():
                found[name] = found.get(name, 0) + count
        return found

    def count_known(self) -> int:
        """Return how many entries the containers of both sides have."""
        sides = [side for each in self._connectors() for side in (each._scheduler, each._finder, each._worker) if side]
        values = [value for side in {id(each): each for each in sides}.values() for value in vars(side).values()]
        return sum(len(value) for value in values if isinstance(value, dict | list | set))

    def session(self) -> Any:
        """Return the connector's session; None without a connector."""
        return next((side._session for side in self._connectors() if side._session), None)

    def _connectors(self) -> list[Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if not has_kv_transfer_group():
            return []
        return [self.engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()]

    def _add(self) -> None:
        from vllm import SamplingParams

        dice = self.dice
        stem = dice.choice(self._stems)
        prompt = stem[: dice.randrange(1, len(stem) + 1)] + self._tokens(dice.randrange(1, 200))
        self.num_requests += 1
        if dice.random() < 0.02:
            self._remember(self._tokens(self.most_tokens // 2))
        sampling = SamplingParams(max_tokens=dice.randrange(1, 64), temperature=0, ignore_eos=True)
        name = f"request {self.num_requests}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        self._prompts[name] = prompt

    def _remember(self, tokens: list[int]) -> None:
        self._stems[self.dice.randrange(len(self._stems))] = tokens[: self.most_tokens]

    def _tokens(self, count: int) -> list[int]:
        return [self.dice.randrange(5, _VOCABULARY) for _ in range(count)]


def _measure(traffic: _Traffic, store: Path, minute: float) -> Sample:
    session = traffic.session()
    warm_blocks = pinned = 0
    if session:
        session.store.flush()
        memory = session.store._tiers.memory
        with memory._changed:
            memory.reap()
            warm_blocks, slots = len(memory.index), memory.index.slots
            spare = set(memory.spare)
            pinned = sum(slots.reference_count(slot) > 0 for slot in range(len(memory.slots)) if slot not in spare)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not kept
    return Sample(
        minute=round(minute, 2),
        requests=traffic.num_requests,
        memory_mib=_resident_mib("RssAnon"),
        mapped_mib=_resident_mib("RssFile") + _resident_mib("RssShmem"),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        objects=sum(type(each).__module__.startswith("tierkv") for each in gc.get_objects()),
        known=traffic.count_known(),
        warm_blocks=warm_blocks,
        pinned_slots=pinned,
        store_mib=round(sum(file.stat().st_blocks * 512 for file in store.rglob("*")) / (1 << 20), 1),
    )


def _resident_mib(kind: str) -> float:
    """Return the process's resident memory of a kind, which /proc names: RssAnon, RssFile or RssShmem."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split(f"{kind}:")[1].split()[0]) / 1024, 1)


def _save_model(folder: Path, num_layers: int, *, on_gpu: bool) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=4096 if on_gpu else 128,
        intermediate_size=14336 if on_gpu else 256,
        num_hidden_layers=num_layers,
        num_attention_heads=32 if on_gpu else 4,
        num_key_value_heads=8 if on_gpu else 2,
        head_dim=128 if on_gpu else 32,
        max_position_embeddings=16384,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    save_model(folder, config, device="cuda" if on_gpu else "cpu")


def _transfer_config(store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "kv_connector": "TierkvConnector",
        "kv_connector_module_path": "tierkv.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "path": str(store),
            "warm_bytes": arguments.warm_mib << 20,
            "cold_bytes": arguments.cold_mib << 20,
            "block_tokens": 256 if torch.cuda.is_available() else 64,
            "compute_or_load": False,
        },
    }


if __name__ == "__main__":
    main()
