"""tierkv as a secondary tier of vLLM's own offloading, through the real TieringOffloadingManager."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cold_blocks import damage_record

from tierkv import ColdStore, ConfigError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm_tiering import CHUNK, Life, key_of, made, offloading_config, payload_of, tier_options
except ImportError as exc:
    pytest.skip(f"vLLM is not installed: {exc}", allow_module_level=True)

from vllm.v1.kv_offload.tiering.base import JobResult

from tierkv.integrations.vllm import tier as vllm_tier

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = [key_of(i) for i in range(5)]
PAYLOADS = [payload_of(i) for i in range(5)]
REPORTS_KEYS = "successful_keys" in JobResult.__dataclass_fields__  # since 0.32


def damage(path: Path, at: int) -> None:
    with Life(path) as life:
        key = life.tier._key(KEYS[at])
    with ColdStore(path) as cold:
        damage_record(cold, key.block_hash, offset=500)


def hits(life: Life, keys: list[bytes] = KEYS) -> list[bool]:
    request = life.begin()
    answers, _ = life.ask(keys, request)
    life.end(request)
    assert set(answers) <= {"HIT", "MISS"}
    return [answer == "HIT" for answer in answers]


def test_chunks_come_back_after_a_restart(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        request = life.begin()
        assert life.ask(KEYS, request) == (["MISS"] * 5, [["RETRY"], ["MISS"]])
        life.end(request)
        assert life.store(KEYS, PAYLOADS) == 5
    with Life(tmp_path) as life:
        request = life.begin()
        answers, seen = life.ask(KEYS, request)
        assert answers == ["HIT"] * 5
        assert seen[0] == ["RETRY"] and seen[-1] == ["HIT"]
        assert life.read(KEYS, request) == PAYLOADS
        life.end(request)
        assert life.tier._rows.counts.loaded == 5


def test_a_lookup_and_a_job_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any, **options: Any) -> Any:
            assert release.wait(30)
            return function(*arguments, **options)

        return wait

    with Life(tmp_path) as life:
        rows = life.tier._rows
        for name in ("found", "save", "load"):
            monkeypatch.setattr(rows, name, slow(getattr(rows, name)))
        request = life.begin()
        started = time.monotonic()
        for _ in range(3):
            assert {life.manager.lookup(key, request).name for key in KEYS} == {"RETRY"}
            life.step()
        prepared = life.manager.prepare_store(KEYS, request)
        life.manager.complete_store(prepared.keys_to_store, request, True)
        life.step()
        assert time.monotonic() - started < 5
        release.set()
        life.rest()
        life.end(request)


def test_a_damaged_chunk_is_a_miss_alone_and_ends_no_request(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS, PAYLOADS)
    damage(tmp_path, 2)
    with Life(tmp_path) as life:
        request = life.begin()
        answers, _ = life.ask(KEYS, request)
        assert answers[2] == "MISS"
        if REPORTS_KEYS:
            assert answers == ["HIT", "HIT", "MISS", "HIT", "HIT"]
        there = [key for key, answer in zip(KEYS, answers, strict=True) if answer == "HIT"]
        assert life.read(there, request) == [PAYLOADS[KEYS.index(key)] for key in there]
        life.end(request)


def test_a_damaged_chunk_is_replaced_when_it_is_stored_again(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS, PAYLOADS)
    damage(tmp_path, 2)
    with Life(tmp_path) as life:
        assert not hits(life)[2]
        assert life.store([KEYS[2]], [PAYLOADS[2]]) == 1
    with Life(tmp_path) as life:
        assert hits(life) == [True] * 5
        request = life.begin()
        assert life.read(KEYS, request) == PAYLOADS
        life.end(request)


def test_part_of_a_request_is_there(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS[:2], PAYLOADS[:2])
        life.store(KEYS[3:4], PAYLOADS[3:4])
    with Life(tmp_path) as life:
        assert hits(life) == [True, True, False, True, False]


def test_groups_have_chunks_of_their_own(tmp_path: Path) -> None:
    other = [key_of(0, group=1)]
    with Life(tmp_path) as life:
        life.store(KEYS[:1], PAYLOADS[:1])
        assert hits(life, other) == [False]
        life.store(other, [payload_of(99)])
    with Life(tmp_path) as life:
        assert hits(life, [KEYS[0], *other]) == [True, True]
        request = life.begin()
        assert life.read([KEYS[0], *other], request) == [PAYLOADS[0], payload_of(99)]
        life.end(request)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "weights-b"},
        {"engine": "other rows"},
        {"adapters": "an adapter"},
        {"parallel": {"tp_size": 2}},
        {"parallel": {"pp_size": 2}},
    ],
)
def test_another_identity_finds_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS, PAYLOADS)
    with Life(tmp_path, **changes) as life:
        assert hits(life) == [False] * 5
    with Life(tmp_path) as life:
        assert hits(life) == [True] * 5


def test_a_row_holds_the_bytes_of_all_workers(tmp_path: Path) -> None:
    both = {"world_size": 2, "tp_size": 2}
    with Life(tmp_path, parallel=both) as life:
        assert life.tier._row_bytes == 2 * CHUNK
        life.store(KEYS, PAYLOADS)
    with Life(tmp_path, parallel=both) as life:
        assert hits(life) == [True] * 5


def test_a_full_disk_costs_hits_and_nothing_else(tmp_path: Path) -> None:
    with Life(tmp_path, min_free_bytes=1 << 60) as life:
        life.store(KEYS, PAYLOADS)
    with Life(tmp_path) as life:
        assert hits(life) == [False] * 5
        life.store(KEYS, PAYLOADS)


def test_a_closed_store_is_all_misses(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS[:4], PAYLOADS[:4])
        life.tier._rows.close()
        life.reset()  # empties the CPU tier too
        assert hits(life) == [False] * 5
        life.store(KEYS, PAYLOADS)


def test_a_failed_load_is_a_miss_although_the_lookup_said_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS, PAYLOADS)
    with Life(tmp_path) as life:
        monkeypatch.setattr(life.tier._rows, "load", lambda keys, places: [False] * len(keys))
        assert hits(life) == [False] * 5
        monkeypatch.undo()
        assert hits(life) == [False] * 5, "until they are stored again"
        life.store(KEYS, PAYLOADS)
        assert hits(life) == [True] * 5


def test_a_job_that_raises_has_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(keys: Any, places: Any) -> list[bool]:
        raise RuntimeError("on purpose")

    with Life(tmp_path) as life:
        monkeypatch.setattr(life.tier._rows, "save", fail)
        life.store(KEYS, PAYLOADS)
        monkeypatch.undo()
    with Life(tmp_path) as life:
        assert hits(life) == [False] * 5


def test_a_reset_ends_the_use_of_the_store_unless_the_weights_are_fixed(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        life.store(KEYS, PAYLOADS)
        life.reset()
        assert hits(life) == [False] * 5
        life.store(KEYS, [payload_of(50 + i) for i in range(5)])  # of other weights
        life.reset()
        assert hits(life) == [False] * 5
    with Life(tmp_path, weights_are_fixed=True) as life:
        assert hits(life) == [True] * 5
        life.reset()
        assert hits(life) == [True] * 5
        request = life.begin()
        assert life.read(KEYS, request) == PAYLOADS
        life.end(request)


def test_short_hashes_are_neither_stored_nor_found(tmp_path: Path) -> None:
    short = [b"\1" * 16 + bytes(4)]
    with Life(tmp_path) as life:
        life.store(short, PAYLOADS[:1])
        life.manager.primary_tier.reset_cache()
        assert hits(life, short) == [False]
        assert life.tier._rows.counts.refused


def test_many_requests_over_a_small_cpu_tier_get_their_own_bytes(tmp_path: Path) -> None:
    keys = [key_of(1000 + i) for i in range(60)]
    with Life(tmp_path, warm_bytes=0) as life:
        for start in range(0, 60, 6):
            life.store(keys[start : start + 6], [payload_of(1000 + start + i) for i in range(6)])
        for start in (*range(0, 60, 6), *range(3, 51, 6)):
            request = life.begin()
            wanted = keys[start : start + 6]
            answers, _ = life.ask(wanted, request)
            there = [i for i, answer in enumerate(answers) if answer == "HIT"]
            assert len(there) == 6
            assert life.read(wanted, request) == [payload_of(1000 + start + i) for i in there]
            life.end(request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": None}, "does not pass on what decides K and V"),
        ({"weights": None}, "not a folder"),
        ({"path": None}, "path is missing"),
        ({"colour": "red"}, "unknown options: colour"),
        ({"codec": "lossy-int8"}, "lossy"),
        ({"weights_are_fixed": "no"}, "weights_are_fixed"),
    ],
)
def test_a_tier_that_cannot_name_its_chunks_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Life(tmp_path, **options)


@pytest.mark.skipif(not REPORTS_KEYS, reason="this vLLM has no localities and no detectors of back-pressure")
def test_vllms_own_options_of_a_tier_are_taken(tmp_path: Path) -> None:
    pressure = {"backpressure_cls": "EMABackpressureDetector"}
    with Life(tmp_path, locality="LOCAL", backpressure=pressure) as life:
        assert life.tier.locality.name == "LOCAL" and life.tier.bp_detector is not None
        life.store(KEYS, PAYLOADS)
    with Life(tmp_path) as life:
        assert hits(life) == [True] * 5


def test_vllm_finds_the_tier_by_its_name(tmp_path: Path) -> None:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    options = tier_options(tmp_path)
    assert SecondaryTierFactory.get_tier_class(options) is vllm_tier.TierkvTier
    del options["module_path"]
    assert SecondaryTierFactory.get_tier_class(options) is vllm_tier.TierkvTier  # as 0.26 asks
    assert made(JobResult, job_id=1, success=True).success and offloading_config(options)
