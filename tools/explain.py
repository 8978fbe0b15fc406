"""`tierkv explain`: how far a prompt is stored, and why no further."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from tierkv.daemon.client import DaemonClient
from tierkv.engine.embedded_files import EMBEDDED
from tierkv.storage.codecs import CODECS
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_reader import StoredNamespace
from tierkv.tools.engine_options import ModelOptions
from tierkv.tools.model_place import embedded_directory
from tierkv.tools.namespace_words import how_it_differs
from tierkv.tools.options import AsJson, CodecName, spread
from tierkv.tools.prompt_choice import PromptChoice, tokens_of
from tierkv.tools.stored_match import StoredMatch, match_in_daemon, match_in_store
from tierkv.tools.stores import StoreOptions, open_existing
from tierkv.tools.terminal import fact_table, open_console, print_json, visible
from tierkv.values.block import TOKEN_BYTES, Tier, as_token_array
from tierkv.values.namespace import has_rows

__all__ = ["explain"]

_SHOWN_TOKENS = 48
_SHOWN_CHARACTERS = 64
_MOST_NAMED = 5  # other namespaces in the table; JSON has all

_ABSENT = "nothing is stored for this model with these options"
_COMPLETE = "found whole: the last token of a prompt is always computed"
_PARTS = "another text is stored from there on"
_ENDS = "nothing is stored behind it"


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of the model. fields: of its namespace's description, as far as they are known.

    digest, description: of its namespace, if its weights were read.
    """

    tokenizer: Any
    name: str
    fields: dict[str, Any]
    digest: bytes | None = None
    description: bytes = b""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where to look: a store, a daemon, or both."""

    store: ColdStore | None
    path: Path | None
    daemon: Path | None
    namespaces: list[StoredNamespace]


@spread()
def explain(
    choice: PromptChoice,
    model: ModelOptions,
    where: StoreOptions,
    codec: CodecName = "auto",
    read_weights: Annotated[
        bool, typer.Option("--read-weights", help="Load the model, and compare its weights as well.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far prompts are stored, the texts where they part, or which field of the namespace differs.

    The model's weights are not read. Nothing is computed, loaded or noted as used.
    """
    requests = choice.requests()
    with ExitStack() as stack:
        place = _open_place(where, stack)
        known = _model_of(model, codec, place.path, read_weights=read_weights or place.store is None)
        results = []
        for request in requests:
            tokens = tokens_of(known.tokenizer, request, day=model.day)
            results.append(_explain(known, place, tokens))
    if as_json:
        print_json(results[0] if len(results) == 1 else {"prompts": results})
        return
    for result in results:
        open_console().print(_table(result))


def _open_place(where: StoreOptions, stack: ExitStack) -> _Place:
    daemon = where.find_daemon()
    if daemon is not None:
        with DaemonClient(daemon) as client:
            if not client.welcome.has_cold:
                return _Place(None, None, daemon, [])
    path = where.path
    store = stack.enter_context(open_existing(path))
    return _Place(store, path, daemon, store.namespaces())


def _model_of(model: ModelOptions, codec: str, store: Path | None, *, read_weights: bool) -> _Model:
    lossy = {"lossy_codec": codec} if any(each.name == codec and each.is_lossy for each in CODECS) else {}
    if read_weights:
        from tierkv.tools.engines import identify_stored  # loads torch, and the weights

        loaded, namespace = identify_stored(model, lossy.get("lossy_codec", ""), store)
        return _Model(loaded.tokenizer, loaded.name, namespace.identity(), namespace.digest, namespace.describe())
    from tierkv.engine.model_outline import read_outline  # loads torch

    outline = read_outline(
        model.model,
        cache_dir=embedded_directory(store) if model.model in (None, EMBEDDED) else None,
        device=model.device,
        dtype=model.dtype,
        block_size=model.block_size,
        salt=model.salt,
        mla=model.mla,
    )
    return _Model(outline.tokenizer, outline.name, outline.fields | lossy)


