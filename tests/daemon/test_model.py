"""Two processes that share nothing but the daemon: one computes, the other finds, and the logits are equal."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from child_process import ENVIRONMENT, command
from daemon_process import Start

WORKER = Path(__file__).with_name("model_worker.py")


def test_the_second_process_hits_the_warm_tier_with_equal_logits(start_daemon: Start, tmp_path: Path) -> None:
    daemon = start_daemon(warm_bytes=64 << 20)

    def run(name: str) -> dict[str, Any]:
        line = command(WORKER, daemon.socket, tmp_path, tmp_path / name)
        environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    first, second = run("first"), run("second")
    assert first["cached_tokens"] == {"hot": 0, "warm": 0, "cold": 0}
    assert second["cached_tokens"] == {"hot": 0, "warm": 299, "cold": 0}
    assert first["token_ids"] == second["token_ids"]
    difference = (torch.load(tmp_path / "first") - torch.load(tmp_path / "second")).abs().max()
    assert float(difference) <= 1e-4
    for each in (first, second):
        assert each["socket_bytes"] < each["block_bytes"] // 8, "five blocks were moved, and not over the socket"
