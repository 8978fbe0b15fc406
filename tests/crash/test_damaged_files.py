"""Hundreds of flipped bits and cuts, in the data file and in state files: what is whole is there, the rest a miss.

The damaged files are used in a process of their own, so that one that dies of a signal is a test that fails.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from child_process import ENVIRONMENT, command

WORKER = Path(__file__).with_name("damage_worker.py")
TIMEOUT_S = 120


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("flip_store", 300),
        ("cut_store", 60),
        ("flip_open_values", 100),
        ("flip_open_trees", 200),
        ("cut_open", 60),
        ("flip_state", 400),
        ("cut_state", 100),
    ],
)
def test_damage_costs_only_what_it_hits_and_no_process_dies(tmp_path: Path, kind: str, cases: int) -> None:
    done = subprocess.run(
        command(WORKER, kind, tmp_path, 0, cases),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    last_seed = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last_seed}, exit code {done.returncode}\n{done.stderr}"
