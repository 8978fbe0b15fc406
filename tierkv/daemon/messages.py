"""Messages: what the daemon and its clients say to each other, each a small value with a number of its own.

Token ids, block hashes and slots travel as raw little-endian bytes: packing lists of integers would take longer
than everything else together. Blocks never travel: they lie in the slab, whose descriptor comes with `Welcome`.
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
    "Status",
    "StatusReport",
    "Stop",
    "TenantStatus",
    "Wait",
    "Waited",
    "Welcome",
]

NO_SLOT = 0xFFFF_FFFF
"""In a list of slots: this block is in the cold tier, or was not leased."""

MOST_COUNT = 1 << 62
"""No size, number or count of a message is as large."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """One message; its class is told by a small number in front of its fields."""


class Hello(Message, tag=1):
    """First message. namespace: 16 bytes, or none at all for a client that only wants to know or to steer.

    description: what `Namespace.describe` returns. The daemon computes the digest and the size of a block from it, and
    refuses a client that claims others. client: for humans.
    """

    namespace: bytes = b""
    description: bytes = b""
    block_bytes: int = 0
    client: str = ""


class Welcome(Message, tag=2):
    """Answer to Hello; the slab's descriptor comes with it when a namespace was named."""

    pid: int
    slab_bytes: int
    store: str
    has_cold: bool


class Match(Message, tag=3):
    """How much of a prompt is there? Asked about the blocks from `start` on; those before need not be.

    hashes: of all whole blocks, 16 bytes each. tokens: the prompt as little-endian uint32, the rest behind the
    whole blocks included. lease: pin what is found in the warm tier for this connection.
    wants_claim: if whole blocks are missing, be the one who computes them.
    """

    hashes: bytes
    tokens: bytes
    start: int = 0
    min_partial_tokens: int = 1
    lease: bool = False
    wants_claim: bool = False


class FoundPartial(msgspec.Struct, array_like=True, gc=False):
    """The block where the prompt parts: `num_tokens` of its tokens lead the rest of the prompt. slot: or NO_SLOT."""

    block_hash: bytes
    tokens: bytes
    num_tokens: int
    slot: int


class Found(Message, tag=4):
    """Answer to Match. slots: u32 each, of the blocks from `start` on that are there, in order; NO_SLOT: ask Fetch.

    cursor: names this prompt in Fetch; 0 where nothing needs it. claim: 0, or yours until the blocks are published.
    is_computing: another client is at it. miss: why the block behind is none, by the names of MissReason, or "".
    """

    slots: bytes
    partial_block: FoundPartial | None
    cursor: int
    claim: int
    is_computing: bool
    miss: str


class Fetch(Message, tag=5):
    """Bring blocks `first` to `first + count` of a cursor into the warm tier and lease them.

    The partial block, if it was found, is the block behind the last one.
    """

    cursor: int
    first: int
    count: int


class Fetched(Message, tag=6):
    """Answer to Fetch: slots (u32) of the leading blocks that could be had, and why the next could not."""

    slots: bytes
    miss: str


class Release(Message, tag=7):
    """End leases on slots (u32 each; once for each time leased) and cursors (u32 each).

    Like Abandon, EndClaim and EvictionDone it is answered, with Done, only if its request number is not 0.
    """

    slots: bytes = b""
    cursors: bytes = b""


class Chain(msgspec.Struct, array_like=True, gc=False):
    """A prompt from its first block on. hashes: of every block in `tokens`, a partly filled last one included.

    offers: numbers (u32) of the blocks whose bytes the client can bring.
    """

    hashes: bytes
    tokens: bytes
    offers: bytes


class Reserve(Message, tag=8):
    """Ask for slots to write those offered blocks to that the daemon does not have."""

    chains: list[Chain]


class ChainAnswer(msgspec.Struct, array_like=True, gc=False):
    """numbers and slots (u32 each): blocks to be written, and where to. num_there: offered blocks that are there.

    num_busy: offered blocks that another client is writing. refusal: "", or why the walk ended early.
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
    """The bytes of these reserved slots (u32 each) are complete: let everybody find them. Parents first."""

    slots: bytes


class Published(Message, tag=11):
    """Answer to Publish. lost: numbers of slots (u32) that somebody else was faster with."""

    count: int
    lost: bytes


class Abandon(Message, tag=12):
    """Give reserved slots (u32 each) back unwritten."""

    slots: bytes


class Wait(Message, tag=13):
    """Answer when this block is published, or nobody computes it any more, or the time is over."""

    block_hash: bytes
    timeout_ms: int


class Waited(Message, tag=14):
    """Answer to Wait. is_over: the time, without news."""

    is_over: bool


class EndClaim(Message, tag=15):
    """Compute a claim's blocks no more."""

    claim: int


class Pin(Message, tag=16):
    """Keep a prompt's blocks (or let them go again). Answered with Count."""

    hashes: bytes
    tokens: bytes
    pinned: bool


class Prefetch(Message, tag=17):
    """A request with this prompt will come: bring its blocks into the warm tier. Answered at once, with Count."""

    hashes: bytes
    tokens: bytes


class Evict(Message, tag=18):
    """Evict up to `count` blocks of the client's namespace from the warm tier; all of them for -1."""

    count: int


class Flush(Message, tag=19):
    """Answer when everything published so far is on the disk."""


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
    """One namespace in the warm tier."""

    namespace: str
    name: str
    block_bytes: int
    warm_blocks: int
    pinned_bytes: int
    clients: int


class LimitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How much is held of what the daemon bounds; largest: what one holder has, whose limit is limit_of_one.

    A limit of 0 says that there is none beside the other one.
    """

    name: str
    used: int
    limit: int
    largest: int = 0
    limit_of_one: int = 0


class StatusReport(Message, tag=24):
    """Everything that `tierkv daemon status` shows; bytes_received and bytes_sent are those of the socket."""

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


class Stop(Message, tag=25):
    """Write what is pending and end. Answered with Done before."""


class Compact(Message, tag=26):
    """Give the store's free space back to the disk."""


class Done(Message, tag=27):
    """It is done."""


class Count(Message, tag=28):
    """How many blocks that were."""

    count: int


class Failure(Message, tag=29):
    """The request was refused. is_fatal: nothing more will be answered on this connection."""

    message: str
    is_fatal: bool
