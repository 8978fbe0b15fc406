"""Limits: how much one client, and all clients together, may hold in a daemon, and why that much.

Every table of the daemon that a client can make longer has its line here. At a limit a request is refused, or the
oldest entry is dropped, or an optional thing (a cursor, a claim) is not given: then the client has a miss. What a
client holds is freed when its connection or its process ends. `tierkv daemon status` shows each limit with its use.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tierkv.errors import ConfigError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a daemon. Names that end in `of_client` are those of one connection.

    An engine has one connection for each cache. A connection costs three descriptors.
    """

    connections: int = 1024
    connections_of_process: int = 128
    """A process that leaks connections must not lock the others out."""

    first_message_bytes: int = 128 << 10
    """Before Hello: twice the longest description of a namespace."""
    incomplete_bytes: int = 256 << 20
    """Incomplete messages of all connections: sixteen of the longest."""
    message_s: float = 30.0
    """How long a message may take to arrive; a client fails after ten seconds."""
    unsent_bytes: int = 64 << 20
    """Unread answers of all connections. No further request of a client with unread answers is read."""
    unread_s: float = 30.0
    """How long a client that holds no slot may leave its answers unread."""

    requests: int = 4096
    requests_of_client: int = 64
    """Requests in work. An engine has a few: a Fetch for each prompt that is loaded, a Wait for each that it awaits."""
    slow_requests_of_client: int = 2
    """Flush, save, load, pin, compact, evict on demand: each takes a thread, of which there may be as few as five."""

    namespaces: int = 1024
    """One for each model, revision, slice and salt in use. Those without a client and a block are forgotten first."""
    description_bytes: int = 16 << 20
    """Descriptions of all namespaces: 1024 of 16 KiB, eight times that of a large model."""

    block_sizes: int = 32
    """Each has an index of its own."""
    slots_of_block_size: int = 1 << 20
    slots: int = 1 << 22
    """Each takes about 50 bytes of memory before it is used: 200 MiB in all. A slab of 2 TiB has 1 Mi of 2 MiB."""

    blocks_of_message: int = 1 << 17
    """Blocks of one message: two million tokens in blocks of 16. Their lookup takes about a tenth of a second."""
    chains_of_message: int = 1024
    fetch_blocks: int = 64
    """Blocks of one Fetch, all of which are pinned until the last one has been read."""

    lease_share_of_client: float = 0.5
    """Of the slots of a block size: no client alone can lease them all."""
    flag_share_of_client: float = 0.25
    """Of the slots of a block size, that a client may lease by its flags. A client that sets more is disconnected."""
    leases: int = 1 << 20
    reservation_share_of_client: float = 0.25
    reservation_share: float = 0.75
    """Of the slots of a block size, that are being written: clients can read the rest."""

    cursors_of_client: int = 64
    cursor_bytes_of_client: int = 32 << 20
    """Prompts kept for Fetch: two of the longest that a message holds. The oldest is dropped."""
    cursor_bytes: int = 256 << 20
    """Of all connections. Above that, the client that has most loses its oldest cursor."""

    claimed_blocks_of_client: int = 1 << 14
    """Four million tokens in blocks of 256."""
    claimed_blocks: int = 1 << 18
    claim_s: float = 60.0
    """A claim of which no block is published for so long ends."""

    pinned_share: float = 0.5
    """Of the slab, that all tenants may pin together, unless one alone may pin more."""

    prompts: int = 1024
    prompt_bytes: int = 64 << 20
    """Queued prompts of all namespaces."""
    prompt_bytes_of_namespace: int = 32 << 20

    log_lines_per_minute: int = 60
    """Refusals that are logged; the others are only counted."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"the limit {field.name} must be a positive number, got {value!a}")
