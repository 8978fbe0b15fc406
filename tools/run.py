"""`tierkv run`: answer prompts with whatever K and V are cached."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from tierkv.engine.embedded_files import EMBEDDED
from tierkv.engine.runner import Generation, GenerationOptions, Runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.engines import open_engine
from tierkv.tools.options import AsJson, spread
from tierkv.tools.prompt_choice import PromptChoice, tokens_of
from tierkv.tools.terminal import fact_table, open_console, print_json, visible
from tierkv.values.block import Tier

__all__ = ["RunRequest", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """How to answer."""

    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most, for each prompt.")] = 64
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass, 0 to 1.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Find nothing and keep nothing.")] = False
    no_partial: Annotated[
        bool, typer.Option("--no-partial", help="Keep whole blocks only, not the tokens at the end of a conversation.")
    ] = False
    compare: Annotated[bool, typer.Option("--compare", help="Also compute from scratch, and compare.")] = False


@spread()
def run(choice: PromptChoice, request: RunRequest, options: EngineOptions, as_json: AsJson = False) -> None:
    """Answer prompts, reusing whatever K and V are cached.

    Several prompts are computed together; their answers are separated by lines of ---.
    """
    requests = choice.requests()
    config = options.config()
    sampling = SamplingOptions(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
    with open_engine(options, config) as runner:
        prompts = [tokens_of(runner.loaded.tokenizer, each, day=options.day) for each in requests]
        chosen = GenerationOptions(
            max_new_tokens=request.max_new_tokens,
            sampling=sampling,
            use_cache=not request.no_cache,
            store_partial=not request.no_partial,
            keep_logits=request.compare,
        )
        results = runner.generate(prompts, chosen)
        answers = [_summary(runner, result) for result in results]
        if request.compare:
            for prompt, result, answer in zip(prompts, results, answers, strict=True):
                answer |= _compare(runner, prompt, chosen, result)
    if as_json:
        print_json(answers[0] if len(answers) == 1 else {"answers": answers})
        return
    texts = [visible(answer["text"]) if sys.stdout.isatty() else answer["text"] for answer in answers]
    print("\n---\n".join(texts))
    errors = open_console(stderr=True)
    for answer in answers:
        errors.print(_table(answer))
    if runner.loaded.name == EMBEDDED:
        errors.print(
            "This is the embedded model: small, its weights random, its answers nonsense. --model names another."
        )


def _answer(runner: Runner, tokens: list[int], options: GenerationOptions) -> Generation:
    return runner.generate([tokens], options)[0]


def _summary(runner: Runner, result: Generation) -> dict[str, Any]:
    return {
        "model": runner.loaded.name,
        "text": runner.loaded.tokenizer.decode(result.token_ids, skip_special_tokens=True),
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": {tier.value: result.cached_tokens.get(tier, 0) for tier in Tier},
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }


def _compare(runner: Runner, tokens: list[int], options: GenerationOptions, result: Generation) -> dict[str, Any]:
    """Compute everything again in this process, and compare. The first answer may have warmed up the device.

    max_logit_diff: over the steps up to the first token that differs. After it, the inputs differ too.
    """
    plain = GenerationOptions(
        max_new_tokens=options.max_new_tokens, sampling=options.sampling, use_cache=False, keep_logits=True
    )
    again = _answer(runner, tokens, plain)
    pairs = list(zip(result.token_ids, again.token_ids, strict=False))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1) + 1
    assert result.logits is not None and again.logits is not None
    difference = (result.logits[:equal] - again.logits[:equal]).abs().max()
    return {
        "recompute_ttft_s": again.ttft_s,
        "same_tokens": result.token_ids == again.token_ids,
        "max_logit_diff": float(difference),
    }


def _table(summary: dict[str, Any]) -> Table:
    table = fact_table()
    table.add_row("model", visible(summary["model"]) + (", random weights" if summary["model"] == EMBEDDED else ""))
    table.add_row("prompt tokens", f"{summary['prompt_tokens']:,}")
    for tier, count in summary["cached_tokens"].items():
        table.add_row(f"cached, {tier}", f"{count:,}")
    table.add_row("time to first token", f"{summary['ttft_s'] * 1e3:.1f} ms")
    if "recompute_ttft_s" in summary:
        table.add_row("  recomputed", f"{summary['recompute_ttft_s'] * 1e3:.1f} ms")
        table.add_row("same tokens", "yes" if summary["same_tokens"] else "NO")
        table.add_row("largest logit difference", f"{summary['max_logit_diff']:.1e}")
    table.add_row("tokens per second", f"{summary['tokens_per_s']:.1f}")
    return table
