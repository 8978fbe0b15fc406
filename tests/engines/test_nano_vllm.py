"""The real nano-vLLM over tierkv, on a CPU in float32: its answers are those of plain nano-vLLM, token by token.

The engine's source is not part of this repository. TIERKV_NANO_VLLM names a checkout of
github.com/GeeeekExplorer/nano-vllm at bb823b3, whose folder `nanovllm` is imported.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_models import is_answer, is_tie

from benchmarks.random_models import save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHECKOUT = os.environ.get("TIERKV_NANO_VLLM", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(CHECKOUT) / "nanovllm").is_dir(),
        reason="TIERKV_NANO_VLLM names no checkout of github.com/GeeeekExplorer/nano-vllm (bb823b3)",
    ),
]

TIMEOUT_S = 300
HUNTED_REQUESTS = int(os.environ.get("TIERKV_HUNTED_REQUESTS", "120"))
REQUESTS_PER_LIFE = 60


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("nano") / "model")


def make_model(folder: Path) -> Path:
    """Save a random Qwen3 of two layers. The spread of its weights makes the greedy tokens stable."""
    config = transformers.Qwen3Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_bias=False,
        rope_theta=1e6,
        initializer_range=0.3,
        dtype=torch.float32,
    )
    save_model(folder, config)
    return folder


def live(model: Path, *lives: dict[str, Any]) -> list[dict[str, Any]]:
    """Run lives of the engine in one process; return what each found."""
    spec = model.parent / f"spec-{random.getrandbits(40)}.json"
    spec.write_text(json.dumps({"model": str(model), "lives": lives}))
    paths = [str(ROOT), CHECKOUT, str(HERE)]
    process = subprocess.run(
        [sys.executable, str(HERE / "nano_vllm_life.py"), str(spec)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = [json.loads(line[5:]) for line in process.stdout.splitlines() if line.startswith("LIFE ")]
    assert len(found) == len(lives)
    return found


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 1000) for _ in range(count)]


def requests() -> list[list[dict[str, Any]]]:
    """Three requests over one prefix of four blocks, one after the other; then eight at once, half of them over it."""
    prefix = tokens(7, 1024)
    alone = [[{"tokens": prefix + tokens(rest, rest), "new": 8}] for rest in (32, 33, 300)]
    mixed = [{"tokens": (prefix if i % 2 else []) + tokens(100 + i, 300 + 37 * i), "new": 8} for i in range(8)]
    return [*alone, mixed]


def crowd() -> list[list[dict[str, Any]]]:
    """Four requests that outgrow a pool of 13 blocks while they are decoded."""
    return [[{"tokens": tokens(200 + i, 700), "new": 150} for i in range(4)]]


@pytest.fixture(scope="session")
def plain(model: Path) -> dict[str, Any]:
    mixed, crowded = live(model, {"rounds": requests()}, {"rounds": crowd(), "pool_blocks": 13})
    assert crowded["preempted"] > 0
    return {"mixed": mixed["answers"], "crowd": crowded["answers"]}


def flip_bytes(store: Path, every: int) -> int:
    """Flip one byte in `every` of the store's largest file; return how many."""
    (path,) = sorted(store.rglob("*.mdb"), key=lambda each: each.stat().st_size)[-1:]
    data = bytearray(path.read_bytes())
    places = range(100_000, len(data), every)
    for place in places:
        data[place] ^= 0xFF
    path.write_bytes(data)
    return len(places)


