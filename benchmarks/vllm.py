"""vLLM over tierkv beside vLLM's own tiers, on one GPU or several: the first token after a long prefix, and decoding.

One process is one life of an engine; lives of a mode share a store, so the second is a restart. The model has random
weights and Llama-3.1-8B's shape. Each mode runs in the same minutes on the same machine: compare within one table.
With `--tensor-parallel N` the model is split over N GPUs, and each worker saves and loads its own slice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.random_models import save_model
from tierkv.block_store.cost_file import restore_costs
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.integrations.vllm.session import find_session
from tierkv.integrations.weights import weights_digest

__all__ = ["main"]

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that a life ends with it
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",  # without it vLLM's fs tier has other keys in every process
}
_LIVES = {"none": 1, "tierkv": 2, "tierkv-raw": 2, "tierkv-socket": 2, "fs": 2, "cpu": 1}
_DECODES = ("none", "tierkv", "tierkv-raw", "tierkv-socket")
_VOCABULARY = 32000
_BLOCK_TOKENS = 256  # the connector's default
_TAIL = 33  # tokens behind the prefix
_STORING_S = 4
_NUM_DECODING = 32
_DECODE_ROUNDS = 5
_CPU_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
_LIFE_S = {False: 240, True: 1200}  # by --cpu
_GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64]  # fewer than vLLM captures of itself: a life starts sooner


def main() -> None:
    """Run all modes and print a table; with `--life MODE` only one life, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=list(_LIVES), default=list(_LIVES))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=16, help="of the engine; 16 is vLLM's default")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="GPUS", help="that the model is split over")
    parser.add_argument("--model", type=Path, default=Path("/dev/shm/tierkv-llama"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--decode", action="store_true", help="also decode beside saves, at the end of a mode's last life"
    )
    parser.add_argument("--cpu", action="store_true", help="two narrow layers on a CPU: shows that it works, no speeds")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--life", choices=list(_LIVES))
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cpu and arguments.model == parser.get_default("model"):
        arguments.model = Path("/dev/shm/tierkv-llama-cpu")
    if arguments.life:
        _run_life(arguments)
        return
    _make_model(arguments.model, arguments.layers, is_narrow=arguments.cpu)
    arguments.weights = weights_digest(arguments.model)
    rows: list[dict[str, Any]] = []
    for mode in arguments.modes:
        with tempfile.TemporaryDirectory(prefix="tierkv-vllm-") as folder, ExitStack() as ending:
            if mode == "tierkv-socket":
                ending.enter_context(_daemon(Path(folder)))
            for number in range(_LIVES[mode]):
                rows += _life(arguments, mode, number, Path(folder))
    _print(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def _life(arguments: argparse.Namespace, mode: str, number: int, folder: Path) -> list[dict[str, Any]]:
    """Run one life in a process of its own, and return what it measured."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.vllm",
        "--life",
        mode,
        "--number",
        str(number),
        "--folder",
        str(folder),
    ]
    for name in ("layers", "prefix", "block_size", "tensor_parallel", "model", "weights"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += [f"--{name}" for name in ("decode", "eager", "cpu") if getattr(arguments, name)]
    limit_s = _LIFE_S[arguments.cpu]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"mode"')]
    if done.returncode or not rows:
        print(f"{mode}, life {number} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        if mode in ("none", "tierkv"):
            sys.exit(1)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def _run_life(arguments: argparse.Namespace) -> None:
    for name, value in (_SETTINGS | (_CPU_SETTINGS if arguments.cpu else {})).items():
        os.environ.setdefault(name, value)
    import torch

    mode, number = arguments.life, arguments.number
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    store = arguments.folder / mode
    options: dict[str, Any] = {}
    if mode != "none":
        options["kv_transfer_config"] = _transfer_config(mode, store, arguments.weights, is_small=arguments.cpu)
    if arguments.tensor_parallel > 1:
        options["distributed_executor_backend"] = "mp"
    if arguments.cpu:
        options |= {"disable_custom_all_reduce": True}
    else:
        options |= {"attention_backend": "FLASH_ATTN", "gpu_memory_utilization": 0.6}
    if not arguments.eager and not arguments.cpu:
        options["compilation_config"] = {"cudagraph_capture_sizes": _GRAPH_SIZES}
    llm = LLM(
        str(arguments.model),
        dtype="float32" if arguments.cpu else "bfloat16",
        max_model_len=arguments.prefix + 2048,
        max_num_batched_tokens=16384,
        max_num_seqs=64,
        block_size=arguments.block_size,
        tensor_parallel_size=arguments.tensor_parallel,
        enforce_eager=arguments.eager or arguments.cpu,
        enable_prefix_caching=True,
        **options,
    )

    def report(what: str, value: float, **more: Any) -> None:
        print(json.dumps({"mode": mode, "life": number, "what": what, "value": round(value, 2), **more}), flush=True)

    report("seconds to start", time.perf_counter() - started)
    transfer = llm.llm_engine.vllm_config.kv_transfer_config
    session = find_session(transfer.engine_id) if transfer else None
    if session:
        report("decodes on the GPU", session.store.decodes_on_gpu)

    def ask(prompts: list[list[int]], new_tokens: int, **more: Any) -> tuple[float, list[Any]]:
        parameters = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, **more)
        if not arguments.cpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": each} for each in prompts], parameters, use_tqdm=False)
        return time.perf_counter() - begun, answers

    def first_token(what: str, seed: int, tail: int = _TAIL) -> None:
        seconds, (answer,) = ask([_tokens(seed, arguments.prefix) + _tokens(1000 + tail, tail)], 1, logprobs=2)
        (chosen,) = answer.outputs
        best, second, *_ = sorted((each.logprob for each in chosen.logprobs[0].values()), reverse=True)
        more = {"prompt": [seed, tail], "cached_tokens": answer.num_cached_tokens}
        more |= {"lead": round(best - second, 4), "logprob": best}
        report(what, 1e3 * seconds, ids=list(chosen.token_ids), **more)

    def report_costs(when: str) -> None:
        for what, value in _expected_ms(store, arguments.prefix).items():
            report(f"expected {when}, {what}", value)

    report_costs("at start")
    for tail in (_TAIL, _TAIL + 1):  # what is compiled at its first use; the second is the engine's own hit
        ask([_tokens(90 + number, arguments.prefix) + _tokens(80, tail)], 1, logprobs=2)
    ask([_tokens(95, 40)], 8)

    def settle() -> None:
        """Let the engine store what it stores behind requests, then wake it again."""
        time.sleep(_STORING_S)
        ask([_tokens(95, 40)], 8)

    if number == 0:
        for seed in (1, 2, 3):
            first_token("computed", seed, tail=_TAIL - 1)
        for seed in (1, 2, 3):
            first_token("engine's own hit", seed)
        if mode != "none":
            settle()
            for seed in (1, 2, 3):
                assert llm.reset_prefix_cache()
                first_token("cache emptied", seed)
    else:
        settle()
        first_token("restarted, page cache", 1)
        first_token("restarted, page cache", 2)
        _forget_pages(arguments.folder)
        first_token("restarted, disk", 3)
    if arguments.decode and mode in _DECODES and number == _LIVES[mode] - 1:
        for at in range(_DECODE_ROUNDS + 1):
            seconds, _ = ask([_tokens(300 + 100 * at + row, 512) for row in range(_NUM_DECODING)], 256)
            if at:
                report(f"decoding {_NUM_DECODING} sequences, tokens a second", _NUM_DECODING * 256 / seconds)
        if session:
            begun = time.perf_counter()
            session.store.flush()
            report("seconds until all of it is stored", time.perf_counter() - begun)
            report("blocks not saved", sum(session.store.stats().skip_reasons.values()))
    llm.llm_engine.engine_core.shutdown()
    report_costs("at the end")


def _expected_ms(store: Path, num_tokens: int) -> dict[str, float]:
    """Return what the costs beside a store say of a prefix: milliseconds to compute it, and to load it from a place.

    With several workers, of all their files together.
    """
    costs = LoadOrCompute(block_size=_BLOCK_TOKENS)
    for path in store.glob("costs-*.json"):
        restore_costs(path, costs)
    found = {origin.name: costs.load_s(num_tokens // _BLOCK_TOKENS, origin=origin) for origin in Origin}
    found["computing"] = costs.compute_s(num_tokens)
    return {what: 1e3 * seconds for what, seconds in found.items() if seconds is not None}


@contextmanager
def _daemon(folder: Path) -> Iterator[None]:
    """Run a daemon with a store and a socket in a folder."""
    command = [sys.executable, "-m", "tierkv", "daemon", "start", "--store", str(folder / "store"), "--warm", "8G"]
    daemon = subprocess.Popen([*command, "--socket", str(folder / "socket")], stdout=subprocess.DEVNULL)
    try:
        while not (folder / "socket").exists():
            if daemon.poll() is not None:
                sys.exit("the daemon has ended")
            time.sleep(0.1)
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def _transfer_config(mode: str, store: Path, weights: str, *, is_small: bool) -> dict[str, Any]:
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if mode.startswith("tierkv"):
        extra: dict[str, Any] = {"weights": weights}
        if mode == "tierkv-socket":
            extra |= {"socket": str(store.parent / "socket")}
        else:
            extra |= {"path": str(store), "warm_bytes": 64 << 20 if is_small else 8 << 30}
        if is_small:  # such a model is computed faster than it is loaded
            extra |= {"compute_or_load": False, "block_tokens": 64}
        extra |= {"codec": "raw"} if mode == "tierkv-raw" else {}
        module = "tierkv.integrations.vllm"
        return common | {
            "kv_connector": "TierkvConnector",
            "kv_connector_module_path": module,
            "kv_connector_extra_config": extra,
        }
    extra = {"cpu_bytes_to_use": 8 << 30}
    if mode == "fs":
        extra |= {
            "spec_name": "TieringOffloadingSpec",
            "secondary_tiers": [{"type": "fs", "root_dir": str(store)}],
        }
    return common | {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}


def _make_model(folder: Path, num_layers: int, *, is_narrow: bool) -> None:
    """Write a random Llama of 8B's width, or a narrow one of two layers, once."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import LlamaConfig

    width = 128 if is_narrow else 4096
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=256 if is_narrow else 14336,
        num_hidden_layers=2 if is_narrow else num_layers,
        num_attention_heads=4 if is_narrow else 32,
        num_key_value_heads=4 if is_narrow else 8,
        head_dim=32 if is_narrow else 128,
        max_position_embeddings=65536,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        dtype=torch.float32 if is_narrow else torch.bfloat16,
    )
    save_model(folder, config, device="cpu" if is_narrow else "cuda")
    if not is_narrow:
        torch.cuda.empty_cache()


def _tokens(seed: int, count: int) -> list[int]:
    words = random.Random(seed)
    return [words.randrange(5, _VOCABULARY) for _ in range(count)]


def _forget_pages(folder: Path) -> None:
    """Have the system drop a store's files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _print(rows: list[dict[str, Any]]) -> None:
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    print(f"{'':<44}" + "".join(f"{mode:>13}" for mode in modes))
    for what in dict.fromkeys(row["what"] for row in rows):
        values = {mode: [row["value"] for row in rows if (row["mode"], row["what"]) == (mode, what)] for mode in modes}
        print(f"{what:<44}" + "".join(f"{median(found) if found else '':>13}" for found in values.values()))
    asked = [row for row in rows if "ids" in row]
    for row in (row for row in asked if row["what"] == "engine's own hit"):
        cached = row["cached_tokens"]
        same = [each for each in asked if (each["prompt"], each["cached_tokens"]) == (row["prompt"], cached)]
        furthest = max(abs(each["logprob"] - row["logprob"]) for each in same)
        num_equal = sum(each["ids"] == row["ids"] for each in same)
        print(
            f"prompt {row['prompt']}, {cached} tokens of it cached by {row['mode']}'s engine: {num_equal} of "
            f"{len(same)} first tokens equal, log-probability within {furthest:.4f}, lead of the best {row['lead']:.4f}"
        )
    for mode in modes:
        cached = [row["cached_tokens"] for row in asked if row["mode"] == mode]
        print(f"{mode}: cached tokens of its prompts {cached}")


if __name__ == "__main__":
    main()
