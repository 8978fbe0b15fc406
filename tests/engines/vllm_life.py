"""One life of a vLLM engine on a CPU, in a process of its own: how it is started, and the options that all have."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

__all__ = ["BLOCK", "SETTINGS", "open_engine", "start"]

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
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow where other processes compute too
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{HERE.parent.parent}:{HERE}",
}


def start(script: str, *arguments: str, is_forked: bool = True, **settings: str) -> list[str]:
    """Run a script, of this folder or an absolute path, in a process of its own; return the lines that it printed.

    settings: of the environment, beside SETTINGS. is_forked: from a process that has imported vLLM, which would take
    most of a short life. Such lives share the seed of Python's hashes, so some that find what others have stored should
    be new interpreters. Raises AssertionError, with what the script wrote, if it fails.
    """
    if is_forked:
        _start_server()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    context: Any = multiprocessing.get_context("forkserver" if is_forked else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        arguments = (script, *arguments)
        life = context.Process(target=_run, args=(arguments, {**environment, **SETTINGS, **settings}, out, errors))
        life.start()
        life.join(LIFE_S)
        if life.exitcode is None:
            life.kill()
            life.join()
        assert life.exitcode == 0, f"{errors.read_text()[-5000:]}\n{out.read_text()[-2000:]}"
        return out.read_text().splitlines()


def _start_server() -> None:
    """Start the process from which lives are forked, unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SETTINGS["PYTHONPATH"])  # the server passes over a module that it does not find
        multiprocessing.set_forkserver_preload(["vllm_preloaded"])
        forkserver.ensure_running()


def _run(arguments: tuple[str, ...], environment: dict[str, str], out: Path, errors: Path) -> None:
    """Be the script."""
    for number, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(HERE)
    sys.path[:0] = SETTINGS["PYTHONPATH"].split(":")
    sys.argv = [str(HERE / arguments[0]), *arguments[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


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