def test_answers_are_equal_computed_cached_restarted_and_from_a_damaged_store(
    model: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (first,) = live(model, {"path": str(store), "rounds": requests()})
    assert first["answers"] == plain["mixed"]
    assert first["own"] > 0, "the engine's own hits"

    restarted, again = live(model, *[{"path": str(store), "rounds": requests()}] * 2)
    assert restarted["answers"] == again["answers"] == plain["mixed"]
    assert restarted["loaded"] >= 4, "the prefix came from the store"
    assert restarted["own"] > 0, "and was found in the engine's memory afterwards"

    assert flip_bytes(store, 50_000) > 10
    damaged, mended = live(model, *[{"path": str(store), "rounds": requests()}] * 2)
    assert damaged["answers"] == mended["answers"] == plain["mixed"]
    assert damaged["misses"], "damage is counted"


def test_preempted_sequences_are_resumed_from_the_tiers(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    small = {"path": str(tmp_path / "store"), "rounds": crowd(), "pool_blocks": 13}
    in_memory = {**small, "path": ""}
    first, restarted, memory_only = live(model, small, small, in_memory)
    assert first["answers"] == restarted["answers"] == memory_only["answers"] == plain["crowd"]
    assert first["preempted"] > 0 and first["loaded"] > 0
    assert memory_only["preempted"] > 0 and memory_only["loaded"] > 0
    assert restarted["loaded"] > first["loaded"]


def test_a_load_that_fails_is_computed_instead(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    first, failed = live(
        model, {"path": store, "rounds": requests()}, {"path": store, "rounds": requests()[::-1], "fail_loads": 2}
    )
    assert first["answers"] == plain["mixed"]
    assert failed["answers"] == plain["mixed"][::-1]
    assert failed["preempted"] > 0, "the way back is the engine's own preemption"


def test_a_prompt_larger_than_the_warm_memory_is_loaded(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    small = {"path": str(tmp_path / "store"), "rounds": requests(), "warm_bytes": 4 * 131072}
    first, restarted = live(model, small, small)
    assert first["answers"] == restarted["answers"] == plain["mixed"]
    assert restarted["loaded"] > 0


def test_another_block_size_and_another_salt_find_nothing(model: Path, tmp_path: Path) -> None:
    store, rounds = str(tmp_path / "store"), requests()[:1]
    changed = [{"kvcache_block_size": 512}, {"salt": "other"}]
    first, *others, same = live(
        model,
        {"path": store, "rounds": rounds},
        *[{"path": store, "rounds": rounds, "options": each} for each in changed],
        {"path": store, "rounds": rounds},
    )
    assert [each["loaded"] for each in (first, *others, same)] == [0, 0, 0, 4]
    assert others[0]["answers"] == first["answers"]


def random_rounds(seed: int, num_requests: int) -> list[list[dict[str, Any]]]:
    """Requests over a few common beginnings, cut and continued at random, one to six at a time."""
    draw = random.Random(seed)
    known = [tokens(900 + i, draw.randrange(200, 1100)) for i in range(6)]
    rounds: list[list[dict[str, Any]]] = []
    while num_requests > 0:
        together = []
        for _ in range(min(num_requests, draw.randrange(1, 7))):
            base = draw.choice(known)
            prompt = base[: draw.randrange(len(base) // 2, len(base) + 1)] + tokens(
                draw.getrandbits(40), draw.choice((1, 40, 300))
            )
            known[draw.randrange(len(known))] = prompt[:1500]
            together.append({"tokens": prompt[:1800], "new": draw.choice((1, 4, 30, 120))})
        rounds.append(together)
        num_requests -= len(together)
    return rounds


def test_random_requests_are_answered_as_without_tierkv(model: Path, tmp_path: Path) -> None:
    """In small pools, with little memory, over one store that is damaged again and again."""
    store = str(tmp_path / "store")
    for seed in range(-(-HUNTED_REQUESTS // REQUESTS_PER_LIFE)):
        rounds = random_rounds(seed // 2, REQUESTS_PER_LIFE)  # each is asked in two lives
        draw = random.Random(seed)
        small = {"pool_blocks": draw.choice((9, 14, 40)), "warm_bytes": draw.choice((6, 20, 100)) * 131072}
        small["may_compute"] = draw.random() < 0.2
        first = [] if seed % 2 else [{"rounds": rounds}]
        *plain, tiered = live(model, *first, {"path": store, "rounds": rounds, **small})
        if plain:
            answers = plain[0]["answers"]
            assert is_answer(model, rounds[0][0]["tokens"], answers[0][0]), "the judge is another model"
        for requests_, expected, found in zip(rounds, answers, tiered["answers"], strict=True):
            for request, one, other in zip(requests_, expected, found, strict=True):
                assert one == other or is_tie(model, request["tokens"], one, other), (seed, small)
        assert tiered["loaded"] > 0 or not seed % 2 or small["may_compute"]
        print(seed, {name: value for name, value in tiered.items() if name != "answers"})
        if seed % 4 == 1:
            flip_bytes(Path(store), 300_000)


def test_several_gpus_are_refused_with_the_reason(model: Path, tmp_path: Path) -> None:
    code = f"""
import nano_vllm_cpu; nano_vllm_cpu.install()
from tierkv.errors import UnsupportedModelError
from tierkv.integrations.nano_vllm import LLM
try:
    LLM({str(model)!r}, path={str(tmp_path / "store")!r}, tensor_parallel_size=2)
except UnsupportedModelError as error:
    print(error)
"""
    paths = [str(ROOT), CHECKOUT, str(HERE)]
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert "on one GPU" in process.stdout, process.stderr
