"""Hostile files and bytes: records, namespace descriptions, prompt files, state files, stores."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import xxhash
from cold_blocks import LAYOUT, NAMESPACE, OTHER, block_bytes, chain_of, open_store, record_of
from hostile.driver import Area, WrongAnswerError, refused
from hostile.mutations import (
    change_json,
    forge_record,
    mutate,
    odd_json,
    odd_number,
    odd_text,
    seal_record,
)

from tierkv.cache import TierCache, load_cache_state, save_cache_state
from tierkv.config import CacheConfig
from tierkv.engine.prompts import read_prompts
from tierkv.storage.codecs import CODECS
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import NamespaceRow, add_checksum, pack_row
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, decode_record, encode_record, parse_record, read_header
from tierkv.storage.state_file import StateFile
from tierkv.storage.state_format import ALIGN_BYTES, ROW, StateHeader
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import parse_description

__all__ = ["Descriptions", "Prompts", "Records", "States", "Stores", "make_odd_file"]

_IDENTITY = slice(16, 64)
_SEAL = slice(112, 128)


@dataclass(frozen=True, slots=True)
class _Known:
    """A valid record with the block that it holds."""

    info: BlockInfo
    layout: BlockLayout
    data: bytes
    block: np.ndarray


def _is_same_block(out: np.ndarray, known: _Known) -> bool:
    """Tell whether the tokens that a record covers are those of the block."""
    parts = ((run.offset_bytes, run.token_bytes * known.info.num_tokens) for run in known.layout.runs)
    return all(np.array_equal(out[at : at + size], known.block[at : at + size]) for at, size in parts)


def _is_same_identity(data: bytes, info: BlockInfo) -> bool:
    said = data[_IDENTITY] + data[_SEAL] + data[128 : 128 + len(info.token_bytes)]
    num_tokens = int.from_bytes(data[64:68], "little")
    wanted = info.block_hash + info.parent + info.namespace + info.content_digest + info.token_bytes
    return said == wanted and num_tokens == info.num_tokens


def _is_sealed(data: bytes) -> bool:
    """Tell whether a record's checksum is right."""
    copy = bytearray(data)
    seal_record(copy)
    return len(data) >= 128 and copy[8:16] == data[8:16]


def _is_sealed_state(data: bytes) -> bool:
    """Tell whether both checksums of a state file are right."""
    if len(data) < 80 or xxhash.xxh3_64_intdigest(data[:72]) != int.from_bytes(data[72:80], "little"):
        return False
    description_bytes, index_offset = (int.from_bytes(data[at : at + 8], "little") for at in (24, 32))
    checked = data[ALIGN_BYTES:][: min(description_bytes, len(data))] + data[min(index_offset, len(data)) :]
    return xxhash.xxh3_64_intdigest(checked) == int.from_bytes(data[64:72], "little")


class Records(Area):
    """Records with any field changed, most with the checksum made right again: refused, or the block asked for."""

    name = "records"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        wide = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=1, head_dim=4, dtype="float32")
        self._known: list[_Known] = []
        for layout, codecs in ((LAYOUT, ("raw", "zstd", "exponent16", "huffman")), (wide, ("raw", "exponent32"))):
            for codec in (codec for codec in CODECS if codec.name in codecs):
                for num_tokens in (layout.block_size, 3):
                    tokens = np.arange(num_tokens, dtype="<u4").tobytes()
                    info = BlockInfo.first(tokens, namespace=replace(NAMESPACE, layout=layout).digest)
                    block = np.resize(block_bytes(num_tokens), layout.block_bytes)
                    data = encode_record(info, block, layout=layout, codec=codec).data.tobytes()
                    self._known.append(_Known(info, layout, data, block))
        self._others = tuple(known.data for known in self._known)

    def case(self, random: Random) -> bool:
        known = random.choice(self._known)
        is_payload_same = True
        if random.random() < 0.25:
            data = mutate(random, known.data, self._others)
        else:
            data, is_payload_same = forge_record(random, known.data, self._others)
        with refused(self):
            read_header(data)
        with refused(self):
            parsed = parse_record(data)
            if parsed.data.tobytes() != data[: parsed.stored_bytes]:
                raise WrongAnswerError("a record that was read is not what was there")
        out = np.zeros(known.layout.block_bytes, dtype=np.uint8)
        with refused(self):
            reason = decode_record(data, out, expected=known.info, layout=known.layout)
            if reason is None and not _is_same_identity(data, known.info):
                raise WrongAnswerError("another block's record was taken for the one asked for")
            if reason is None and is_payload_same and not _is_same_block(out, known):
                raise WrongAnswerError("a block was decoded to other bytes")
        return data != known.data and _is_sealed(data)


