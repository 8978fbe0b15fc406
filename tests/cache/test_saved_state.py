"""Saving what a cache holds and loading it: errors of our own, misses, bounded waits; and exact stays exact."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crafted_state import state_of, state_start
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ClosedError, ConfigError, NamespaceMismatchError, StoreError, TierKVError
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.record import BlockInfo, encode_record
from tierkv.storage.state_files import STATE_FILES_LIMIT
from tierkv.storage.state_writer import write_state_file
from tierkv.transfer import cache_state
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

LAYOUT = tiny_layout()
NAMESPACE = Namespace(weights="w", layout=LAYOUT)
PROMPT = list(range(13))
HANG_S = 30.0


def open_cache(path: Path | None, **options: Any) -> TierCache:
    size = 16 * LAYOUT.block_bytes
    config = CacheConfig(
        cold_path=path, cold_bytes=64 << 20, min_free_bytes=0, block_size=4, hot_bytes=size, warm_bytes=size, **options
    )
    return TierCache(config, namespace=NAMESPACE)


def save_prompt(folder: Path) -> Path:
    with open_tiny(folder) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        assert cache.save_cache_state(folder / "state").blocks == 3
    return folder / "state"


def lossy_records() -> list[bytes]:
    """Return the records of the prompt's blocks as int8, under the name of the exact namespace."""
    block = np.linspace(-1, 1, LAYOUT.block_bytes // 4, dtype="<f4").view(np.uint8)
    codec, records = codec_by_name("lossy-int8"), []
    info: BlockInfo | None = None
    for start in (0, 4, 8):
        tokens = np.arange(start, start + 4, dtype="<u4").tobytes()
        info = info.next(tokens) if info else BlockInfo.first(tokens, namespace=NAMESPACE.digest)
        records.append(encode_record(info, block, layout=LAYOUT, codec=codec).data.tobytes())
    return records


# -- exact is exact ------------------------------------------------------------------------------------


def test_lossy_records_of_an_exact_namespace_are_neither_served_nor_saved_on(tmp_path: Path) -> None:
    (tmp_path / "lossy").write_bytes(state_of(NAMESPACE, lossy_records()))
    with open_cache(None) as cache:
        assert cache.load_cache_state(tmp_path / "lossy") == 3
        sequence = PatternEngine(cache).start(PROMPT)  # checks every byte that it is given
        assert sequence.num_cached_tokens == 0
        assert cache.stats().miss_reasons["corrupt"] == 1
        cache.release(sequence)
        cache.release(PatternEngine(cache).start([*PROMPT, 99]))
    with open_cache(None) as cache:
        cache.load_cache_state(tmp_path / "lossy")
        assert cache.save_cache_state(tmp_path / "again").blocks == 0


def test_the_codec_of_a_lossy_cache_is_served_from_its_file_and_saved_on(tmp_path: Path) -> None:
    with open_cache(None, codec="lossy-int8") as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.save_cache_state(tmp_path / "state")
    with open_cache(None, codec="lossy-int8") as cache:
        assert cache.load_cache_state(tmp_path / "state") == 3
        assert cache.save_cache_state(tmp_path / "again").blocks == 3
        sequence = cache.acquire(PROMPT)
        sequence.wait_all()
        assert sequence.cached_tokens[Tier.COLD] == 12


def test_exact_records_in_a_lossy_namespaces_file_are_damage_but_raw_ones_are_not(tmp_path: Path) -> None:
    lossy = replace(NAMESPACE, lossy_codec="lossy-int8")
    tokens = np.arange(4, dtype="<u4").tobytes()
    info = BlockInfo.first(tokens, namespace=lossy.digest)
    for codec, cached in (("zstd", 0), ("raw", 4), ("lossy-int8", 4)):
        block = np.ones(LAYOUT.block_bytes // 4, dtype="<f4").view(np.uint8)
        record = encode_record(info, block, layout=LAYOUT, codec=codec_by_name(codec))
        assert record.codec == codec
        (tmp_path / codec).write_bytes(state_of(lossy, [record.data.tobytes()]))
        with open_cache(None, codec="lossy-int8") as cache:
            cache.load_cache_state(tmp_path / codec)
            assert cache.acquire(list(range(5))).num_cached_tokens == cached, codec


# -- damage --------------------------------------------------------------------------------------------


def test_a_damaged_block_is_a_miss_and_left_out_of_what_is_saved(tmp_path: Path) -> None:
    path = save_prompt(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.find(b"TKVB", state_start(NAMESPACE.describe()) + 1)
    data[at + 200] ^= 1
    path.write_bytes(data)
    with open_cache(None) as cache:
        assert cache.load_cache_state(path) == 3
        saved = cache.save_cache_state(tmp_path / "again")
        assert saved.blocks == 2
        cache.release(PatternEngine(cache).start(PROMPT))
        assert cache.stats().miss_reasons["corrupt"] == 1
        assert cache.save_cache_state(tmp_path / "again").blocks == 3, "the block has been computed again"


def test_a_file_of_another_namespace_is_refused_by_a_short_message(tmp_path: Path) -> None:
    keys = {f"key \x1b[31m{number:05}\n": "x" for number in range(1000)}
    other = replace(NAMESPACE, architecture=keys)
    write_state_file(tmp_path / "state", namespace=other.digest, description=other.describe(), records=[])
    with open_cache(None) as cache:
        with pytest.raises(NamespaceMismatchError, match=r"and 992 more differ") as raised:
            cache.load_cache_state(tmp_path / "state")
        assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
        assert cache.stats().state_files == 0


@pytest.mark.parametrize("path", ["a\0b", "", "\ud800", None, 7, b"bytes\0"], ids=repr)
def test_what_is_no_path_is_an_error_of_our_own(tmp_path: Path, path: Any) -> None:
    with open_cache(tmp_path / "store") as cache:
        for use in (cache.load_cache_state, cache.save_cache_state):
            with pytest.raises(ConfigError):
                use(path)


@pytest.mark.parametrize("error", [OSError(5, "broken"), MemoryError(), ValueError("odd"), OverflowError("large")])
def test_errors_of_the_system_are_translated(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_prompt(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    with open_tiny(tmp_path) as cache:
        for module, call in ((os, "pread"), (os, "open"), (os, "fstat")):
            with monkeypatch.context() as patch:
                patch.setattr(module, call, fail)
                with pytest.raises(StoreError, match="cannot read"):
                    cache.load_cache_state(path)
        for module, call in ((os, "pwrite"), (os, "fsync"), (os, "replace")):
            with monkeypatch.context() as patch:
                patch.setattr(module, call, fail)
                with pytest.raises(StoreError, match="cannot write"):
                    cache.save_cache_state(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(cache_state, "encode_record", fail)
            patch.setattr(type(cache.cold), "read_record", fail)
            with pytest.raises(StoreError, match="cannot write"):
                cache.save_cache_state(tmp_path / "out")
        assert cache.save_cache_state(tmp_path / "out").blocks == 3


# -- several files -------------------------------------------------------------------------------------


def test_a_file_loaded_again_is_one_source_and_closed_with_the_cache(tmp_path: Path) -> None:
    path = save_prompt(tmp_path)
    with open_cache(None) as cache:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert cache.load_cache_state(path) == 3
        assert cache.stats().state_files == 1
        assert len(os.listdir("/proc/self/fd")) == before + 1
        with pytest.raises(NamespaceMismatchError):
            cache.load_cache_state(save_other(tmp_path))
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) <= before


def save_other(folder: Path) -> Path:
    other = Namespace(weights="other", layout=LAYOUT)
    write_state_file(folder / "other", namespace=other.digest, description=other.describe(), records=[])
    return folder / "other"


def test_the_number_of_loaded_files_is_limited(tmp_path: Path) -> None:
    path = save_prompt(tmp_path)
    data = path.read_bytes()
    with open_cache(None) as cache:
        for number in range(STATE_FILES_LIMIT):
            (tmp_path / f"{number}").write_bytes(data)
            cache.load_cache_state(tmp_path / f"{number}")
        with pytest.raises(CapacityError):
            cache.load_cache_state(path)
        assert cache.stats().state_files == STATE_FILES_LIMIT
        assert cache.acquire(PROMPT).num_cached_tokens == 12


# -- a disk that hangs ---------------------------------------------------------------------------------


class Hang:
    """A call that does not return, on threads of some name, until it is let go."""

    def __init__(self, call: Callable[..., Any], thread: str = "tierkv-file") -> None:
        self._call = call
        self._thread = thread
        self._may_go_on = threading.Event()
        self.is_inside = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name.startswith(self._thread):
            self.is_inside.set()
            assert self._may_go_on.wait(HANG_S)
        return self._call(*args, **kwargs)

    def let_go(self) -> None:
        self._may_go_on.set()


@pytest.mark.parametrize("call", ["open", "pread"])
def test_loading_from_a_disk_that_hangs_is_an_error_and_leaves_no_file_open(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_prompt(tmp_path)
    hang = Hang(getattr(os, call))
    monkeypatch.setattr(os, call, hang)
    monkeypatch.setattr(cache_state, "FILE_WAIT_S", 0.05)
    with open_cache(None) as cache:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StoreError, match=r"no answer for 0\.05 s"):
            cache.load_cache_state(path)
        hang.let_go()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
        assert cache.stats().state_files == 0


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_saving_to_a_disk_that_hangs_is_an_error_and_changes_nothing_later(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "state").write_text("as it was")
    with open_tiny(tmp_path) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()
        hang = Hang(getattr(os, call))
        monkeypatch.setattr(os, call, hang)
        monkeypatch.setattr(cache_state, "FILE_WAIT_S", 0.05)
        with pytest.raises(StoreError, match="no answer"):
            cache.save_cache_state(folder / "state")
        hang.let_go()
        wait_until(lambda: os.listdir(folder) == ["state"])
        assert (folder / "state").read_text() == "as it was"


@pytest.mark.parametrize("use", ["save_cache_state", "load_cache_state"])
def test_closing_ends_a_save_or_a_load_that_hangs(tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_prompt(tmp_path)
    monkeypatch.setattr("tierkv.cache._CALLS_WAIT_S", 0.1)
    cache = open_tiny(tmp_path, write_wait_s=0.1)
    hang = Hang(os.open)
    monkeypatch.setattr(os, "open", hang)
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            getattr(cache, use)(path)
        except TierKVError as exc:
            errors.append(exc)

    user = threading.Thread(target=attempt)
    user.start()
    assert hang.is_inside.wait(HANG_S)
    closer = threading.Thread(target=cache.close)
    closer.start()
    closer.join(HANG_S)
    user.join(HANG_S)
    assert not closer.is_alive() and not user.is_alive()
    assert isinstance(errors[0], ClosedError)
    hang.let_go()


def test_closing_leaves_a_read_that_hangs_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_prompt(tmp_path)
    monkeypatch.setattr("tierkv.cache._CALLS_WAIT_S", 0.1)
    cache = open_cache(None, write_wait_s=0.1)
    cache.load_cache_state(path)
    before = len(os.listdir("/proc/self/fd"))
    hang = Hang(os.preadv, "tierkv-io")
    monkeypatch.setattr(os, "preadv", hang)

    def attempt() -> None:
        with contextlib.suppress(TierKVError):
            cache.acquire(PROMPT)

    user = threading.Thread(target=attempt)
    user.start()
    assert hang.is_inside.wait(HANG_S)
    closer = threading.Thread(target=cache.close)
    closer.start()
    closer.join(HANG_S)
    assert not closer.is_alive()
    assert len(os.listdir("/proc/self/fd")) >= before, "nobody else's file has its number now"
    hang.let_go()
    user.join(HANG_S)
    assert not user.is_alive()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) < before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
