"""nano-vLLM with and without tierkv: time to the first token, and time a token, in a first and in a restarted process.

Each life of the engine is a process. It asks three prefixes twice: the first time their KV is computed or comes from
the store, the second time the engine has it. Needs a checkout of nano-vLLM: TIERKV_NANO_VLLM names it. `--cpu` runs it
with the stand-ins of tests/engines, to see that this script works; its figures then mean nothing.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
LIVES = ("plain", "tierkv", "restarted, page cache", "restarted, disk")
NUM_PREFIXES = 3
STAGES = ((32, "computed or loaded"), (33, "hot"), (34, "hot, all written"))

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def main() -> None:
    """Run all lives and print a table; `--json FILE` keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--prefix", type=int, default=8192, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each request")
    parser.add_argument("--batch", type=int, default=16, help="requests that run together")
    parser.add_argument("--warm-gib", type=float, default=12.0)
    parser.add_argument("--lives", nargs="+", default=list(LIVES), choices=LIVES)
    parser.add_argument("--folder", type=Path, help="for the model and the store; a temporary one if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make-model", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--life", choices=LIVES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_model:
        make_model(options)
    elif options.life:
        print("LIFE " + json.dumps(live(options)), flush=True)
    elif options.folder:
        run(options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.folder = Path(folder)
            run(options)


def run(options: argparse.Namespace) -> None:
    """Make the model, run the lives one after the other, print what they found."""
    started = time.perf_counter()
    if not (options.folder / "model" / "config.json").exists():
        start(options, "--make-model")
    print(f"model of shape {options.shape}: {time.perf_counter() - started:.0f} s", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for life in options.lives:
        if life == "restarted, disk":
            drop_pages(options.folder / "store")
        found[life] = json.loads(start(options, "--life", life))
        print(f"{life}: {time.perf_counter() - started:.0f} s", flush=True)
        print_table(options, {name: found[name] for name in ("plain", life) if name in found})
    print_table(options, found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def start(options: argparse.Namespace, *what: str) -> str:
    """Run a part of the work in a process of its own; return the JSON text that it prints."""
    arguments = ["--shape", options.shape, "--prefix", str(options.prefix), "--new", str(options.new)]
    arguments += ["--batch", str(options.batch), "--warm-gib", str(options.warm_gib), "--folder", str(options.folder)]
    arguments += ["--cpu"] * options.cpu
    checkout = Path(os.environ.get("TIERKV_NANO_VLLM", ".")).resolve()
    paths = [str(ROOT), str(checkout), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.nano_vllm", *arguments, *what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return "".join(line[5:] for line in process.stdout.splitlines() if line.startswith("LIFE "))


def make_model(options: argparse.Namespace) -> None:
    """Save random weights of a shape, and a tokenizer, which the engine loads but does not use here."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = options.folder / "model"
    dtype = torch.float32 if options.cpu else torch.bfloat16
    config = transformers.Qwen3Config(
        **SHAPES[options.shape],
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        attention_bias=False,
        tie_word_embeddings=False,
        initializer_range=0.02,
        dtype=dtype,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cpu" if options.cpu else "cuda"):
        model = transformers.Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2000)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(folder)


def live(options: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, ask all prompts, end it; return seconds and ids."""
    if options.cpu:
        sys.path.insert(0, str(ROOT / "tests" / "engines"))
        stand_ins = importlib.import_module("nano_vllm_cpu")
        stand_ins.install()
        stand_ins.Memory.num_bytes = 256 << 20
    import nanovllm

    room = {"max_model_len": options.prefix + 1024, "max_num_batched_tokens": 16_384, "max_num_seqs": options.batch}
    room["enforce_eager"] = options.cpu
    started = time.perf_counter()
    if options.life == "plain":
        llm = nanovllm.LLM(str(options.folder / "model"), **room)
        atexit.unregister(llm.exit)  # it fails if it is called twice
    else:
        from tierkv.integrations.nano_vllm import LLM

        warm_bytes = int(options.warm_gib * (1 << 30))
        llm = LLM(options.folder / "model", path=options.folder / "store", warm_bytes=warm_bytes, **room)
    found: dict[str, Any] = {"engine_s": time.perf_counter() - started}

    first, *prefixes = [list(tokens(seed, options.prefix)) for seed in range(NUM_PREFIXES + 1)]
    found["very first"] = ask(llm, first + list(tokens(1032, 32)), options.new)
    found["very first, hot"] = ask(llm, first + list(tokens(1033, 33)), options.new)  # also warms up this shape
    for rest, name in STAGES:
        if rest == 34 and options.life != "plain":
            llm.flush()
        prompts = [prefix + list(tokens(1000 + rest, rest)) for prefix in prefixes]
        found[name] = [ask(llm, prompt, options.new) for prompt in prompts]
    started = time.perf_counter()
    sampling = nanovllm.SamplingParams(1e-6, 2 * options.new, ignore_eos=True)
    llm.generate([list(tokens(2000 + i, 512)) for i in range(options.batch)], sampling, use_tqdm=False)
    found["batch_s"] = time.perf_counter() - started
    if options.life != "plain":
        found["loaded"], found["skipped"] = llm.counts.loaded, dict(llm.store.stats().skip_reasons)
    started = time.perf_counter()
    llm.exit()
    found["exit_s"] = time.perf_counter() - started
    return found


def ask(llm: Any, prompt: list[int], num_new: int) -> dict[str, Any]:
    """Run one request alone: seconds to its first token, seconds a token after that, ids."""
    import nanovllm

    llm.add_request(prompt, nanovllm.SamplingParams(1e-6, num_new, ignore_eos=True))
    seq = llm.scheduler.waiting[-1]
    times = [time.perf_counter()]
    while not seq.is_finished:  # a step ends with a wait for the GPU
        before = seq.num_completion_tokens
        llm.step()
        if seq.num_completion_tokens > before:
            times.append(time.perf_counter())
    rest = [after - before for before, after in pairwise(times[1:])]
    return {"first_s": times[1] - times[0], "token_s": sum(rest) / max(1, len(rest)), "ids": seq.completion_token_ids}


def tokens(seed: int, count: int) -> Iterator[int]:
    """Yield the same tokens in every process."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    yield from torch.randint(5, 1999, (count,), generator=generator, device="cpu").tolist()


def drop_pages(store: Path) -> None:
    """Make the next reads of a store's files come from the disk."""
    for path in store.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Print one line for each life, then the ratios to plain nano-vLLM."""

    def median_ms(life: str, which: str, key: str) -> float:
        return 1e3 * statistics.median(float(each[key]) for each in found[life][which])

    device = "CPU" if options.cpu else torch.cuda.get_device_name()
    print(f"device: {device}  torch: {torch.__version__}  shape: {options.shape}  prefix: {options.prefix}")
    print(f"medians of {NUM_PREFIXES} prefixes; milliseconds to the first token, and a token after it")
    columns = (
        "very first",
        "+32",
        "a token",
        "+33, hot",
        "a token",
        "+34, written",
        "a token",
        f"{options.batch} together",
        "start",
        "exit",
    )
    print(f"{'':<24}" + "".join(f"{column:>14}" for column in columns) + "  blocks loaded")
    for life, each in found.items():
        figures = [
            f"{1e3 * each['very first']['first_s']:.1f}",
            *(f"{median_ms(life, which, key):.2f}" for _, which in STAGES for key in ("first_s", "token_s")),
            *(f"{each[key]:.2f} s" for key in ("batch_s", "engine_s", "exit_s")),
        ]
        print(f"{life:<24}" + "".join(f"{figure:>14}" for figure in figures) + f"  {each.get('loaded', '')}")
    if "plain" not in found:
        return
    for life in [each for each in found if each != "plain"]:
        computed, loaded = (median_ms(each, STAGES[0][1], "first_s") for each in ("plain", life))
        hot = [median_ms(life, which, "first_s") - median_ms("plain", which, "first_s") for _, which in STAGES[1:]]
        token = [median_ms(life, which, "token_s") / median_ms("plain", which, "token_s") for _, which in STAGES]
        same = sum(
            one["ids"] == other["ids"]
            for _, which in STAGES
            for one, other in zip(found["plain"][which], found[life][which], strict=True)
        )
        tokens_text = ", ".join(f"{each:.3f}" for each in token)
        print(
            f"{life}: first token {loaded / computed:.3f} of computing it; hot {hot[0]:+.1f} and {hot[1]:+.1f} ms; "
            f"a token {tokens_text} of plain; {same} of {len(STAGES) * NUM_PREFIXES} answers equal"
        )


if __name__ == "__main__":
    main()
