"""The engines that benchmarks/serving.py measures: a runner of tierkv, and nano-vLLM."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.nano_vllm import ROOT, tokens

__all__ = ["WINDOW", "Engine", "NanoEngine", "TierkvEngine", "random_model"]

WINDOW = 16  # tokens over which the pace of decoding sequences is taken


class Engine(Protocol):
    """What is measured. `generate` returns seconds; `ask` the time of each token of one prompt after the call.

    `join` lets requests join one after the other while `prompts` decode. For each it returns the seconds to its first
    token, and the seconds a token of the others: before, and over the WINDOW tokens after it was sent.
    """

    def generate(self, prompts: Sequence[list[int]], num_new: int) -> float: ...
    def ask(self, prompt: list[int], num_new: int) -> list[float]: ...
    def join(self, prompts: Sequence[list[int]], late: Sequence[list[int]]) -> list[dict[str, float]]: ...


class TierkvEngine:
    """A runner of ours."""

    def __init__(self, runner: Any, options: argparse.Namespace) -> None:
        self._runner = runner
        self._temperature = options.temperature

    def options(self, num_new: int) -> Any:
        """Return the options of a call: no stop ids, sampled."""
        from tierkv import GenerationOptions, SamplingOptions

        sampling = SamplingOptions(temperature=self._temperature)
        return GenerationOptions(max_new_tokens=num_new, stop_ids=frozenset(), store_partial=False, sampling=sampling)

    def generate(self, prompts: Sequence[list[int]], num_new: int) -> float:
        started = time.perf_counter()
        self._runner.generate(prompts, self.options(num_new))
        return time.perf_counter() - started

    def ask(self, prompt: list[int], num_new: int) -> list[float]:
        started = time.perf_counter()
        return [time.perf_counter() - started for _ in self._runner.stream([prompt], self.options(num_new))]

    def join(self, prompts: Sequence[list[int]], late: Sequence[list[int]]) -> list[dict[str, float]]:
        """Send each late request at a random moment of a step."""
        from tierkv import Engine as ServingEngine

        rounds: list[dict[str, float]] = []
        dice = random.Random(0)
        with ServingEngine(self._runner) as engine:
            streams = [engine.submit(prompt, self.options(3 * WINDOW * (len(late) + 1))) for prompt in prompts]
            events = iter(streams[-1])
            for _ in range(WINDOW):
                next(events)
            for prompt in late:
                found = {"before_s": self._tokens_s(events)}
                time.sleep(dice.random() * found["before_s"])
                started = time.perf_counter()
                stream = engine.submit(prompt, self.options(WINDOW))
                reader = threading.Thread(target=self._time_first, args=(stream, started, found))
                reader.start()
                found["during_s"] = self._tokens_s(events)
                reader.join()
                self._tokens_s(events)
                rounds.append(found)
            for stream in streams:
                stream.cancel()
        return rounds

    @staticmethod
    def _time_first(stream: Any, started: float, found: dict[str, float]) -> None:
        next(iter(stream))
        found["joined_s"] = time.perf_counter() - started

    @staticmethod
    def _tokens_s(events: Any) -> float:
        """Return the seconds a token over the next WINDOW tokens of a stream."""
        started = time.perf_counter()
        for _ in range(WINDOW):
            next(events)
        return (time.perf_counter() - started) / WINDOW

    def profile(self, count: int) -> None:
        """Print the GPU time of decode steps of `count` sequences by kernel, and how much of a step the GPU is idle."""
        from torch.profiler import ProfilerActivity, profile

        stream = self._runner.stream([list(tokens(6_000_000 + i, 500)) for i in range(count)], self.options(64))
        for _ in range(40 * count):
            next(stream)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(8 * count):
            next(stream)
        step_ms = 1e3 * (time.perf_counter() - started) / 8
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(8 * count):
                next(stream)
            torch.cuda.synchronize()
        stream.close()
        rows = sorted(found.key_averages(), key=lambda row: row.self_device_time_total, reverse=True)
        busy_ms = sum(row.self_device_time_total for row in rows) / 8e3
        print(f"{count} sequences: a step takes {step_ms:.3f} ms, the GPU is busy for {busy_ms:.3f} ms of it")
        for row in rows[:16]:
            print(f"  {row.self_device_time_total / 8e3:8.3f} ms {row.count / 8:7.1f} x {row.key[:90]}")


class NanoEngine:
    """The real nano-vLLM."""

    def __init__(self, options: argparse.Namespace, config: Any, folder: Path) -> None:
        if options.cpu:
            sys.path.insert(0, str(ROOT / "tests" / "engines"))
            stand_ins = importlib.import_module("nano_vllm_cpu")
            stand_ins.install()
            stand_ins.Memory.num_bytes = 256 << 20
        import nanovllm

        save_model(config, folder, with_weights=options.cpu)
        length = max(options.hot, options.shared) + 1024
        room = {"max_model_len": length, "max_num_batched_tokens": max(length, options.step_tokens)}
        self._llm = nanovllm.LLM(str(folder), **room, max_num_seqs=256, enforce_eager=options.cpu)
        with torch.no_grad():
            for parameter in self._llm.model_runner.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02)
                else:
                    parameter.fill_(1)
        self._temperature = options.temperature

    def sampling(self, num_new: int) -> Any:
        """Return the options of a request: no stop ids, sampled."""
        import nanovllm

        return nanovllm.SamplingParams(self._temperature, num_new, ignore_eos=True)

    def generate(self, prompts: Sequence[list[int]], num_new: int) -> float:
        started = time.perf_counter()
        self._llm.generate(list(prompts), self.sampling(num_new), use_tqdm=False)
        return time.perf_counter() - started

    def ask(self, prompt: list[int], num_new: int) -> list[float]:
        started = time.perf_counter()
        self._llm.add_request(prompt, self.sampling(num_new))
        sequence = self._llm.scheduler.waiting[-1]
        times: list[float] = []
        while not sequence.is_finished:  # a step ends with a wait for the GPU
            self._llm.step()
            if sequence.num_completion_tokens > len(times):
                times.append(time.perf_counter() - started)
        return times

    def join(self, prompts: Sequence[list[int]], late: Sequence[list[int]]) -> list[dict[str, float]]:
        """Send each late request between two steps: the loop is the caller's, so there is no other moment."""
        for prompt in prompts:
            self._llm.add_request(prompt, self.sampling(3 * WINDOW * (len(late) + 1)))
        last = list(self._llm.scheduler.waiting)[-1]
        while last.num_completion_tokens < WINDOW:
            self._llm.step()
        rounds = []
        for prompt in late:
            found = {"before_s": self._tokens_s(last)}
            started = time.perf_counter()
            self._llm.add_request(prompt, self.sampling(WINDOW))
            found["during_s"] = self._tokens_s(last, self._llm.scheduler.waiting[-1], found)
            found["joined_s"] -= started
            self._tokens_s(last)
            rounds.append(found)
        while not self._llm.is_finished():
            self._llm.step()
        return rounds

    def _tokens_s(self, sequence: Any, joining: Any = None, found: dict[str, float] | None = None) -> float:
        """Return the seconds a token over the next WINDOW tokens of a sequence; note when another gets its first."""
        started, end = time.perf_counter(), sequence.num_completion_tokens + WINDOW
        while sequence.num_completion_tokens < end:
            self._llm.step()
            if joining is not None and joining.num_completion_tokens and found is not None:
                found.setdefault("joined_s", time.perf_counter())
        return (time.perf_counter() - started) / WINDOW


def random_model(config: Any, device: str) -> Any:
    """Return a model with random weights."""
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(device):
            return transformers.Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def save_model(config: Any, folder: Path, *, with_weights: bool) -> None:
    """Save a configuration and a tokenizer for nano-vLLM, which loads weights only if there are some."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    if with_weights:
        random_model(config, "cpu").save_pretrained(folder)
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2000)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(folder)