class Descriptions(Area):
    """Descriptions of namespaces: refused, or read with the digest that they have."""

    name = "descriptions"

    def case(self, random: Random) -> bool:
        text = change_json(random, NAMESPACE.describe())
        with refused(self):
            parsed = parse_description(text)
            same = {**json.loads(NAMESPACE.describe()), "name": ""} == {**json.loads(text), "name": ""}
            if (parsed.digest == NAMESPACE.digest) != same:
                raise WrongAnswerError("a description's digest is another namespace's")
            if parsed.layout.block_bytes <= 0 or not isinstance(parsed.fields, dict):
                raise WrongAnswerError("a description without a layout")
            parsed.name.encode()
            return True
        return False


class Prompts(Area):
    """Prompt files of any bytes, kinds and names: refused, or exactly the prompts that were written."""

    name = "prompts"

    def case(self, random: Random) -> bool:
        path = self.directory / random.choice(("p.jsonl", "p.txt", "p", "p.JSONL", "p.json", "ü p.jsonl"))
        with contextlib.suppress(FileNotFoundError):
            _remove(path)
        prompts = [self._prompt(random) for _ in range(random.randrange(1, 4))]
        lines = [json.dumps({"system": prompt}, ensure_ascii=random.random() < 0.5) for prompt in prompts]
        text = random.choice(("\n", "\r\n", "\n\n")).join(lines).encode(errors="surrogatepass")
        is_whole = random.random() < 0.3
        if not is_whole:
            text = mutate(random, text) if random.random() < 0.6 else self._odd_lines(random)
        if random.random() < 0.1:
            make_odd_file(random, path, text)
            is_whole = False
        else:
            path.write_bytes(text)
        with refused(self):
            found = read_prompts(path, lines=random.random() < 0.3)
            if is_whole and path.suffix == ".jsonl" and [each.system for each in found] != prompts:
                raise WrongAnswerError("the prompts read are not those written")
            return True
        return False

    def _prompt(self, random: Random) -> str:
        text = odd_text(random) + random.choice((" a", "b\u2028c", "\x85d", "e\x0cf", "g\nh", "你好"))
        return text.encode(errors="replace").decode()

    def _odd_lines(self, random: Random) -> bytes:
        values = [odd_json(random) for _ in range(3)]
        keys = ("system", "tools", "messages", "other")
        values += [{random.choice(keys): odd_json(random) for _ in range(2)}]
        text = "\n".join(json.dumps(each) for each in random.sample(values, 2))
        return random.choice((b"", b"\xef\xbb\xbf", b"\0", b"[" * 50_000)) + text.encode(errors="surrogatepass")