def _explain(known: _Model, place: _Place, tokens: list[int]) -> dict[str, Any]:
    """Return what `--json` prints of one prompt."""
    token_bytes = as_token_array(tokens).tobytes()[:-TOKEN_BYTES]
    own = _own_namespaces(known, place)
    matches = {
        each.digest: match_in_store(
            place.store, each.digest, token_bytes, block_size=int(each.description["block_size"])
        )
        for each in place.namespaces
        if place.store and each.description and not has_rows(each.description["architecture"])
    }
    chosen = own[0] if own else None
    matched = matches.get(chosen.digest) if chosen else None
    description = chosen.raw_description if chosen else known.description
    if place.daemon and description:
        matched = match_in_daemon(place.daemon, description, token_bytes, matched)
    digest = chosen.digest if chosen else known.digest
    num_tokens = matched.num_tokens if matched else 0
    is_there = bool(chosen or num_tokens)
    elsewhere = [
        (each, matches[each.digest].num_tokens)
        for each in place.namespaces
        if each.digest in matches and each.digest != digest and matches[each.digest].num_tokens > num_tokens
    ]
    elsewhere.sort(key=lambda item: -item[1])
    result: dict[str, Any] = {
        "prompt_tokens": len(tokens),
        "found_tokens": num_tokens,
        "cached_tokens": {tier.value: matched.by_tier[tier] if matched else 0 for tier in (Tier.WARM, Tier.COLD)},
        "model": known.name,
        "namespace": digest.hex() if digest and is_there else None,
        "weights_compared": known.digest is not None,
        "fitting_namespaces": len(own),
        "reason": _reason(matched if is_there else None, num_tokens, len(tokens) - 1),
        "elsewhere": [
            {
                "namespace": each.digest.hex(),
                "name": str(each.description.get("name", "")),
                "found_tokens": count,
                "how": how_it_differs(known.fields, each.description),
            }
            for each, count in elsewhere
        ],
    }
    if matched and is_there and num_tokens < len(tokens) - 1:
        result |= _texts(known.tokenizer, tokens, num_tokens, matched)
    return result


def _own_namespaces(known: _Model, place: _Place) -> list[StoredNamespace]:
    """Return the stored namespaces that may be this model's, the last used first; one if its weights were read."""
    if known.digest is not None:
        return [each for each in place.namespaces if each.digest == known.digest]
    from tierkv.engine.model_outline import without_unread

    fitting = [each for each in place.namespaces if without_unread(each.description) == known.fields]
    return sorted(fitting, key=lambda each: -each.last_used)


def _reason(matched: StoredMatch | None, num_tokens: int, most: int) -> str:
    if matched is None:
        return _ABSENT
    if num_tokens == most:
        return _COMPLETE
    return _PARTS if matched.parting else _ENDS


def _texts(tokenizer: Any, tokens: list[int], at: int, matched: StoredMatch) -> dict[str, Any]:
    """Return the texts before the parting token, from it on, and of what is stored in its place."""
    texts: dict[str, Any] = {
        "before": _text(tokenizer, tokens[max(0, at - _SHOWN_TOKENS) : at])[-_SHOWN_CHARACTERS:],
        "prompt": _text(tokenizer, tokens[at : at + _SHOWN_TOKENS])[:_SHOWN_CHARACTERS],
    }
    if matched.parting:
        stored = np.frombuffer(matched.parting.token_bytes, dtype="<u4")[:_SHOWN_TOKENS].tolist()
        texts["stored"] = _text(tokenizer, stored)[:_SHOWN_CHARACTERS]
        texts["stored_others"] = matched.parting.num_others
    return texts


def _text(tokenizer: Any, token_ids: list[int]) -> str:
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))
    except Exception:  # noqa: BLE001 - stored ids that this tokenizer does not have: each kind has an error of its own
        return " ".join(map(str, token_ids))


def _table(result: dict[str, Any]) -> Table:
    table = fact_table()
    table.add_row("model", visible(result["model"]))
    if result["namespace"]:
        table.add_row("namespace", result["namespace"][:8])
    table.add_row("weights", "compared" if result["weights_compared"] else "not read (--read-weights compares them)")
    table.add_row("prompt tokens", f"{result['prompt_tokens']:,}")
    for tier, count in result["cached_tokens"].items():
        table.add_row(f"stored, {tier}", f"{count:,}")
    table.add_row("to compute", f"{result['prompt_tokens'] - result['found_tokens']:,}")
    table.add_row("why", result["reason"])
    if "before" in result:
        table.add_row("text before", _line(result["before"]))
        table.add_row("this prompt", _line(result["prompt"]))
    if "stored" in result:
        others = f" ({result['stored_others']:,} more texts follow)" if result["stored_others"] else ""
        table.add_row("stored", _line(result["stored"]) + others)
    if result["fitting_namespaces"] > 1:
        count = result["fitting_namespaces"] - 1
        table.add_row("also", f"{count} more namespaces fit but for weights or settings (--read-weights compares them)")
    for each in result["elsewhere"][:_MOST_NAMED]:
        table.add_row("elsewhere", visible(f"{each['how']} has {each['found_tokens']:,} tokens of it"))
    if len(result["elsewhere"]) > _MOST_NAMED:
        table.add_row("elsewhere", f"and {len(result['elsewhere']) - _MOST_NAMED} more namespaces (--json lists them)")
    return table


def _line(text: str) -> str:
    """Return a text in one line, its line feeds and tabulators escaped."""
    return visible(text.replace("\n", "\\n").replace("\t", "\\t")) or "(no text)"
