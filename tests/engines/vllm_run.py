"""One life of a vLLM engine on a CPU: `python vllm_run.py SPEC`, where SPEC is JSON; it prints one JSON line.

The tests start it in a process of its own, with the interpreter that has vLLM. Fields of the spec are those of `Spec`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32  # the CPU backend wants a multiple of 32
VOCABULARY = 1000
HUNT_BATCH = 16
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass
class Spec:
    """store: folder of the blocks, "" for plain vLLM. options: of the connector. engine: further arguments of LLM.

    actions: ["ask", prompts, new tokens], a prompt being [seed, length] pairs whose tokens follow each other, or
    ["last"], which is an answer of the ask before with its prompt; ["reset"]; ["reset_connector"]; ["fail", share]:
    from now on that share of the blocks of each load does not come; ["abort", prompt, steps]; ["reload"] the weights;
    ["hunt", seed, first, end]: random requests of that seed, from one number to another.
    """

    model: str
    actions: list[list[Any]]
    store: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    policy: str = "recompute"


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a random Llama of two layers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def tokens_of(parts: list[Any], last: list[list[int]]) -> list[int]:
    """Return a prompt's tokens."""
    found: list[int] = []
    for part in parts:
        if part == "last":
            found += last[0]
            continue
        seed, length = part
        words = random.Random(seed)
        found += [words.randrange(5, VOCABULARY) for _ in range(length)]
    return found


def run(spec: Spec) -> dict[str, Any]:
    """Run one engine; return what it answered and counted."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    from vllm import LLM, SamplingParams

    engine: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "seed": 0,
        **spec.engine,
    }
    if spec.store or spec.options:
        engine["kv_transfer_config"] = {
            "kv_connector": "TierkvConnector",
            "kv_connector_module_path": "tierkv.integrations.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": spec.policy,
            "kv_connector_extra_config": {
                "path": spec.store,
                "warm_bytes": 8 << 20,
                "cold_bytes": 1 << 28,
                "block_tokens": 64,
                "compute_or_load": False,
                **spec.options,
            },
        }
    llm = LLM(spec.model, **engine)
    answers: list[list[dict[str, Any]]] = []
    last: list[list[int]] = []
    for action, *arguments in spec.actions:
        if action == "ask":
            prompts = [tokens_of(parts, last) for parts in arguments[0]]
            sampling = SamplingParams(max_tokens=arguments[1], temperature=0, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
            answers.append(
                [{"cached": output.num_cached_tokens, "ids": list(output.outputs[0].token_ids)} for output in outputs]
            )
            last = [each + list(out.outputs[0].token_ids) for each, out in zip(prompts, outputs, strict=True)]
        elif action == "reset":
            assert llm.reset_prefix_cache()
        elif action == "reset_connector":
            assert llm.reset_prefix_cache(reset_connector=True)
        elif action == "abort":
            abort(llm.llm_engine, tokens_of(arguments[0], last), arguments[1])
        elif action == "hunt":
            answers += hunt(llm, *arguments)
        elif action == "reload":
            llm.collective_rpc("reload_weights")
        elif action == "fail":
            fail_loads(arguments[0])
        else:
            raise ValueError(action)
    counted = counts_of(llm)
    llm.llm_engine.engine_core.shutdown()
    return {"answers": answers, "counted": counted}


def hunt(llm: Any, seed: int, first: int, end: int) -> list[list[dict[str, Any]]]:
    """Ask random requests over a few stems, several at a time; empty the engine's cache now and then."""
    from vllm import SamplingParams

    answers = []
    for start in range(0, end, HUNT_BATCH):
        dice = random.Random(seed * 1_000_003 + start)
        prompts, samplings = [], []
        for _ in range(HUNT_BATCH):
            stem = [[dice.randrange(6), dice.randrange(1, 360)]]
            prompts.append(tokens_of([*stem, [dice.randrange(1 << 30), dice.randrange(1, 60)]], []))
            samplings.append(SamplingParams(max_tokens=dice.randrange(1, 24), temperature=0, ignore_eos=True))
        is_reset = dice.random() < 0.3
        if start < first:
            continue
        outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], samplings, use_tqdm=False)
        answers.append([{"cached": out.num_cached_tokens, "ids": list(out.outputs[0].token_ids)} for out in outputs])
        if is_reset:
            llm.reset_prefix_cache()
    return answers


def abort(engine: Any, prompt: list[int], num_steps: int) -> None:
    """Begin a request and abort it after some steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    request_id = engine.add_request("aborted", {"prompt_token_ids": prompt}, sampling)
    for _ in range(num_steps):
        engine.step()
    engine.abort_request([request_id or "aborted"])
    while engine.has_unfinished_requests():
        engine.step()


def counts_of(llm: Any) -> dict[str, int]:
    """Return the connector's counters of both sides, as far as they are in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    sides = [llm.llm_engine.engine_core.engine_core.scheduler.connector]
    sides += [get_kv_transfer_group()] if has_kv_transfer_group() else []
    found: dict[str, int] = {}
    for side in sides:
        if side is not None:
            side._statistics.drain()
            for name, count in side._statistics.total.items():
                found[name] = found.get(name, 0) + count
    return found


def fail_loads(share: float) -> None:
    """Let only the first blocks of every load come, as if the rest had been damaged meanwhile."""
    from tierkv.block_store.placement import Strided
    from tierkv.block_store.store import BlockStore

    load = BlockStore.load

    def load_less(self: Any, reservation: Any, targets: Any) -> Any:
        keys = list(reservation.keys)
        kept = round(len(keys) * (1 - share))
        found = load(self, reservation, Strided(targets.memory, targets.pages[:kept]))
        found.synchronize()
        found.keys = keys
        return found

    BlockStore.load = load_less  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run(Spec(**json.loads(sys.argv[1])))) + "\n")
