"""One life of a vLLM engine on a CPU, in a process of its own: how it is started, and the options that all have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "open_engine", "start"]

BLOCK = 32  # the CPU backend wants a multiple of 32
HERE = Path(__file__).parent
LIFE_S = 3600
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{HERE.parent.parent}:{HERE}",
}


def start(script: str, *arguments: str, **settings: str) -> list[str]:
    """Run a script of this folder with the interpreter that runs the tests; return the lines that it printed.

    settings: of the environment, beside SETTINGS. Raises AssertionError, with what it wrote, if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        timeout=LIFE_S,
        cwd=HERE,
        env={**environment, **SETTINGS, **settings},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.splitlines()


def open_engine(model: str, **options: Any) -> Any:
    """Return vLLM's LLM in float32, with these options beside those below."""
    from vllm import LLM

    engine: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "seed": 0,
        **options,
    }
    return LLM(model, **engine)
