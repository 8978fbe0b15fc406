"""One life of a vLLM engine on a CPU: `python vllm_run.py SPEC`, where SPEC is JSON; it prints one JSON line.

The tests start it by `vllm_life.start`. Fields of the spec are those of `Spec`.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from typing import Any

from random_models import VOCABULARY
from vllm_life import open_engine

HUNT_BATCH = 16


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
    from vllm import SamplingParams

    engine = dict(spec.engine)
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
    llm = open_engine(spec.model, **engine)
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


def hunted(seed: int, start: int) -> tuple[list[list[int]], list[int], bool]:
    """Return random prompts over a few stems, HUNT_BATCH of them, their new tokens, and whether a reset follows."""
    dice = random.Random(seed * 1_000_003 + start)
    prompts, new_tokens = [], []
    for _ in range(HUNT_BATCH):
        stem = [[dice.randrange(6), dice.randrange(1, 360)]]
        prompts.append(tokens_of([*stem, [dice.randrange(1 << 30), dice.randrange(1, 60)]], []))
        new_tokens.append(dice.randrange(1, 24))
    return prompts, new_tokens, dice.random() < 0.3


def hunt(llm: Any, seed: int, first: int, end: int) -> list[list[dict[str, Any]]]:
    """Ask random requests, several at a time; now and then abort one first, or empty the engine's cache."""
    from vllm import SamplingParams

    answers = []
    for start in range(first, end, HUNT_BATCH):
        prompts, new_tokens, is_reset = hunted(seed, start)
        if start % (3 * HUNT_BATCH) == 0:
            abort(llm.llm_engine, (prompts[0] + prompts[1])[:300], len(prompts[0]) % 4)
        samplings = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in new_tokens]
        outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], samplings, use_tqdm=False)
        answers.append([{"cached": out.num_cached_tokens, "ids": list(out.outputs[0].token_ids)} for out in outputs])
        if is_reset:
            llm.reset_prefix_cache()
    return answers


def abort(engine: Any, prompt: list[int], num_steps: int) -> None:
    """Begin a request and abort it after some steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    engine.add_request("aborted", {"prompt_token_ids": prompt}, sampling)
    for _ in range(num_steps):
        engine.step()
    assert engine.has_unfinished_requests()
    engine.abort_request(["aborted"])  # by the name that was given, not the one that add_request returns
    assert not engine.has_unfinished_requests()


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
