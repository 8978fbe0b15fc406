"""Runs lives of nano-vLLM on a CPU: each is an engine from its start to its exit, with or without tierkv.

usage: nano_vllm_life.py SPEC    a JSON file: {"model": folder, "lives": [...]}; prints one JSON line for each life.
A life: "path" (without it plain nano-vLLM; "" is tierkv without a store), "pool_blocks", "warm_bytes", "rounds" (lists
of requests that run together, each {"tokens", "new"}), "fail_loads" (loads that are told to have failed), "options",
"may_compute" (whether blocks that are there may be computed where that takes less time).
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import nano_vllm_cpu

nano_vllm_cpu.install()

import nanovllm  # noqa: E402
import torch  # noqa: E402
from nanovllm import SamplingParams  # noqa: E402

from tierkv.block_store.load_or_compute import LoadOrCompute  # noqa: E402

BLOCK_BYTES = 2 * 2 * 256 * 2 * 16 * 4  # of the tests' tiny model: K and V, layers, tokens, heads, dim, float32


def main() -> None:
    faulthandler.dump_traceback_later(250)  # the tests' patience ends at 300
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    for life in spec["lives"]:
        print("LIFE " + json.dumps(run(spec["model"], life)), flush=True)


def run(model: str, life: dict[str, Any]) -> dict[str, Any]:
    nano_vllm_cpu.Memory.num_bytes = int((life.get("pool_blocks", 100) + 0.5) * BLOCK_BYTES / 0.9)
    sizes = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 8, **life.get("options", {})}
    if "path" not in life:
        llm = nanovllm.LLM(model, enforce_eager=True, **sizes)
    else:
        from tierkv.integrations.nano_vllm import LLM

        tiers = {"path": life["path"] or None, "warm_bytes": life.get("warm_bytes", 16 << 20), "cold_bytes": 1 << 30}
        llm = LLM(model, enforce_eager=True, **tiers, **sizes)
        if not life.get("may_compute"):
            load_always(llm)
    preempted = count_preemptions(llm)
    if life.get("fail_loads"):
        fail_loads(llm, life["fail_loads"])
    answers = [
        [
            answer["token_ids"]
            for answer in llm.generate(
                [request["tokens"] for request in requests],
                # Temperature 0 is refused; this one leaves only the most probable token.
                [SamplingParams(1e-6, request["new"], ignore_eos=True) for request in requests],
                use_tqdm=False,
            )
        ]
        for requests in life["rounds"]
    ]
    found = {"answers": answers, "preempted": len(preempted), "blocks": llm.model_runner.config.num_kvcache_blocks}
    if "path" in life:
        llm.flush()
        counts, stats = llm.counts, llm.store.stats()
        found |= {"own": counts.own, "loaded": counts.loaded, "computed": counts.computed}
        found |= {"skipped": dict(stats.skip_reasons), "misses": dict(stats.miss_reasons)}
    manager = llm.scheduler.block_manager
    assert not manager.used_block_ids and len(manager.free_block_ids) == len(manager.blocks)
    assert all(manager.blocks[block_id].hash == block_hash for block_hash, block_id in manager.hash_to_block_id.items())
    llm.exit()
    return found


def load_always(llm: Any) -> None:
    """Have the engine believe that it has never measured how long computing takes."""
    llm._planner._choice = LoadOrCompute(block_size=llm.store.block_size)
    llm._planner.record_compute = lambda num_tokens, seconds: None


def count_preemptions(llm: Any) -> list[int]:
    preempted: list[int] = []
    preempt = llm.scheduler.preempt

    def counted(seq: Any) -> None:
        preempted.append(seq.seq_id)
        preempt(seq)

    llm.scheduler.preempt = counted
    return preempted


def fail_loads(llm: Any, count: int) -> None:
    """Have each of the next loads say that its last two blocks did not come, and overwrite them with nonsense."""
    manager = llm.scheduler.block_manager
    on_load, left = manager.on_load, [count]

    def failing(load: Any) -> None:
        on_load(load)
        if left[0]:
            left[0] -= 1
            load.synchronize()
            load._num_loaded = max(0, load._num_loaded - 2)
            for block_id in manager.loads[-1].block_ids[-2:]:
                llm.model_runner.kv_cache[:, :, block_id] = 1e3

    manager.on_load = failing


if __name__ == "__main__":
    main()
