"""Ways to make a valid input hostile, all drawn from one random generator."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

import xxhash

from tierkv.storage.record import HEADER_BYTES

__all__ = [
    "ODD_NUMBERS",
    "RECORD_FIELDS",
    "forge_record",
    "mutate",
    "odd_json",
    "odd_number",
    "odd_text",
    "seal_record",
]

ODD_NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 127, 128, 255, 256, 4095, 4096, 4097),
    *((1 << bits) + delta for bits in (15, 16, 20, 24, 31, 32, 40, 47, 53, 62, 63, 64) for delta in (-1, 0, 1)),
)

RECORD_FIELDS = {  # offset and struct of each field of a record's header, as in storage/FORMAT.md
    "magic": (0, "4s"),
    "version": (4, "H"),
    "flags": (6, "H"),
    "block_hash": (16, "16s"),
    "parent": (32, "16s"),
    "namespace": (48, "16s"),
    "tokens": (64, "I"),
    "block_size": (68, "I"),
    "codec": (72, "H"),
    "codec_version": (74, "H"),
    "frames": (76, "I"),
    "raw_bytes": (80, "Q"),
    "payload_bytes": (88, "Q"),
    "record_bytes": (96, "Q"),
    "payload_offset": (104, "I"),
    "runs": (108, "I"),
    "content_digest": (112, "16s"),
}


def odd_number(random: Random, bits: int = 64) -> int:
    """Return a number that fits so many bits and that somebody may have forgotten."""
    value = random.choice(ODD_NUMBERS) if random.random() < 0.8 else random.getrandbits(bits)
    return value & ((1 << bits) - 1)


def mutate(random: Random, data: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """Return the bytes with one to four changes: bits, numbers, cuts, splices, repeats."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        size = len(changed)
        at = random.randrange(min(size, 256) if random.random() < 0.5 else size) if size else 0
        kind = random.randrange(9)
        if not size or kind == 0:
            changed[at:at] = random.randbytes(random.choice((1, 4, 64)))
        elif kind == 1:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[at : at + random.choice((1, 2, 4, 16, 4096))]
        elif kind == 5:
            width = random.choice((2, 4, 8))
            at -= at % width
            changed[at : at + width] = odd_number(random, 8 * width).to_bytes(width, "little")
        elif kind == 6:
            source = random.choice(others) if others else data
            begin = random.randrange(len(source)) if source else 0
            piece = source[begin : begin + random.choice((4, 16, 64, 4096))]
            changed[at : at + len(piece)] = piece
        elif kind == 7:
            changed[at : at + 64] = bytes(min(64, size - at))
        else:
            changed += changed[at : at + 4096]
    return bytes(changed)


def seal_record(record: bytearray) -> None:
    """Make the checksum of a record right for what it says now, if it is long enough to have one."""
    if len(record) < HEADER_BYTES:
        return
    size = min(int.from_bytes(record[96:104], "little"), len(record))
    checksum = xxhash.xxh3_64_intdigest(bytes(record[16:size]), seed=int.from_bytes(record[:8], "little"))
    struct.pack_into("<Q", record, 8, checksum)


def forge_record(random: Random, record: bytes, others: tuple[bytes, ...]) -> tuple[bytes, bool]:
    """Return a record whose checksum is right and whose content is not, and whether the payload may be another."""
    forged = bytearray(record)
    is_payload_same = True
    for _ in range(random.choice((1, 1, 2, 3))):
        kind = random.randrange(6)
        name = random.choice(tuple(RECORD_FIELDS))
        offset, form = RECORD_FIELDS[name]
        size = struct.calcsize("<" + form)
        tokens_end = HEADER_BYTES + 4 * int.from_bytes(record[64:68], "little")
        if kind <= 2:
            if form.endswith("s"):
                other = random.choice(others) if others else record
                value = random.choice((random.randbytes(size), other[offset : offset + size], bytes(size)))
            else:
                value = odd_number(random, 8 * size).to_bytes(size, "little")
            forged[offset : offset + size] = value
            is_payload_same &= name not in ("codec", "codec_version", "tokens", "frames", "payload_offset")
        elif kind == 3:  # token ids
            at = random.randrange(HEADER_BYTES, max(tokens_end, HEADER_BYTES + 1))
            forged[at % len(forged)] ^= 1 << random.randrange(8)
        elif kind == 4:  # the sizes of the frames
            at = tokens_end + 4 * random.randrange(8)
            forged[at : at + 4] = odd_number(random, 32).to_bytes(4, "little")
            is_payload_same = False
        else:
            at = random.randrange(len(forged))
            forged[at] ^= 1 << random.randrange(8)
            is_payload_same &= at < tokens_end
    if random.random() < 0.15:
        del forged[random.randrange(len(forged)) :]
        is_payload_same = False
    if random.random() < 0.15:
        forged += random.randbytes(64)
    seal_record(forged)
    return bytes(forged), is_payload_same


_ODD_TEXTS = (
    *("", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "\u2028", "\x85", "\x0c", "\x1b[31m", "\u202e", "é" * 3, "你"),
    *("../" * 40, "/", "~", "x" * 5000, "%s%n", "{}", "[]", "null", "1e999", "-0", "lossy-int8", "float64", "bfloat16"),
)


def odd_text(random: Random) -> str:
    """Return a text that somebody may have forgotten."""
    return random.choice(_ODD_TEXTS)


def odd_json(random: Random, depth: int = 0) -> Any:
    """Return some JSON value."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return random.choice((True, False))
    if kind == 2:
        return odd_number(random) * random.choice((1, -1))
    if kind == 3:
        return random.choice((0.5, -1.5, 1e308, 1e-308, float("inf"), float("nan")))
    if kind in (4, 5):
        return odd_text(random)
    if kind == 6:
        return [odd_json(random, depth + 1) for _ in range(random.randrange(4))]
    return {odd_text(random): odd_json(random, depth + 1) for _ in range(random.randrange(4))}


def change_json(random: Random, text: bytes) -> bytes:
    """Return a JSON object's text with values, keys or structure changed; not always JSON any more."""
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 2))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = random.choice(list(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and random.random() < 0.6:
                place = inner
                continue
            kind = random.randrange(4)
            if kind == 0:
                del place[key]
            elif kind == 1 and isinstance(place, dict):
                place[odd_text(random)] = inner
            else:
                place[key] = odd_json(random)
            break
    kind = random.randrange(12)
    if kind == 0:
        return mutate(random, text)
    if kind == 1:
        return b"[" * random.choice((10, 2000, 60_000))
    if kind == 2:
        return json.dumps(odd_json(random)).encode()
    if kind == 3:
        return text[:-1] + b',"weights":"second"}'
    if kind == 4:
        return json.dumps(value, indent=1, ensure_ascii=False).encode(errors="surrogatepass")
    if kind == 5:
        return json.dumps({**value, "weights": "9" * random.choice((10, 5000, 70_000))}).encode()
    return json.dumps(value).encode()
