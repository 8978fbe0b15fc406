"""What it costs in quality to reuse a document at another position, behind another prefix.

A document's K and V were computed alone, or behind another prefix. K is rotated to the new position and the first
tokens of each document are computed anew. The answers are compared with those of the same prompt computed whole.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.shifted_prompts import KINDS, Prompt, make_prompts
from benchmarks.shifted_rows import Rows, check_shiftable, compute, most_deviating, reuse, shift_error
from benchmarks.ttft import machine
from tierkv.engine.model_support import relative_error

__all__ = ["RECOMPUTED", "Comparison", "Row", "Way", "compare", "iter_ways", "main", "summarize"]

RECOMPUTED = (0, 16, 64, 128, 256)
"""Tokens at the beginning of each document that are computed anew."""

_BEST = 0.15  # of the documents' tokens
_ANSWER = 32  # tokens
_MOVED = 1000
_KL_AIM, _AGREEMENT_AIM, _SHARE_AIM = 0.01, 0.95, 0.15  # nats; of tokens; of the documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """K and V of prefix and documents, had in one way. share: of the documents' tokens that were computed anew."""

    name: str
    share: float
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One way against the exact computation, for one prompt.

    kl: of each next-token distribution over query and answer, D(exact || way) in nats. agrees: for each token of the
    exact greedy answer, whether this way chooses it behind the ones before; so all are True where both answers are
    equal. is_right: whether the answer begins with the fact; None where there is none, or the exact answer is wrong.
    """

    kind: str
    way: str
    share: float
    logit_error: float
    kl: list[float]
    agrees: list[bool]
    is_right: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Means over all prompts of a kind. kl_p99: of single tokens. equal_answers: prompts with all tokens equal."""

    kind: str
    way: str
    share: float
    logit_error: float
    kl: float
    kl_p99: float
    agreement: float
    equal_answers: float
    right: int | None
    asked: int


