"""The vLLM connector under vLLM's real engine on a CPU, in fp32: the same tokens as without it, whatever happens."""

from __future__ import annotations

import json
import os
import random
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from random_models import is_answer, is_tie, save_llama
from vllm_life import start
from vllm_run import HUNT_BATCH, hunted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run make test-engines"),
]

HUNTED = int(os.environ.get("TIERKV_HUNT", "160")) // HUNT_BATCH * HUNT_BATCH  # requests
HUNTED_IN_A_LIFE = 2500

PREFIX = [1, 700]
FIRST, SECOND, LONG = [PREFIX, [2, 7]], [PREFIX, [3, 30]], [PREFIX, [4, 130]]
STORY = [[5, 200], [6, 7]]
CROWD = [[[seed, 150 + 20 * seed]] for seed in range(10, 16)]  # together more than the small pool below


class Lives:
    """Lives of engines over one model. Each is a process; `plain` is what vLLM answers without the connector."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        save_llama(self.model)
        self.plain = self.live(
            [
                *(["ask", [prompt], 8] for prompt in (FIRST, SECOND, LONG)),
                ["ask", [STORY], 100],
                ["ask", [["last", [7, 3]]], 8],
                *(["ask", [prompt], 60] for prompt in CROWD),
            ]
        )
        answers = [answer["ids"] for (answer,) in self.plain["answers"]]
        self.first, self.second, self.long, self.story, self.follow_up = answers[:5]
        self.crowd = answers[5:]

    @cached_property
    def plain_hunt(self) -> list[list[dict[str, Any]]]:
        """The answers of plain vLLM to all random requests."""
        found: list[list[dict[str, Any]]] = self.live([["hunt", 1, 0, HUNTED]])["answers"]
        return found

    def live(self, actions: list[Any], *, is_forked: bool = True, **fields: Any) -> dict[str, Any]:
        """Run one engine; return its answers and counters."""
        spec = {"model": str(self.model), "actions": actions, **fields}
        return json.loads(start("vllm_run.py", json.dumps(spec), is_forked=is_forked)[-1])


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def store(lives: Lives) -> Path:
    """A store in which an engine has left FIRST, SECOND and STORY with its answer."""
    path = lives.folder / "store"
    result = lives.live(
        [
            ["ask", [FIRST], 8],
            ["reset"],
            ["ask", [SECOND], 8],
            ["ask", [STORY], 100],
            ["reset"],
            ["ask", [["last", [7, 3]]], 8],
        ],
        store=str(path),
    )
    (first,), (second,), (story,), (follow_up,) = result["answers"]
    assert [each["ids"] for each in (first, second, story, follow_up)] == [
        lives.first,
        lives.second,
        lives.story,
        lives.follow_up,
    ]
    assert first["cached"] == 0
    assert second["cached"] == 640  # the ten whole blocks of the prefix
    assert follow_up["cached"] == 256  # what was generated is kept
    return path


def test_what_was_generated_is_kept_and_tokens_are_equal_in_the_first_life(store: Path) -> None:
    assert store.is_dir()


def test_a_restarted_engine_finds_the_prefix_on_disk(lives: Lives, store: Path) -> None:
    actions = [["ask", [FIRST], 8], ["ask", [LONG], 8], ["reset"], ["ask", [FIRST], 8]]
    result = lives.live(actions, store=str(store), is_forked=False)
    (first,), (longer,), (again,) = result["answers"]
    assert [first["ids"], longer["ids"], again["ids"]] == [lives.first, lives.long, lives.first]
    assert first["cached"] == 704
    assert result["counted"]["loaded_blocks"] >= 11
    assert not result["counted"].get("failed_blocks")


def test_a_damaged_store_costs_computations_only(lives: Lives, store: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "store"
    damaged.mkdir()
    for file in store.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    data = bytearray((damaged / "data.mdb").read_bytes())
    dice = random.Random(0)
    for at in range(len(data) // 3, len(data), 1 << 14):
        data[min(len(data) - 1, at + dice.randrange(1 << 14))] ^= 0xFF
    (damaged / "data.mdb").write_bytes(data)
    result = lives.live([["ask", [FIRST], 8], ["ask", [LONG], 8], ["ask", [STORY], 100]], store=str(damaged))
    assert [answer["ids"] for (answer,) in result["answers"]] == [lives.first, lives.long, lives.story]


@pytest.mark.parametrize("engine", [{}, {"distributed_executor_backend": "mp"}], ids=["one process", "two processes"])
def test_blocks_that_do_not_come_are_computed_and_their_garbage_is_not_kept(
    lives: Lives, store: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    copy = tmp_path / "store"
    copy.mkdir()
    for file in store.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    failing = [["fail", 1 / 3], ["ask", [FIRST, LONG, SECOND], 8], ["reset"], ["ask", [LONG], 8], ["ask", [STORY], 100]]
    result = lives.live(failing, store=str(copy), engine=engine)
    first, longer, second = (answer["ids"] for answer in result["answers"][0])
    assert [first, longer, second] == [lives.first, lives.long, lives.second]
    assert [answer["ids"] for (answer,) in result["answers"][1:]] == [lives.long, lives.story]
    if not engine:
        assert result["counted"]["failed_blocks"] > 3
    after = lives.live([["ask", [LONG], 8], ["ask", [FIRST], 8]], store=str(copy))
    assert [answer["ids"] for (answer,) in after["answers"]] == [lives.long, lives.first]
    assert after["answers"][0][0]["cached"] >= 640


def test_scheduler_and_worker_in_two_processes(lives: Lives, store: Path) -> None:
    actions = [
        *(["ask", [SECOND], 8], ["abort", LONG, 1], ["ask", [LONG, FIRST], 8], ["ask", CROWD[:2], 60]),
        *(["abort", CROWD[2], 9], ["reset"], ["ask", [FIRST], 8]),
    ]
    result = lives.live(actions, store=str(store), engine={"distributed_executor_backend": "mp"})
    (second,), (longer, first), crowd, (again,) = result["answers"]
    assert [each["ids"] for each in (second, longer, first, again)] == [
        *(lives.second, lives.long, lives.first, lives.first)
    ]
    assert [each["ids"] for each in crowd] == lives.crowd[:2]
    assert second["cached"] >= 640
    assert again["cached"] == 704


def test_preemption_in_a_pool_that_is_too_small_with_chunked_prefill(lives: Lives, tmp_path: Path) -> None:
    small = {
        "max_model_len": 512,
        "num_gpu_blocks_override": 30,
        "max_num_batched_tokens": 128,
        "enable_chunked_prefill": True,
    }
    store = str(tmp_path / "store")
    once = [["ask", CROWD, 60]]
    for engine in (small, {**small, "async_scheduling": True}):
        result = lives.live([*once, *once, ["reset"], *once], store=store, engine=engine)
        for answers in result["answers"]:
            assert [answer["ids"] for answer in answers] == lives.crowd
        assert result["counted"]["loaded_blocks"] > 10


def test_two_ranks_of_a_split_model(lives: Lives, tmp_path: Path) -> None:
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    for cached in (0, 704):
        result = lives.live([["ask", [FIRST], 8]], store=str(tmp_path / "store"), engine=engine)
        ((first,),) = result["answers"]
        assert (first["ids"], first["cached"]) == (lives.first, cached)


def test_two_ranks_measure_the_disk_before_the_first_request_and_a_slow_one_is_not_waited_for(
    lives: Lives, tmp_path: Path
) -> None:
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    path = tmp_path / "store"
    for _ in range(2):
        lives.live([["ask", [FIRST], 8]], store=str(path), engine=engine)
    scheduler, *others = sorted(path.glob("costs-*.json"), key=lambda file: "scheduler" not in file.name)
    assert len(others) == 2
    for file, seconds in zip(others, (0.0, 9.0), strict=True):
        costs = json.loads(file.read_text())
        assert len(costs["PAGE_CACHE"]) > 1, "more than the one load"
        file.write_text(json.dumps({"PAGE_CACHE": [[1, seconds]], "DISK": [[1, seconds]]}))
    computing = [[32, 0.01], [1024, 0.1]]
    scheduler.write_text(json.dumps({"compute": computing}))
    result = lives.live([["ask", [FIRST], 8]], store=str(path), engine=engine, options={"compute_or_load": True})
    ((first,),) = result["answers"]
    assert (first["ids"], first["cached"]) == (lives.first, 0)


def test_a_change_of_weights_stops_the_cache_and_a_reset_begins_a_new_one(lives: Lives, store: Path) -> None:
    actions = [
        *(["reload"], ["reset"], ["ask", [FIRST], 8]),  # stopped
        *(["reset_connector"], ["ask", [FIRST], 8]),  # nothing from before
        *(["reset"], ["ask", [FIRST], 8]),  # what this engine has saved since then
    ]
    result = lives.live(actions, store=str(store))
    assert [answer["ids"] for (answer,) in result["answers"]] == [lives.first] * 3
    assert [answer["cached"] for (answer,) in result["answers"]] == [0, 0, 704]


def test_aborted_requests_leave_nothing_behind(lives: Lives, store: Path) -> None:
    actions = [["abort", FIRST, 0], ["abort", LONG, 1], ["abort", STORY, 70], ["reset"], ["ask", [LONG], 8]]
    result = lives.live([*actions, ["ask", [STORY], 100]], store=str(store))
    assert [answer["ids"] for (answer,) in result["answers"]] == [lives.long, lives.story]


@pytest.mark.parametrize(("executor", "ranks"), [("uni", 1), ("mp", 1), ("mp", 2)])
def test_random_requests_get_the_tokens_of_plain_vllm_over_two_lives(
    lives: Lives, tmp_path: Path, executor: str, ranks: int
) -> None:
    """TIERKV_HUNT names the number of requests."""
    plain = lives.plain_hunt
    small = {"max_model_len": 512, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 512}
    engine = {**small, "distributed_executor_backend": executor, "tensor_parallel_size": ranks}
    store, found = str(tmp_path / "store"), []
    num_lives = max(2, HUNTED // HUNTED_IN_A_LIFE)
    ends = [HUNTED * i // num_lives // HUNT_BATCH * HUNT_BATCH for i in range(num_lives + 1)]
    for first, end in pairwise(ends):
        life = lives.live([["hunt", 1, first, end]], store=store, engine=engine)
        found += life["answers"]
        print(f"requests {first} to {end}: {life['counted']}")
    first_prompt, first_answer = hunted(1, 0)[0][0], plain[0][0]["ids"]
    assert is_answer(lives.model, first_prompt, first_answer), "the judge is another model"
    num_tokens = 0
    for number, expected, answers in zip(range(0, HUNTED, HUNT_BATCH), plain, found, strict=True):
        for prompt, one, other in zip(hunted(1, number)[0], expected, answers, strict=True):
            num_tokens += len(one["ids"])
            assert one["ids"] == other["ids"] or is_tie(lives.model, prompt, one["ids"], other["ids"]), number
    print(f"{HUNTED} requests, {num_tokens} tokens compared")


def test_another_policy_for_failed_loads_is_refused_with_the_reason(lives: Lives, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="kv_load_failure_policy"):
        lives.live([], store=str(tmp_path), policy="fail")
