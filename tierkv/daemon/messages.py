"""The messages between the daemon and its clients. Each class has a number of its own.

Token ids, block hashes and slots are raw little-endian bytes: packing lists of integers would take longer than
everything else together. No message carries a block: blocks are in the slab, whose descriptor comes with `Welcome`.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "MOST_COUNT",
    "NO_SLOT",
    "Abandon",
    "Chain",
    "ChainAnswer",
    "Compact",
    "Count",
    "Done",
    "EndClaim",
    "Evict",
    "Failure",
    "Fetch",
    "Fetched",
    "Flush",
    "Found",
    "FoundPartial",
    "Hello",
    "LimitStatus",
    "LoadState",
    "Match",
    "Message",
    "Pin",
    "Prefetch",
    "Publish",
    "Published",
    "Release",
    "Reserve",
    "Reserved",
    "SaveState",
    "Saved",
    "ShareStatus",
    "Status",
    "StatusReport",
    "Stop",
    "TenantStatus",
    "Used",
    "Wait",
    "Waited",
    "Welcome",
]

NO_SLOT = 0xFFFF_FFFF
"""In a list of slots: this block is in the cold tier, or was not leased."""

MOST_COUNT = 1 << 62
"""Every size, number and count of a message is smaller."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """One message. The number of its class comes before its fields."""


class Hello(Message, tag=1):
    """The first message. namespace: 16 bytes, or empty for a client that reads and writes no blocks.

    description: what `Namespace.describe` returns. The daemon computes the digest and the block size from it, and
    refuses a client that names others. client: a name for people to read.
    """

    namespace: bytes = b""
    description: bytes = b""
    block_bytes: int = 0
    client: str = ""


class Welcome(Message, tag=2):
    """Answer to Hello. The slab's descriptor comes with it if Hello named a namespace.

    is_member: the client belongs to another user than the daemon: it may read blocks, and write none.
    flag_slots: how many slots the generations and the lease flags have, whose descriptors come then too; 0: there are
    none (see `lease_flags`). most_flags: how many flags this client may set at once.
    """

    pid: int
    slab_bytes: int
    store: str
    has_cold: bool
    is_member: bool = False
    flag_slots: int = 0
    most_flags: int = 0


class Match(Message, tag=3):
    """Ask which blocks of a prompt are there, from block `start` on; those before need not be.

    hashes: of all whole blocks, 16 bytes each. tokens: the whole prompt, as little-endian uint32. In a namespace of
    rows these are rows, all different, and their digests; so they are in every message that names a prompt.
    lease: pin what is found in the warm tier for this connection.
    wants_claim: claim whole blocks that are missing: this client will compute them.
    is_use: note that the blocks were used, as a lease does when it ends.
    """

    hashes: bytes
    tokens: bytes
    start: int = 0
    min_partial_tokens: int = 1
    lease: bool = False
    wants_claim: bool = False
    is_use: bool = False


class FoundPartial(msgspec.Struct, array_like=True, gc=False):
    """The block where a prompt diverges: its first `num_tokens` tokens lead the prompt's rest. slot: or NO_SLOT."""

    block_hash: bytes
    tokens: bytes
    num_tokens: int
    slot: int


class Found(Message, tag=4):
    """Answer to Match. slots: u32 each, of the blocks from `start` on that are there, in order. NO_SLOT: use Fetch.

    cursor: names this prompt in Fetch; 0 if no block needs it. claim: its number, or 0.
    is_computing: another client computes the next block. miss: why the next block was not found, as a value of
    MissReason, or "". generations: u64 each, of the slots, if they were leased and the client has lease flags.
    """

    slots: bytes
    partial_block: FoundPartial | None
    cursor: int
    claim: int
    is_computing: bool
    miss: str
    generations: bytes = b""


class Fetch(Message, tag=5):
    """Load `count` blocks of a cursor, from block `first` on, into the warm tier and lease them.

    The partial block, if it was found, is the block after the last whole one.
    """

    cursor: int
    first: int
    count: int


class Fetched(Message, tag=6):
    """Answer to Fetch: slots (u32) of the leading blocks that were loaded, and why the next one was not."""

    slots: bytes
    miss: str


class Release(Message, tag=7):
    """End leases on slots (u32 each, once for each lease) and cursors (u32 each).

    Like Abandon, EndClaim and EvictionDone it is answered, with Done, only if its request number is not 0.
    """

    slots: bytes = b""
    cursors: bytes = b""


class Chain(msgspec.Struct, array_like=True, gc=False):
    """A prompt from its first block on. hashes: of every block in `tokens`, a partly filled last one included.

    proposed: numbers (u32) of the blocks whose bytes the client has.
    """

    hashes: bytes
    tokens: bytes
    proposed: bytes


