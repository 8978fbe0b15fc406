"""`tierkv inspect`: what a store holds, by namespace and by prompt prefix, and in what its namespaces differ."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from tierkv.engine.embedded_files import find_embedded_model
from tierkv.engine.token_texts import load_tokenizer
from tierkv.errors import ConfigError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_reader import StoredNamespace
from tierkv.storage.cold_rows import ColdEntry
from tierkv.tools.options import AsJson, cache_directory, spread
from tierkv.tools.stores import StoreOptions, find_namespace, iter_chains, open_existing
from tierkv.tools.tenants import TenantNames
from tierkv.tools.terminal import cut_text, format_age, open_console, print_json, visible
from tierkv.values.block import BlockHash
from tierkv.values.namespace import differing_fields
from tierkv.values.units import format_bytes

__all__ = ["inspect"]

_PREVIEW_TOKENS = 48
_LEAST_TEXT = 8


@dataclass(frozen=True, slots=True)
class _Prefix:
    """One stored chain from the root to a leaf."""

    namespace: str
    tokens: int
    blocks: int
    shared_blocks: int
    stored_bytes: int
    last_access: float
    pinned: bool
    token_ids: list[int]
    own_ids: list[int]


@spread()
def inspect(
    where: StoreOptions,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace: leading hex digits, or its name.")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant: its name, leading digits of its id, or its salt.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Show texts with this model's tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is stored: namespaces and how they differ, prompt prefixes, sizes, ages."""
    path, now = where.path, time.time()
    with open_existing(path) as store:
        found = [find_namespace(store, namespace)] if namespace else store.namespaces()
        names = TenantNames.of(store)
        if tenant is not None:
            wanted = names.find(tenant)
            found = [n for n in found if n.tenant == wanted]
        found.sort(key=lambda n: n.last_used, reverse=True)
        prefixes = [prefix for n in found for prefix in _iter_prefixes(store, n)]
    if as_json:
        texts = _texts(prefixes, found, model, path, own=False)
        result = {
            "store": str(path),
            "namespaces": [_describe(n, found[0], names) for n in found],
            "prefixes": [_as_dict(p, text, now) for p, text in zip(prefixes, texts, strict=True)],
        }
        print_json(result)
        return
    console = open_console()
    texts = _texts(prefixes, found, model, path, own=True)
    console.print(_namespace_table(found, names, now))
    console.print(_prefix_table(prefixes, texts, now))
    for n in found:
        if n.problem:
            console.print(f"{n.digest.hex()[:8]}: {visible(n.problem)}")
    readable = [n for n in found if n.description]
    for n in readable[1:]:
        fields = visible(", ".join(differing_fields(n.description, readable[0].description)))
        base = readable[0].digest.hex()[:8]
        console.print(f"{n.digest.hex()[:8]} shares no block with {base}: it differs in {fields}")


def _iter_prefixes(store: ColdStore, namespace: StoredNamespace) -> Iterator[_Prefix]:
    """Yield the chain of every leaf. Blocks up to the last one with several children are counted as shared."""
    entries = dict(store.iter_entries(namespace.digest))
    num_children = Counter(entry.parent for entry in entries.values())
    for chain in iter_chains(entries):
        yield _prefix(store, namespace, chain, entries, num_children)


def _prefix(
    store: ColdStore,
    namespace: StoredNamespace,
    chain: list[BlockHash],
    entries: dict[BlockHash, ColdEntry],
    num_children: Counter[BlockHash],
) -> _Prefix:
    own = [entries[block_hash] for block_hash in chain]
    branches = [i for i, block_hash in enumerate(chain) if num_children[block_hash] > 1]
    shared_blocks = branches[-1] + 1 if branches else 0
    return _Prefix(
        namespace=namespace.digest.hex(),
        tokens=sum(entry.num_tokens for entry in own),
        blocks=len(chain),
        shared_blocks=shared_blocks,
        stored_bytes=sum(entry.stored_bytes for entry in own),
        last_access=max(entry.last_access for entry in own),
        pinned=own[-1].pinned,
        token_ids=_first_tokens(store, chain[0]),
        own_ids=_first_tokens(store, chain[min(shared_blocks, len(chain) - 1)]),
    )


def _first_tokens(store: ColdStore, block_hash: BlockHash) -> list[int]:
    """Return the first tokens of a block, for a preview."""
    token_ids: list[int] = np.frombuffer(store.read_tokens(block_hash) or b"", dtype="<u4")[:_PREVIEW_TOKENS].tolist()
    return token_ids


