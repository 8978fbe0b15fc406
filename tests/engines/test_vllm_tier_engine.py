"""The real vLLM engine on a CPU over its own offloading with tierkv below: its tokens are those of plain vLLM."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from random_models import is_answer, is_tie, save_llama
from vllm_life import start

from tierkv import ColdStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

NUM_ASKED = 3  # requests over one prefix, before the random ones
HUNTED = int(os.environ.get("TIERKV_HUNT", "80"))
"""Random requests, of which a quarter each are asked in the first life, in a later one, over damage, of other weights.
"""


def live(folder: Path, mode: str, first: int = 0, end: int = 0, ranks: int = 1, **how: Any) -> list[dict[str, Any]]:
    """Run one engine; return what it printed. how: as `start` takes it."""
    lines = start("vllm_tier_engine.py", str(folder), mode, *map(str, (first, end, ranks)), **how)
    return [json.loads(line) for line in lines if line.startswith("{")]


def damage_every_third(folder: Path) -> int:
    with ColdStore(folder) as cold, cold._writer.batch() as batch:
        records = [(bytes(key), bytes(value)) for key, value in batch.txn.cursor(db=batch.databases.blocks)]
        for key, value in records[::3]:
            flipped = bytearray(value)
            flipped[len(flipped) // 2] ^= 1
            batch.txn.put(key, bytes(flipped), db=batch.databases.blocks)
    return len(records[::3])


def test_an_engine_over_the_tier_answers_as_plain_vllm_does(tmp_path: Path) -> None:
    """TIERKV_HUNT names the number of random requests."""
    save_llama(tmp_path / "model")
    model, quarter = tmp_path / "model", HUNTED // 4
    plain = live(tmp_path, "plain", 0, 4 * quarter)
    assert is_answer(model, plain[-1]["prompt"], plain[-1]["ids"]), "the judge is another model"

    def check(mode: str, first: int = 0, end: int = 0, **how: Any) -> dict[str, Any]:
        *answers, counts = live(tmp_path, mode, first, end, **how)
        expected = plain[:NUM_ASKED] + plain[NUM_ASKED + first : NUM_ASKED + end]
        for one, other in zip(expected, answers, strict=True):
            assert one["prompt"] == other["prompt"]
            assert one["ids"] == other["ids"] or is_tie(model, one["prompt"], one["ids"], other["ids"])
        print(f"{mode}, random requests {first} to {end}: {counts}")
        return {**counts, "cached": [line["cached"] for line in answers[:NUM_ASKED]]}

    first = check("tier", 0, quarter)
    assert first["cached"][0] == 0 and first["saved"] > 13
    again = check("tier", quarter, 2 * quarter, is_forked=False)
    assert again["cached"] == [288, 320, 384] and again["loaded"] > 13 and not again["not_loaded"]
    num_damaged = damage_every_third(tmp_path / "store")
    damaged = check("tier", 2 * quarter, 3 * quarter)
    assert num_damaged and damaged["not_loaded"] and damaged["saved"] >= damaged["not_loaded"]
    repaired = check("tier")
    assert repaired["cached"] == [288, 320, 384] and not repaired["not_loaded"]
    other = check('{"weights": "other"}', 3 * quarter, 4 * quarter)
    assert other["cached"][0] == 0


def test_ranks_and_a_scheduler_in_its_own_process_find_what_was_stored(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    expected = [line["ids"] for line in live(tmp_path, "plain")]
    for ranks, life, cached in ((1, {}, 0), (1, apart, 288), (2, apart, 0), (2, apart, 288)):
        answers = live(tmp_path, "tier", ranks=ranks, **life)[:3]
        assert [line["ids"] for line in answers] == expected
        assert answers[0]["cached"] == cached, (ranks, life)