class States(Area):
    """State files, most with both checksums right: refused or loaded, and then only true blocks come up."""

    name = "states"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        chain = chain_of(3)
        branch = record_of(77, chain[0].info, seed=77)
        partial = record_of([5, 6, 7], chain[0].info, seed=78)
        lossy = [codec for codec in CODECS if codec.is_lossy]
        self._records = [*chain, branch, partial]
        self._others = tuple(
            encode_record(record.info, block_bytes(at), layout=LAYOUT, codec=lossy[at % len(lossy)]).data.tobytes()
            for at, record in enumerate(chain)
        )
        foreign = chain_of(2, first=40, namespace=OTHER)
        self._foreign = tuple(record.data.tobytes() for record in foreign)
        self._blocks = {
            record.info.block_hash: block_bytes(seed)
            for record, seed in zip(self._records, (0, 1, 2, 77, 78), strict=True)
        }
        tokens = [np.frombuffer(record.info.token_bytes, dtype="<u4").tolist() for record in self._records]
        self._prompts = (
            [*tokens[0], *tokens[1], *tokens[2], 1],
            [*tokens[0], *tokens[3], 1],
            [*tokens[0], *tokens[4], 9, 9],
            [9, 9, 9],
        )
        self._path, self._saved = directory / "state.tkv", directory / "saved.tkv"

    def case(self, random: Random) -> bool:
        data, forged = self._state(random)
        self._path.write_bytes(data)
        with refused(self), StateFile(self._path) as state:
            self._ask(state)
        if random.random() < 0.4:  # a cache takes ten times as long
            self._load(random, forged, is_saved=random.random() < 0.4)
        return _is_sealed_state(data)

    def _load(self, random: Random, forged: frozenset[bytes], *, is_saved: bool) -> None:
        """Load the file into a cache, ask for prompts there, and perhaps save what it has."""
        config = CacheConfig(
            block_size=16, hot_bytes=8 * LAYOUT.block_bytes, warm_bytes=4 * LAYOUT.block_bytes, num_io_threads=1
        )
        with TierCache(config, namespace=NAMESPACE) as cache, refused(self):
            load_cache_state(cache, self._path)
            for prompt in random.sample(self._prompts, 2):
                self._request(cache, prompt, forged)
            if is_saved:
                save_cache_state(cache, self._saved)
                with StateFile(self._saved) as saved:
                    for record in saved.iter_records():
                        parse_record(record)

    def _request(self, cache: TierCache, prompt: list[int], forged: frozenset[bytes]) -> None:
        with refused(self):
            sequence = cache.acquire(prompt)
            sequence.wait_all()
            if not 0 <= sequence.num_cached_tokens < len(prompt):
                raise WrongAnswerError(f"{sequence.num_cached_tokens} tokens cached of {len(prompt)}")
            for at, block_id in enumerate(sequence.block_table):
                count = min(sequence.num_cached_tokens - at * 16, 16)
                if count <= 0:
                    break
                records = [each for each in self._records if _tokens_at(prompt, at, count, each)]
                names = {each.info.block_hash for each in records}
                if names & forged:  # a block of somebody who knows how to make a checksum is not looked into
                    break
                raw = cache.hot.bytes_view[block_id].numpy().view(np.uint8).reshape(-1)
                known = [
                    _Known(replace(each.info), LAYOUT, b"", self._blocks[each.info.block_hash]) for each in records
                ]
                if not any(_is_same_block(raw, _first(each, count)) for each in known):
                    raise WrongAnswerError("a cached block has another one's K and V")
            cache.commit(sequence, sequence.num_cached_tokens)
            cache.release(sequence)

    def _ask(self, state: StateFile) -> None:
        out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
        for record in self._records:
            info = record.info
            state.lookup(info.block_hash)
            state.children(info.parent)
            state.read_tokens(info.block_hash)
            state.find_longest_run(info.parent, info.token_bytes)
            state.is_in_memory(info.block_hash)
            state.read_ahead([info.block_hash])
            state.read_record(info.block_hash)
            state.read_into(info, out, layout=LAYOUT)
        for _ in zip(state.iter_records(), range(1000), strict=False):
            pass

    def _state(self, random: Random) -> tuple[bytes, frozenset[bytes]]:
        """Return a file, and the hashes of the blocks whose payload may be another's."""
        records = [record.data.tobytes() for record in self._records]
        hashes = [record.info.block_hash for record in self._records]
        forged: set[bytes] = set()
        if random.random() < 0.5:
            at = random.randrange(len(records))
            kind = random.randrange(3)
            if kind == 0:
                records[at], is_payload_same = forge_record(random, records[at], (*self._others, *self._foreign))
                if not is_payload_same:
                    forged |= {records[at][16:32], hashes[at]}
            elif kind == 1 and at < len(self._others):
                records[at] = self._others[at]
            else:
                records[at] = mutate(random, records[at], self._foreign)
        description = NAMESPACE.describe()
        if random.random() < 0.15:
            description = change_json(random, description)
        body = bytearray(ALIGN_BYTES) + description
        rows = []
        for info, record in zip((each.info for each in self._records), records, strict=True):
            body += bytes(-len(body) % ALIGN_BYTES)
            rows.append([info.block_hash, info.parent, len(body), len(record), info.num_tokens, 0])
            body += record
        body += bytes(-len(body) % ALIGN_BYTES)
        for _ in range(random.choice((0, 0, 1, 2))):
            self._change_rows(random, rows)
        if random.random() < 0.97:
            rows.sort()
        index = np.array([tuple(row) for row in rows], dtype=ROW).tobytes()
        index_offset = len(body)
        body += index
        header = StateHeader(
            file_bytes=len(body),
            description_bytes=len(description),
            index_offset=index_offset,
            rows=len(rows),
            namespace=NAMESPACE.digest,
            checksum=xxhash.xxh3_64_intdigest(description + index),
        )
        if random.random() < 0.2:
            name = random.choice(("file_bytes", "description_bytes", "index_offset", "rows", "namespace", "checksum"))
            value: Any = random.randbytes(16) if name == "namespace" else odd_number(random)
            header = replace(header, **{name: value})
            checked = body[ALIGN_BYTES : ALIGN_BYTES + min(header.description_bytes, len(body))]
            checked += body[min(header.index_offset, len(body)) :]
            if name != "checksum":
                header = replace(header, checksum=xxhash.xxh3_64_intdigest(bytes(checked)))
        packed = header.pack()
        body[: len(packed)] = packed
        data = bytes(body)
        return (mutate(random, data) if random.random() < 0.15 else data), frozenset(forged)

    def _change_rows(self, random: Random, rows: list[list[Any]]) -> None:
        row, other = random.choice(rows), random.choice(rows)
        kind = random.randrange(8)
        if kind == 0:
            row[1] = random.choice((row[0], other[0], other[1], bytes(16), NAMESPACE.digest))
        elif kind == 1:
            row[2] = random.choice((odd_number(random), other[2], (row[2] + 1) % (1 << 64)))
        elif kind == 2:
            row[3] = random.choice((odd_number(random), other[3], 0, 127, 128, max(row[3] - 1, 0)))
        elif kind == 3:
            row[4] = odd_number(random, 32)
        elif kind == 4:
            row[0] = random.choice((other[0], NAMESPACE.digest, bytes(16), random.randbytes(16)))
        elif kind == 5:
            rows.append(list(row))
        elif kind == 6:
            row[:2] = [row[1], row[0]]
        else:
            rows.remove(row)
            if not rows:
                rows.append(row)