def _texts(
    prefixes: list[_Prefix], found: list[StoredNamespace], model: str | None, store: Path, *, own: bool
) -> list[str]:
    """Return the beginning of each prefix, or of its unshared part; as text where its tokenizer is known."""
    names = {n.digest.hex(): str(n.description.get("name", "")) for n in found}
    tokenizers: dict[str, Any] = {}
    texts: list[str] = []
    for prefix in prefixes:
        name = model or names[prefix.namespace]
        if name not in tokenizers:
            tokenizers[name] = load_tokenizer(name, cache_dir=_embedded_directory(store))
        tokenizer = tokenizers[name]
        ids = prefix.own_ids if own else prefix.token_ids
        texts.append(_decoded(tokenizer, ids) if tokenizer else _numbers(ids))
    return texts


def _embedded_directory(store: Path) -> Path:
    """Return where the embedded model lies, if there is one: in the user's cache directory, or in the store."""
    with suppress(ConfigError):  # no home directory
        if find_embedded_model(cache := cache_directory(os.environ)):
            return cache
    return store


def _decoded(tokenizer: Any, token_ids: list[int]) -> str:
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))
    except Exception:  # noqa: BLE001 - ids that this tokenizer does not have: each kind has an error of its own
        return _numbers(token_ids)


def _numbers(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def _describe(namespace: StoredNamespace, base: StoredNamespace, names: TenantNames) -> dict[str, Any]:
    return {
        "digest": namespace.digest.hex(),
        **namespace.description,
        "problem": namespace.problem,
        "tenant": names.name_of(namespace.tenant),
        "blocks": namespace.blocks,
        "bytes_raw": namespace.raw_bytes,
        "bytes_stored": namespace.stored_bytes,
        "created": namespace.created,
        "last_used": namespace.last_used,
        "differs_in": differing_fields(namespace.description, base.description),
    }


def _as_dict(prefix: _Prefix, text: str, now: float) -> dict[str, Any]:
    return {
        "namespace": prefix.namespace,
        "tier": "cold",
        "tokens": prefix.tokens,
        "blocks": prefix.blocks,
        "shared_blocks": prefix.shared_blocks,
        "bytes_stored": prefix.stored_bytes,
        "age_s": round(now - prefix.last_access, 3),
        "pinned": prefix.pinned,
        "text": text,
    }


def _namespace_table(found: list[StoredNamespace], names: TenantNames, now: float) -> Table:
    table = Table(title="namespaces", box=box.SIMPLE_HEAD, padding=0)
    has_tenants = any(n.tenant for n in found)
    for column in ("namespace", "model", *["tenant"] * has_tenants, "dtype", "size", "blocks", "stored", "used"):
        table.add_column(column, no_wrap=column not in ("model", "tenant"))
    for n in found:
        table.add_row(
            n.digest.hex()[:8],
            "unreadable" if n.problem else cut_text(_model_name(n.description)),
            *[cut_text(names.name_of(n.tenant))] * has_tenants,
            visible(str(n.description.get("dtype", ""))),
            visible(str(n.description.get("block_size", ""))),
            str(n.blocks),
            format_bytes(n.stored_bytes),
            format_age(now - n.last_used),
        )
    return table


def _model_name(description: dict[str, Any]) -> str:
    """Return a namespace's name, with the slice of a model that is split over several ranks."""
    name, size = str(description.get("name", "")), description.get("tp_size", 1)
    return name if size == 1 else f"{name}, rank {description.get('tp_rank')} of {size}"


def _prefix_table(prefixes: list[_Prefix], texts: list[str], now: float) -> Table:
    table = Table(title="prompt prefixes", box=box.SIMPLE_HEAD, padding=0)
    for column in ("namespace", "tokens", "blocks", "shared", "stored", "age"):
        table.add_column(column, no_wrap=True)
    table.add_column("own text", min_width=_LEAST_TEXT)
    for prefix, text in zip(prefixes, texts, strict=True):
        table.add_row(
            prefix.namespace[:8],
            str(prefix.tokens),
            str(prefix.blocks),
            str(prefix.shared_blocks or ""),
            format_bytes(prefix.stored_bytes),
            format_age(now - prefix.last_access),
            cut_text(("pinned: " if prefix.pinned else "") + text),
        )
    return table
