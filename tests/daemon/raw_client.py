"""The protocol without a cache: for tests that need to do what no cache would."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
from pattern_layout import tiny_layout

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Chain, Hello, Publish, Published, Reserve, Reserved
from tierkv.daemon.protocol import split_numbers
from tierkv.storage.warm import Slab
from tierkv.values.block import iter_chain
from tierkv.values.namespace import Namespace

LAYOUT = tiny_layout()
NAMESPACE = Namespace(weights="raw", layout=LAYOUT, name="raw")


def hello(namespace: Namespace = NAMESPACE) -> Hello:
    return Hello(
        namespace=namespace.digest,
        description=namespace.describe(),
        block_bytes=namespace.layout.block_bytes,
        client="raw",
    )


def connect(socket: Path, namespace: Namespace = NAMESPACE) -> DaemonClient:
    return DaemonClient(socket, hello(namespace))


def tokens_of(count: int, start: int = 0) -> bytes:
    return np.arange(start, start + count, dtype="<u4").tobytes()


def chain_of(tokens: bytes) -> bytes:
    return b"".join(h for h, _ in iter_chain(NAMESPACE.digest, tokens, LAYOUT.block_size))


def write_prompt(client: DaemonClient, tokens: bytes, fill: int = 0) -> int:
    """Write the whole blocks of a prompt, each byte of each slot the same; return how many were published."""
    count = len(tokens) // 4 // LAYOUT.block_size
    chain = Chain(chain_of(tokens), tokens[: count * LAYOUT.block_size * 4], array("I", range(count)).tobytes())
    given = client.call(Reserve(chains=[chain]), Reserved).chains[0]
    if fill:
        slab = Slab.attach(client.take_descriptor(), client.welcome.slab_bytes)
        for slot in split_numbers(given.slots):
            slab.slots(LAYOUT.block_bytes)[slot] = fill
        slab.close()
    return client.call(Publish(slots=given.slots), Published).count if given.slots else 0