def _first(known: _Known, count: int) -> _Known:
    return replace(known, info=replace(known.info, token_bytes=known.info.token_bytes[: 4 * count]))


def _tokens_at(prompt: list[int], at: int, count: int, record: EncodedRecord) -> bool:
    wanted = np.array(prompt[at * 16 : at * 16 + count], dtype="<u4").tobytes()
    return record.info.token_bytes.startswith(wanted)


class Stores(Area):
    """Directories and databases of a store: opened or refused, repaired, and good for new blocks in the end."""

    name = "stores"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._chain = [*chain_of(4), record_of(66, chain_of(1)[0].info, seed=66)]
        self._blocks = {
            record.info.block_hash: block_bytes(seed)
            for record, seed in zip(self._chain, (0, 1, 2, 3, 66), strict=True)
        }
        with open_store(directory / "template") as store:
            store.open_namespace(NAMESPACE)
            store.put(self._chain)
        self._data = (directory / "template" / "cold" / "data.mdb").read_bytes()

    def case(self, random: Random) -> bool:
        path = self.directory / "case"
        shutil.rmtree(path, ignore_errors=True)
        (path / "cold").mkdir(parents=True)
        is_inside = random.random() < 0.5
        if not is_inside:
            self._spoil_directory(random, path)
        else:
            (path / "cold" / "data.mdb").write_bytes(self._data)
        is_open = False
        forged: set[bytes] = set()
        with refused(self), open_store(path, write_wait_s=0.5) as store:
            is_open = True
            if is_inside:
                forged = self._spoil_content(random, store)
            self._read(store, forged)
            for step in random.sample(self._upkeep(store, random, forged), 3):
                with refused(self):
                    step()
            with refused(self):
                store.verify(repair=True)
                store.check()
            with refused(self):
                store.put(self._chain)
                self._read(store, forged)
        with refused(self), open_store(path) as store:
            self._read(store, forged)
        return is_inside and is_open

    def _read(self, store: ColdStore, forged: set[bytes]) -> None:
        out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
        for record in self._chain:
            info = record.info
            with refused(self):
                store.lookup(info.block_hash)
                store.find_longest_run(info.parent, info.token_bytes)
                store.children(info.parent)
                store.read_tokens(info.block_hash)
                reason = store.read_into(info, out, layout=LAYOUT)
                if reason is None and info.block_hash not in forged:
                    if not np.array_equal(out, self._blocks[info.block_hash]):
                        raise WrongAnswerError("the store has another block's K and V")
                elif reason is not None and not isinstance(reason, MissReason):
                    raise WrongAnswerError(f"a miss without a reason: {reason!r}")

    def _upkeep(self, store: ColdStore, random: Random, forged: set[bytes]) -> list[Callable[[], object]]:
        victim = random.choice(self._chain).info.block_hash

        def put_forged() -> None:
            data, is_payload_same = forge_record(random, self._chain[0].data.tobytes(), ())
            if not is_payload_same:
                forged.add(data[16:32])
            store.put([parse_record(data)])

        return [
            store.check,
            store.verify,
            store.stats,
            store.namespaces,
            store.maintain,
            store.flush,
            store.compact,
            lambda: [store.read_record(key) for key, _ in store.iter_entries(NAMESPACE.digest)],
            lambda: store.delete(victim),
            lambda: store.set_pinned([victim], random.random() < 0.5),
            lambda: store.evict(to_bytes=random.choice((0, 40_000, 1 << 40))),
            lambda: store.evict(older_than_s=random.choice((0.0, 1e9))),
            lambda: store.notes.touch([victim]),
            put_forged,
            lambda: store.register_namespace(OTHER.digest, OTHER.describe()),
        ]

    def _spoil_directory(self, random: Random, path: Path) -> None:
        store = path / "cold"
        (store / "data.mdb").write_bytes(self._data)
        kind = random.randrange(4)
        if kind == 0:
            (store / "data.mdb").write_bytes(self._mutated_pages(random))
        elif kind == 1:
            shutil.rmtree(store)
            make_odd_file(random, store, self._data)
        else:
            name = random.choice(
                ("data.mdb", "lock.mdb", "users.lock", "write.lock", "data.mdb.damaged", "data.mdb.new")
            )
            with contextlib.suppress(FileNotFoundError):
                (store / name).unlink()
            make_odd_file(random, store / name, self._data)

    def _mutated_pages(self, random: Random) -> bytes:
        data = bytearray(self._data)
        for _ in range(random.randrange(1, 4)):
            page = random.randrange(len(data) // 4096)
            at = page * 4096 + random.choice((random.randrange(16), random.randrange(4096)))
            width = random.choice((1, 2, 4, 8))
            data[at : at + width] = odd_number(random, 8 * width).to_bytes(width, "little")
        cut = random.choice((len(data), len(data), len(data) - 4096, random.randrange(len(data)), 0))
        return bytes(data[:cut])

    def _spoil_content(self, random: Random, store: ColdStore) -> set[bytes]:
        """Change one value of the databases, its checksum right where it has one."""
        record = random.choice(self._chain)
        key, forged = record.info.block_hash, set[bytes]()
        with store._writer.batch() as batch:
            txn, databases = batch.txn, batch.databases
            kind = random.randrange(6)
            if kind == 0:
                data, is_payload_same = forge_record(random, record.data.tobytes(), (self._chain[0].data.tobytes(),))
                forged = set() if is_payload_same else {key}
                txn.put(key, data or b"\0", db=databases.blocks)
            elif kind == 1:
                data = mutate(random, bytes(txn.get(key, db=databases.blocks)))
                txn.put(key, data, db=databases.blocks)
            elif kind == 2:
                txn.put(
                    key,
                    self._forged_entry(random, key, bytes(txn.get(key, db=databases.entries))),
                    db=databases.entries,
                )
            elif kind == 3:
                row = random.choice((self._row(random), add_checksum(random.randbytes(random.randrange(60)))))
                digest = random.choice((NAMESPACE.digest, OTHER.digest, b"", random.randbytes(20)))
                txn.put(b"namespace" + digest, row, db=databases.meta)
            elif kind == 4:
                txn.put(self._child_row(random), random.choice((b"", b"x")), db=databases.children)
            else:
                value = random.choice((b"", b"3", b"9" * 7, add_checksum(b"4"), random.randbytes(12)))
                txn.put(random.choice((b"format", b"other")), value, db=databases.meta)
        return forged

    def _forged_entry(self, random: Random, key: bytes, entry: bytes) -> bytes:
        body = bytearray(entry[:88])
        offset, width = random.choice(
            ((0, 16), (16, 16), (32, 8), (40, 8), (48, 8), (56, 8), (64, 4), (68, 4), (72, 4))
        )
        if random.random() < 0.5:
            offset, width = random.choice(((76, 4), (80, 4), (84, 2), (86, 2)))
        value = random.choice(
            (random.randbytes(width), odd_number(random, 8 * min(width, 8)).to_bytes(width, "little"))
        )
        if width == 8 and random.random() < 0.4:
            value = struct.pack("<d", random.choice((float("nan"), float("inf"), -1e300, 1e300)))
        body[offset : offset + width] = value
        if offset == 0 and random.random() < 0.5:
            body[:16] = random.choice((key, self._chain[-1].info.block_hash))
        packed = bytes(body) + xxhash.xxh3_64_intdigest(key + body).to_bytes(8, "little")
        return packed if random.random() < 0.9 else mutate(random, packed)

    def _row(self, random: Random) -> bytes:
        description = change_json(random, NAMESPACE.describe())
        numbers = {name: odd_number(random, 63) for name in ("blocks", "raw_bytes", "stored_bytes", "value_bytes")}
        return pack_row(NamespaceRow(description=description, **numbers))

    def _child_row(self, random: Random) -> bytes:
        hashes = [record.info.block_hash for record in self._chain]
        parent, child = random.choice((*hashes, NAMESPACE.digest)), random.choice((*hashes, random.randbytes(16)))
        tokens = random.choice(self._chain).info.token_bytes
        big = np.frombuffer(tokens, dtype="<u4").astype(">u4").tobytes()
        count, level = random.choice((16, 16, 0, 255)), random.choice((0, 0, 1, 200))
        key = parent + big + bytes([count, level]) + child
        return key if random.random() < 0.8 else key[: random.randrange(1, len(key))]


def make_odd_file(random: Random, path: Path, data: bytes) -> None:
    """Make something at a path that a program may not expect there."""
    kind = random.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to(path.parent / "nothing" / "there")
    elif kind == 4:
        path.symlink_to("/dev/null")
    elif kind == 5:
        with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):
            listener.bind(os.fspath(path))
    elif kind == 6:
        path.write_bytes(b"")
    elif kind == 7:
        path.write_bytes(mutate(random, data))
    else:
        path.symlink_to("/dev/zero")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()
