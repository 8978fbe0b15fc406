"""`tierkv remote`: whether a remote tier can be used, how fast it is, and which models it has blocks of."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from tierkv.errors import ConfigError, RemoteError
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteKey
from tierkv.remote_tiers.remotes import open_client
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.tools.options import AsJson, parse_size
from tierkv.tools.terminal import close_table, open_console, print_json, visible
from tierkv.values.namespace import parse_description

__all__ = ["group"]

_NAMESPACE = hashlib.sha256(b"tierkv remote check").digest()[:16]
_NUM_VALUES = 4
_NUM_KEYS = 128
_NUM_QUESTIONS = 30
_CALL = CallTime(base_s=5.0, bytes_per_s=1e6)
_TOKEN_BYTES = int(0.7 * 128 * 1024)  # of Llama-3.1-8B's shape in bfloat16, as they are stored
_PROMPT_TOKENS = 8192


def check(
    url: Annotated[str, typer.Argument(metavar="URL", help="The remote tier, as --remote names it.")],
    size: Annotated[str, typer.Option("--size", help="Bytes of each of the four values that are written.")] = "8M",
    as_json: AsJson = False,
) -> None:
    """Write four values to a remote tier, read them, and print times and speeds. The values stay: a next check replaces
    them.
    """
    parsed = RemoteUrl.parse(url)
    num_bytes = parse_size(size)
    client = open_client(parsed)
    try:
        found = _measure(client, num_bytes)
    finally:
        client.close()
    least_rate = found["get_mb_per_s"] * 1e6 / _TOKEN_BYTES
    prompt_s = _PROMPT_TOKENS / least_rate
    if as_json:
        print_json({"url": str(parsed), **found, "break_even_tokens_per_s": least_rate, "prompt_s": prompt_s})
        return
    table = Table(title=str(parsed), show_header=False)
    for name, unit in (("connect_ms", "ms"), ("answer_ms_p50", "ms"), ("answer_ms_max", "ms"), ("exists_128_ms", "ms")):
        table.add_row(name.removesuffix("_ms").replace("_", " "), f"{found[name]:.2f} {unit}")
    for name in ("put_mb_per_s", "get_mb_per_s"):
        table.add_row(name[:3], f"{found[name]:,.0f} MB/s")
    console = open_console()
    console.print(table)
    console.print(
        f"A prompt of {_PROMPT_TOKENS:,} tokens of a model of Llama-3.1-8B's shape loads in {prompt_s:.2f} s. "
        f"That is faster than computing on a machine that computes less than {least_rate:,.0f} tokens a second."
    )
    if found["answer_ms_p50"] > 1e3 * parsed.call_time().base_s / 2:
        console.print("Answers take more than half of base_s: raise it in the URL, as ?base_s=1")


def inspect(
    url: Annotated[str, typer.Argument(metavar="URL", help="The remote tier, as --remote names it.")],
    as_json: AsJson = False,
) -> None:
    """List the models that a directory or an object store has blocks of. Redis does not keep their names."""
    parsed = RemoteUrl.parse(url)
    with contextlib.closing(open_client(parsed)) as client:
        client.ping(Deadline(_CALL))
        texts = client.descriptions(Deadline(_CALL))
    found, num_unreadable = [], 0
    for text in texts:
        try:
            found.append(parse_description(text))
        except ConfigError:
            num_unreadable += 1
    if as_json:
        namespaces = [{"namespace": each.digest.hex(), **each.fields} for each in found]
        print_json({"url": str(parsed), "namespaces": namespaces, "unreadable": num_unreadable})
        return
    table = close_table("namespace", "model", "dtype", "size", title=str(parsed), folded=("model",))
    for each in found:
        dtype, size = visible(str(each.fields["dtype"])), str(each.layout.block_size)
        table.add_row(each.digest.hex()[:8], visible(each.name), dtype, size)
    console = open_console()
    console.print(table)
    if num_unreadable:
        console.print(f"{num_unreadable} descriptions cannot be read")


def _measure(client: RemoteClient, num_bytes: int) -> dict[str, float]:
    """Return milliseconds and MB/s. Raises RemoteError where a call fails, or where other bytes come back."""
    connect_s = _timed(lambda: client.ping(Deadline(_CALL)))
    answers = [_timed(lambda: client.ping(Deadline(_CALL))) for _ in range(_NUM_QUESTIONS)]
    keys = [RemoteKey(_NAMESPACE, hashlib.sha256(bytes([number])).digest()[:16]) for number in range(_NUM_VALUES)]
    values = [np.random.default_rng(number).integers(0, 256, num_bytes, dtype=np.uint8) for number in range(len(keys))]
    put_s = 0.0
    for key, value in zip(keys, values, strict=True):
        put_s += _timed(lambda key=key, value=value: client.write(key, value, _deadline(num_bytes), replace=True))  # type: ignore[misc]
    read: list[Bytes | None] = []
    get_s = 0.0
    for key in keys:
        get_s += _timed(
            lambda key=key: read.append(client.read(key, _deadline(num_bytes), most_bytes=num_bytes))  # type: ignore[misc]
        )
    if not all(got is not None and np.array_equal(got, value) for got, value in zip(read, values, strict=True)):
        raise RemoteError(
            "the values that were written do not come back",
            hint="is it full, or does it evict at once? See maxmemory and its policy",
        )
    many = [*keys, *(RemoteKey(_NAMESPACE, bytes([number]) * 16) for number in range(_NUM_KEYS - len(keys)))]
    exists_s = statistics.median(_timed(lambda: client.prefix(many, Deadline(_CALL))) for _ in range(5))
    moved_mb = num_bytes * len(keys) / 1e6
    return {
        "connect_ms": 1e3 * connect_s,
        "answer_ms_p50": 1e3 * statistics.median(answers),
        "answer_ms_max": 1e3 * max(answers),
        "exists_128_ms": 1e3 * exists_s,
        "put_mb_per_s": moved_mb / put_s,
        "get_mb_per_s": moved_mb / get_s,
    }


def _deadline(num_bytes: int) -> Deadline:
    return Deadline(_CALL, num_bytes=num_bytes)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


group: typer.Typer = typer.Typer(help="Blocks shared between machines.", add_completion=False)


@group.callback(invoke_without_command=True)
def _print_help(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


group.command()(check)
group.command()(inspect)