def main() -> None:
    """Run the benchmark and print its table; `--json FILE` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a trained model's folder, as Transformers reads it")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--minutes", type=float, help="begin no other prompt after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    described = {**machine(device), "model": type(model).__name__, "dtype": options.dtype}
    described |= {"parameters": f"{sum(each.numel() for each in model.parameters()) / 1e6:.0f} M"}
    described |= {"rotation": f"{check_shiftable(model):.1e}, by 1000 {shift_error(model, shift=_MOVED):.1e}"}
    print("  ".join(f"{name}: {value}" for name, value in described.items()), flush=True)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    found: list[Comparison] = []
    number, started = 0, time.monotonic()
    for number, prompt in enumerate(make_prompts(encode, options.prompts, seed=options.seed), 1):
        found += compare(model, prompt)
        spent = time.monotonic() - started
        print(f"prompt {number}, {prompt.kind}: {spent:.0f} s", file=sys.stderr, flush=True)
        if options.minutes is not None and spent > options.minutes * 60:
            break
    described |= {"prompts": f"{number} of {options.prompts * len(KINDS)}"}
    print(f"prompts: {described['prompts']}")
    rows = summarize(found)
    _print(rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": described, "rows": [asdict(row) for row in rows]}, indent=1))


def iter_ways(model: Any, prompt: Prompt, exact: Rows) -> Iterator[Way]:
    """Yield each way to have the K and V of prefix and documents. exact: what the model computes for both."""
    device = model.device
    prefix = exact.slice(0, len(prompt.prefix))
    rounded = Rows(keys=exact.keys.bfloat16().to(exact.keys.dtype), values=exact.values.bfloat16().to(exact.keys.dtype))
    yield Way(name="exact, as bfloat16", share=1.0, rows=rounded)
    if prompt.kind == "unrelated":  # one kind is enough for what must be equal
        moved = compute(model, _ids(prompt.tokens, device), start=_MOVED)[0].shifted(model, -_MOVED)
        yield Way(name=f"exact, {_MOVED} rotated back", share=1.0, rows=moved)
    yield Way(name="no documents", share=0.0, rows=prefix)
    documents = [_ids(document, device) for document in prompt.documents]
    for source, other in (("alone", []), ("elsewhere", prompt.other)):
        at = len(other)
        before = compute(model, _ids(other, device))[0] if other else None
        cached = [compute(model, document, before)[0] for document in documents]
        if not other:
            yield Way(
                name=f"{source}, K not rotated",
                share=0.0,
                rows=_reuse_all(model, prefix, documents, cached, position=at, recomputed=0, rotate=False),
            )
        for recomputed in RECOMPUTED:
            if recomputed >= len(cached[0]):
                continue
            rows = _reuse_all(model, prefix, documents, cached, position=at, recomputed=recomputed, rotate=True)
            yield Way(name=f"{source}, first {recomputed}", share=recomputed / len(cached[0]), rows=rows)
            if not recomputed:
                best = most_deviating(rows, exact, round(_BEST * sum(map(len, cached))))
                yield Way(name=f"{source}, best {_BEST:.0%} exact", share=_BEST, rows=best)


def compare(model: Any, prompt: Prompt) -> list[Comparison]:
    """Return how each way differs from the exact computation of a prompt, at its query and the exact greedy answer."""
    device = model.device
    exact = compute(model, _ids(prompt.tokens, device))[0]
    answer = _greedy(model, exact, prompt.query, max(_ANSWER, len(prompt.fact)))
    forced = _ids(prompt.query + answer[:-1], device)
    want = compute(model, forced, exact, logits=0)[1][0]
    is_known = bool(prompt.fact) and answer[: len(prompt.fact)] == prompt.fact
    found: list[Comparison] = []
    for way in iter_ways(model, prompt, exact):
        got = compute(model, forced, way.rows, logits=0)[1][0]
        agrees = (got[len(prompt.query) - 1 :].argmax(dim=-1).cpu() == torch.tensor(answer)).tolist()
        found.append(
            Comparison(
                kind=prompt.kind,
                way=way.name,
                share=way.share,
                logit_error=relative_error(got, want),
                kl=_divergence(want, got).tolist(),
                agrees=agrees,
                is_right=all(agrees[: len(prompt.fact)]) if is_known else None,
            )
        )
    return found


def summarize(found: list[Comparison]) -> list[Row]:
    """Return a row for each kind and way, in the order of KINDS and of the ways."""
    rows: list[Row] = []
    for kind in KINDS:
        for way in dict.fromkeys(each.way for each in found if each.kind == kind):
            those = [each for each in found if (each.kind, each.way) == (kind, way)]
            kl = sorted(value for each in those for value in each.kl)
            asked = [each.is_right for each in those if each.is_right is not None]
            rows.append(
                Row(
                    kind=kind,
                    way=way,
                    share=those[0].share,
                    logit_error=statistics.mean(each.logit_error for each in those),
                    kl=statistics.mean(kl),
                    kl_p99=kl[math.ceil(0.99 * len(kl)) - 1],
                    agreement=statistics.mean(float(one) for each in those for one in each.agrees),
                    equal_answers=statistics.mean(float(all(each.agrees)) for each in those),
                    right=sum(asked) if asked else None,
                    asked=len(asked),
                )
            )
    return rows


def _reuse_all(
    model: Any,
    past: Rows,
    documents: list[Tensor],
    cached: list[Rows],
    *,
    position: int,
    recomputed: int,
    rotate: bool,
) -> Rows:
    for ids, rows in zip(documents, cached, strict=True):
        past = reuse(model, past, ids, rows, position=position, recomputed=recomputed, rotate=rotate)
    return past


def _greedy(model: Any, past: Rows, query: list[int], count: int) -> list[int]:
    answer: list[int] = []
    new = query
    while len(answer) < count:
        rows, logits = compute(model, _ids(new, model.device), past)
        past = past.append(rows)
        new = [int(logits[0, -1].argmax())]
        answer += new
    return answer


def _divergence(want: Tensor, got: Tensor) -> Tensor:
    """Return D(want || got) of each row of logits, in nats, [tokens]."""
    exact, other = want.double().log_softmax(dim=-1), got.double().log_softmax(dim=-1)
    return (exact.exp() * (exact - other)).sum(dim=-1).clamp(min=0)


def _ids(tokens: list[int], device: torch.device) -> Tensor:
    return torch.tensor([tokens], device=device)


def _print(rows: list[Row]) -> None:
    for kind in KINDS:
        print(
            f"\n{kind:<28}{'computed':>9}{'logits':>10}{'KL':>11}{'KL p99':>10}{'tokens':>8}{'answers':>9}{'facts':>8}"
        )
        for row in (row for row in rows if row.kind == kind):
            facts = "" if row.right is None else f"{row.right}/{row.asked}"
            print(
                f"{row.way:<28}{row.share:>9.1%}{row.logit_error:>10.2e}{row.kl:>11.2e}{row.kl_p99:>10.2e}"
                f"{row.agreement:>8.1%}{row.equal_answers:>9.0%}{facts:>8}"
            )
    reused = [row for row in rows if row.way.startswith(("alone", "elsewhere")) and row.share <= _SHARE_AIM]
    print(
        f"\nways that compute at most {_SHARE_AIM:.0%} of the documents, with a KL of at most {_KL_AIM} nats and an "
        f"agreement of at least {_AGREEMENT_AIM:.0%}:"
    )
    for name in dict.fromkeys(row.way for row in reused):
        met = [row.kind for row in reused if row.way == name and row.kl <= _KL_AIM and row.agreement >= _AGREEMENT_AIM]
        print(f"  {name}: {', '.join(met) or 'none'}")


if __name__ == "__main__":
    main()
