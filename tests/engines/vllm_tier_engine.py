"""One life of the real vLLM engine on a CPU over its own offloading and tierkv's tier; prints JSON lines.

usage: vllm_tier_engine.py FOLDER MODE [FIRST END] [RANKS]  MODE: plain, tier, or a JSON object of options of the tier
FOLDER has the model. FIRST, END: numbers of the random requests that follow, in a GPU cache and a CPU tier that hold
few of them. RANKS: tensor-parallel.
vLLM's workers copy to the CPU tier on GPUs only, so a worker for CPU tensors stands in for that copy; scheduler,
manager and connector are vLLM's own. The tests start it by `vllm_life.start`.
"""

from __future__ import annotations

import json
import random
import sys
import uuid
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from random_models import VOCABULARY
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm_life import open_engine

PREFIX = 300
TOGETHER = 4


class CpuWorker(OffloadingWorker):
    """Copies blocks between the engine's tensors and the CPU tier at once. A chunk is one block."""

    def __init__(self, caches: Any, region: Any) -> None:
        self._region = region
        self._pairs = []
        for cache in caches.tensors:
            blocks = cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes)
            self._pairs.append((blocks, region.create_next_worker_view(cache.page_size_bytes)))
        self._done: list[Any] = []

    def _copy(self, job_id: int, source: Any, target: Any, *, to_chunks: bool) -> bool:
        pairs = list(zip(source.block_ids.tolist(), target.block_ids.tolist(), strict=True))
        for blocks, chunks in self._pairs:
            for here, there in pairs:
                if to_chunks:
                    chunks[there].copy_(blocks[here])
                else:
                    blocks[there].copy_(chunks[here])
        self._done.append(TransferResult(job_id=job_id, success=True))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_chunks=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_chunks=False)

    def get_finished(self) -> list[Any]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs = []
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's tiering with a worker for CPU tensors."""

    def get_worker(self, kv_caches: Any) -> Any:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CpuWorker(kv_caches, region)
        return self._worker


def random_prompt(number: int) -> list[int]:
    """Return the prompt of a random request: a part of one of twelve, and tokens of its own."""
    own = random.Random(f"request {number}")
    shared = random.Random(own.randrange(12))
    prompt = [shared.randrange(5, VOCABULARY) for _ in range(600)][: own.randrange(20, 600)]
    return prompt + [own.randrange(5, VOCABULARY) for _ in range(own.randrange(1, 60))]


def main(folder: Path, mode: str, first: int = 0, end: int = 0, num_ranks: int = 1) -> None:
    from vllm import SamplingParams

    options: dict[str, Any] = {}
    engine_id = uuid.uuid4().hex
    if mode != "plain":
        tier = {"type": "TierkvTier", "module_path": "tierkv.integrations.vllm.tier", "path": str(folder / "store")}
        tier |= {"warm_bytes": 16 << 20, **(json.loads(mode) if mode.startswith("{") else {})}
        options["kv_transfer_config"] = {
            "kv_connector": "TierkvOffloadingConnector",
            "kv_connector_module_path": "tierkv.integrations.vllm.tier",
            "kv_role": "kv_both",
            "engine_id": engine_id,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "vllm_tier_engine",
                "cpu_bytes_to_use": (2 << 20) * num_ranks,
                "secondary_tiers": [tier],
            },
        }
    llm = open_engine(
        str(folder / "model"),
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=TOGETHER,
        num_gpu_blocks_override=64,
        tensor_parallel_size=num_ranks,
        **options,
    )
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    words = random.Random(0)
    prefix = [words.randrange(5, VOCABULARY) for _ in range(PREFIX)]

    def ask(tail: int) -> None:
        own = random.Random(tail)
        prompt = prefix + [own.randrange(5, VOCABULARY) for _ in range(tail)]
        answer = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0]
        ids = list(answer.outputs[0].token_ids)
        print(json.dumps({"prompt": prompt, "ids": ids, "cached": answer.num_cached_tokens}), flush=True)

    ask(7)
    ask(40)
    ask(90)
    for start in range(first, end, TOGETHER):
        prompts = [random_prompt(number) for number in range(start, min(end, start + TOGETHER))]
        asked: list[Any] = [{"prompt_token_ids": each} for each in prompts]
        for prompt, answer in zip(prompts, llm.generate(asked, greedy, use_tqdm=False), strict=True):
            print(json.dumps({"prompt": prompt, "ids": list(answer.outputs[0].token_ids)}), flush=True)
    if mode != "plain" and hasattr(llm.llm_engine.engine_core, "engine_core"):  # in this process
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        (tier,) = connector.connector_scheduler.manager.secondary_tiers
        wait(tier._snapshot())
        counts = tier._rows.counts
        print(json.dumps({"loaded": counts.loaded, "not_loaded": counts.not_loaded, "saved": counts.saved}), flush=True)
    llm.llm_engine.engine_core.shutdown()
    for region in Path("/dev/shm").glob(f"vllm_offload_{engine_id}*"):  # the worker for CPU tensors leaves it there
        region.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
