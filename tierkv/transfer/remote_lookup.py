"""Asks remote tiers for the blocks of a prompt that the tiers of this machine lack."""

from __future__ import annotations

from tierkv.transfer.lookup import Lookup
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, iter_chain
from tierkv.values.events import BlockName

__all__ = ["find_everywhere", "look_remotely"]


def look_remotely(tiers: Tiers, found: Lookup, token_bytes: bytes, max_tokens: int) -> bool:
    """Ask the remote tiers for the whole blocks after a lookup's. Return whether they have any: look up again then.

    token_bytes, max_tokens: as in `Tiers.find`. This waits for the network, unless the remote tiers are down. A prompt
    that the local tiers have costs no call.
    """
    if tiers.remote is None:
        return False
    assert not tiers.changed.is_owned(), "other requests would wait for the network too"
    step = tiers.layout.block_size * TOKEN_BYTES
    whole_bytes = max_tokens * TOKEN_BYTES // step * step
    num_found = len(found.hot) + len(found.blocks)
    if not tiers.remote.may_answer(whole_bytes // step - num_found):
        return False
    parent = tiers.index.root
    if found.blocks:
        parent = found.blocks[-1].block_hash
    elif found.hot:
        parent = found.hot[-1].block_hash
    rest = token_bytes[num_found * step : whole_bytes]
    chain: list[BlockName] = []
    for block_hash, tokens in iter_chain(parent, rest, tiers.layout.block_size, tiers.hash_function):
        chain.append(BlockName(block_hash, parent, tokens))
        parent = block_hash
    with tiers.span("look remotely") as detail:
        detail["blocks"] = num_more = tiers.remote.find(chain, first=num_found)
    return num_more > 0


def find_everywhere(tiers: Tiers, token_bytes: bytes, max_tokens: int) -> Lookup:
    """Return what the tiers of this machine and the remote tiers have of a prompt; arguments as in `Tiers.find`.

    Blocks of this machine may be evicted before the caller uses them.
    """
    with tiers.changed:
        found = tiers.find(token_bytes, max_tokens)
    if look_remotely(tiers, found, token_bytes, max_tokens):
        with tiers.changed:
            found = tiers.find(token_bytes, max_tokens)
    return found
