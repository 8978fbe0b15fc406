"""The daemon's content digests: those of the token ids of each block's chain, and no more digests than they need."""

from __future__ import annotations

import random
from functools import reduce

import pytest
from core_model import SLOT_BYTES, Client, as_bytes

from tierkv.daemon import values
from tierkv.daemon.core import Core, Tenant
from tierkv.daemon.values import BlockIdentifier
from tierkv.index.index import Entry
from tierkv.values.block import chain_content_digest, hash_block

NAMESPACE = b"n" * 16


def a_tree() -> tuple[Tenant, list[Entry]]:
    """Return a namespace with three prompts that part ways, and its entries, parents first."""
    core = Core(64 * SLOT_BYTES, clock=lambda: 0.0)
    client = Client(core, {}, NAMESPACE, hash_block)
    for prompt in ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9], [8, 8, 8, 8]):
        client.reserve(as_bytes(prompt), list(range(8)))
        client.publish(len(client.reserved))
    tenant = core.tenants.by_digest[NAMESPACE]
    return tenant, core.warm_entries(tenant)


def chain_of(entry: Entry) -> list[bytes]:
    return [*chain_of(entry.parent), entry.token_bytes] if entry.depth else []


@pytest.mark.parametrize("seed", range(5))
def test_a_seal_is_that_of_the_chain_whatever_was_sealed_before(seed: int) -> None:
    tenant, entries = a_tree()
    assert len(entries) > 4
    random.Random(seed).shuffle(entries)
    one = BlockIdentifier()
    for entry in entries:
        info = one.identify(tenant, entry)
        assert info.content_digest == reduce(chain_content_digest, chain_of(entry), NAMESPACE)
        parent = entry.parent_hash if entry.parent.depth else NAMESPACE
        assert (info.block_hash, info.parent, info.namespace) == (entry.block_hash, parent, NAMESPACE)


def test_a_chain_that_is_sealed_in_order_costs_one_digest_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tenant, entries = a_tree()
    deepest = max(entries, key=lambda each: each.depth)
    chain = [deepest]
    while chain[-1].parent.depth:
        chain.append(chain[-1].parent)
    digests: list[bytes] = []

    def counted(parent: bytes, token_bytes: bytes) -> bytes:
        digests.append(token_bytes)
        return chain_content_digest(parent, token_bytes)

    monkeypatch.setattr(values, "chain_content_digest", counted)
    one = BlockIdentifier()
    for entry in reversed(chain):
        one.identify(tenant, entry)
    assert len(chain) > 1 and len(digests) == len(chain)
