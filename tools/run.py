"""`tierkv run`: answer a prompt with whatever K and V are cached."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tierkv.engine.prompts import PromptRequest, check_unicode, read_prompts, render_tokens
from tierkv.engine.runner import Generation, GenerationOptions, Runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.errors import ConfigError
from tierkv.tools.engine_options import EngineOptions
from tierkv.tools.engines import open_engine
from tierkv.tools.options import AsJson, as_path, spread
from tierkv.tools.terminal import open_console, print_json, visible
from tierkv.values.block import Tier

__all__ = ["RunRequest", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to answer, and how."""

    prompt: Annotated[str, typer.Argument(help="The user's text.")]
    system: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="FILE", help="File with the system prompt, as for warm.")
    ] = None
    nth: Annotated[int, typer.Option(help="Which prompt of a --system file that has several.")] = 1
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass, 0 to 1.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Find nothing and keep nothing.")] = False
    compare: Annotated[bool, typer.Option("--compare", help="Also compute from scratch, and compare.")] = False


@spread()
def run(request: RunRequest, options: EngineOptions, as_json: AsJson = False) -> None:
    """Answer a prompt, reusing whatever K and V are cached."""
    config = options.config()
    asked, text = _prompt_request(request), _text_of(request.prompt)
    sampling = SamplingOptions(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
    with open_engine(options, config) as runner:
        tokens = render_tokens(runner.loaded.tokenizer, asked, text, day=options.day)
        chosen = GenerationOptions(
            max_new_tokens=request.max_new_tokens,
            sampling=sampling,
            use_cache=not request.no_cache,
            store_partial=True,
            keep_logits=request.compare,
        )
        result = _answer(runner, tokens, chosen)
        summary = _summary(runner, result)
        if request.compare:
            summary |= _compare(runner, tokens, chosen, result)
    if as_json:
        print_json(summary)
        return
    print(visible(summary["text"]) if sys.stdout.isatty() else summary["text"])
    open_console(stderr=True).print(_table(summary))


def _prompt_request(request: RunRequest) -> PromptRequest:
    if not request.prompt:
        raise ConfigError("the prompt is empty")
    if request.system is None:
        return PromptRequest()
    prompts = read_prompts(request.system)
    if not 1 <= request.nth <= len(prompts):
        raise ConfigError(f"{request.system} holds {len(prompts)} prompts, there is no number {request.nth}")
    return prompts[request.nth - 1]


def _text_of(argument: str) -> str:
    """Return the text of an argument; where the locale is not UTF-8, its bytes may be. Raises ConfigError."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as exc:
        check_unicode(argument, "the prompt")
        raise ConfigError(f"the prompt is not UTF-8 text: {exc}") from exc


def _answer(runner: Runner, tokens: list[int], options: GenerationOptions) -> Generation:
    return runner.generate([tokens], options)[0]


def _summary(runner: Runner, result: Generation) -> dict[str, Any]:
    return {
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
    table = Table(show_header=False)
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