class Used(Message, tag=66):
    """Say which slots (u32) this client has leased by its flags and used, lately. It has no answer."""

    slots: bytes


class Reserve(Message, tag=8):
    """Reserve slots for those proposed blocks that the daemon does not have."""

    chains: list[Chain]


class ChainAnswer(msgspec.Struct, array_like=True, gc=False):
    """numbers and slots (u32 each): the blocks to write, and where. num_there: proposed blocks that are there.

    num_busy: proposed blocks that another client is writing. refusal: "", or why the walk ended early.
    """

    numbers: bytes
    slots: bytes
    num_there: int
    num_busy: int
    refusal: str


class Reserved(Message, tag=9):
    """Answer to Reserve, chain by chain."""

    chains: list[ChainAnswer]


class Publish(Message, tag=10):
    """Let every client find the blocks in these reserved slots (u32 each): their bytes are complete. Parents first."""

    slots: bytes


class Published(Message, tag=11):
    """Answer to Publish. lost: slots (u32) whose blocks another client had published before."""

    count: int
    lost: bytes


class Abandon(Message, tag=12):
    """Return reserved slots (u32 each) unwritten."""

    slots: bytes


class Wait(Message, tag=13):
    """Ask for an answer when this block is published, when no client computes it any more, or when the time is over."""

    block_hash: bytes
    timeout_ms: int


class Waited(Message, tag=14):
    """Answer to Wait. is_over: whether the time was over first."""

    is_over: bool


class EndClaim(Message, tag=15):
    """End a claim: its blocks are computed no more."""

    claim: int


class Pin(Message, tag=16):
    """Pin or unpin a prompt's blocks. Answered with Count. ttl_s: how long the pin holds; below 0: for good."""

    hashes: bytes
    tokens: bytes
    pinned: bool
    ttl_s: float = -1.0


class Prefetch(Message, tag=17):
    """Load a prompt's blocks into the warm tier: a request with it will come. Answered at once, with Count."""

    hashes: bytes
    tokens: bytes


class Evict(Message, tag=18):
    """Evict up to `count` blocks of the client's namespace from the warm tier, all of them for -1."""

    count: int


class Flush(Message, tag=19):
    """Ask for an answer when everything published so far is on the disk."""


class SaveState(Message, tag=20):
    """Write the namespace's blocks into a state file."""

    path: str


class Saved(Message, tag=21):
    """Answer to SaveState."""

    blocks: int
    file_bytes: int


class LoadState(Message, tag=22):
    """Find the blocks of a state file from now on. Answered with Count."""

    path: str


class Status(Message, tag=23):
    """Answered with StatusReport."""


class TenantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One namespace in the warm tier. owner: the hexadecimal digest of its salt, "" without one."""

    namespace: str
    name: str
    block_bytes: int
    warm_blocks: int
    pinned_bytes: int
    clients: int
    owner: str = ""


class ShareStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant: what it has of the warm and the cold tier, its shares and its limits. owner: as in TenantStatus.

    name: in the store, or the first digits of its id. limit: -1 for none. cold_bytes: 0 without a store.
    """

    owner: str
    name: str
    warm_bytes: int
    warm_share: int
    warm_limit: int
    cold_bytes: int
    cold_share: int
    cold_limit: int


class LimitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one limit is used. largest: what one holder has, whose own limit is limit_of_one, or 0 for none."""

    name: str
    used: int
    limit: int
    largest: int = 0
    limit_of_one: int = 0


class StatusReport(Message, tag=24):
    """Everything that `tierkv daemon status` shows; bytes_received and bytes_sent are those of the socket.

    reasons: of some counters, how often each reason was counted.
    """

    pid: int
    uptime_s: float
    socket: str
    store: str
    warm_bytes: int
    warm_free_bytes: int
    rss_bytes: int
    clients: int
    leased_slots: int
    reserved_slots: int
    claims: int
    pending_writes: int
    bytes_received: int
    bytes_sent: int
    counters: dict[str, int]
    tenants: list[TenantStatus]
    cold: dict[str, int]
    limits: list[LimitStatus] = []
    reasons: dict[str, dict[str, int]] = {}
    version: str = ""
    shares: list[ShareStatus] = []


class Stop(Message, tag=25):
    """End, after writing what is pending. Answered with Done first."""


class Compact(Message, tag=26):
    """Return the store's free space to the disk."""


class Done(Message, tag=27):
    """Answer to a request that has no other answer: it is done."""


class Count(Message, tag=28):
    """Answer with a number of blocks."""

    count: int


class Failure(Message, tag=29):
    """The request was refused. is_fatal: the daemon answers nothing more on this connection."""

    message: str
    is_fatal: bool
