"""The real vLLM engine on a CPU over its own offloading with tierkv below: its tokens are those of plain vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tierkv import ColdStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

SCRIPT = Path(__file__).parent / "vllm_tier_engine.py"
NUM_RANDOM = 20
TIMEOUT_S = 600
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{Path(__file__).parent.parent.parent}:{Path(__file__).parent}",
}


def live(
    folder: Path, mode: str, num_random: int = NUM_RANDOM, ranks: int = 1, **settings: str
) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), str(folder), mode, str(num_random), str(ranks)]
    environment = {**os.environ, **SETTINGS, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def damage_every_third(folder: Path) -> int:
    with ColdStore(folder) as cold, cold._writer.batch() as batch:
        records = [(bytes(key), bytes(value)) for key, value in batch.txn.cursor(db=batch.databases.blocks)]
        for key, value in records[::3]:
            flipped = bytearray(value)
            flipped[len(flipped) // 2] ^= 1
            batch.txn.put(key, bytes(flipped), db=batch.databases.blocks)
    return len(records[::3])


def test_an_engine_over_the_tier_answers_as_plain_vllm_does(tmp_path: Path) -> None:
    plain = live(tmp_path, "plain")
    expected = [line["ids"] for line in plain]

    def check(life: list[dict[str, Any]]) -> dict[str, Any]:
        *answers, counts = life
        assert [line["ids"] for line in answers] == expected
        return {**counts, "cached": [line["cached"] for line in answers[:3]]}

    first = check(live(tmp_path, "tier"))
    assert first["cached"][0] == 0 and first["saved"] > 13
    again = check(live(tmp_path, "tier"))
    assert again["cached"] == [288, 320, 384] and again["loaded"] > 13 and not again["not_loaded"]
    num_damaged = damage_every_third(tmp_path / "store")
    damaged = check(live(tmp_path, "tier"))
    assert num_damaged and damaged["not_loaded"] and damaged["saved"] >= damaged["not_loaded"]
    repaired = check(live(tmp_path, "tier"))
    assert repaired["cached"] == [288, 320, 384] and not repaired["not_loaded"]
    other = check(live(tmp_path, '{"weights": "other"}'))
    assert other["cached"][0] == 0


def test_ranks_and_a_scheduler_in_its_own_process_find_what_was_stored(tmp_path: Path) -> None:
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    expected = [line["ids"] for line in live(tmp_path, "plain", 0)]
    for ranks, life, cached in ((1, {}, 0), (1, apart, 288), (2, apart, 0), (2, apart, 288)):
        answers = live(tmp_path, "tier", 0, ranks, **life)[:3]
        assert [line["ids"] for line in answers] == expected
        assert answers[0]["cached"] == cached, (ranks, life)
