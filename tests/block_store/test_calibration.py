"""How fast cold blocks come is measured before the first request wants any."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from stored_blocks import LAYOUT, NAMESPACE, TOKENS, config_of, load, save

from tierkv import BlockStore, LoadOrCompute, Origin
from tierkv.block_store.calibration import Calibration
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.own_tiers import OwnTiers
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason

NUM_BLOCKS = 40
SIZES = [1, 2, 4, 8]  # there are 8 spare slots of 64
ROOT = NAMESPACE.digest


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Return the path of a store with blocks, all of them written and none measured."""
    path = tmp_path / "store"
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        assert save(store, store.keys(TOKENS)) == NUM_BLOCKS
        store.flush()
    return path


def calibrated(path: Path, costs: LoadOrCompute) -> dict[str, list[tuple[int, float]]]:
    """Open a store, wait until it has measured, and return what."""
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
        assert store.wait_for_costs()
        assert store.stats().requests == 0, "it counts as no request"
        assert not any(tier.blocks for name, tier in store.stats().tiers.items() if name.value == "warm")
        assert store.cold is not None
        assert store.cold.stats().hits == 0
    return costs.measured()


class FakePages:
    """Stands in for the page cache: records as small as these lie in the tree itself."""

    def __init__(self, patch: pytest.MonkeyPatch, *, can_forget: bool = True, num_deaf: int = 0) -> None:
        """num_deaf: how often the system is asked in vain to forget, since it writes pages first."""
        self.forgotten: set[bytes] = set()
        self.num_deaf = num_deaf
        decode = ColdStore.decode_blocks

        def decode_blocks(store: ColdStore, infos: Sequence[object], *args: object, **options: object) -> object:
            self.forgotten -= {info.block_hash for info in infos}  # type: ignore[attr-defined]
            return decode(store, infos, *args, **options)  # type: ignore[arg-type]

        def forget(_: ColdStore, hashes: Sequence[bytes]) -> None:
            self.num_deaf -= 1
            if can_forget and self.num_deaf < 0:
                self.forgotten |= set(hashes)

        patch.setattr(ColdStore, "decode_blocks", decode_blocks)
        patch.setattr(ColdStore, "forget_pages", forget)
        patch.setattr(ColdStore, "is_in_memory", lambda _, each: each not in self.forgotten)


def calibration_of(cold: ColdStore, time_reading: Callable[[Sequence[BlockKey]], float | None], **changes: Any) -> Any:
    options = {"most": 16, "num_threads": 8, "get_ready": lambda: None, "may_go_on": lambda: True, **changes}
    return Calibration(cold, ROOT, time_reading, **options)


def measured_with(path: Path, seconds: Callable[[int], float], **changes: Any) -> tuple[LoadOrCompute, list[int]]:
    """Measure reads that take so many seconds of so many blocks. Return the costs, and how many blocks were read."""
    asked: list[int] = []

    def time_reading(keys: Sequence[BlockKey]) -> float:
        asked.append(len(keys))
        return seconds(len(keys))

    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    with ColdStore(path, min_free_bytes=0) as cold:
        calibration_of(cold, time_reading, **changes).run(costs)
    return costs, asked


def test_a_store_measures_disk_and_page_cache_when_it_opens(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = FakePages(monkeypatch)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    for origin in (Origin.PAGE_CACHE, Origin.DISK):
        assert [size for size, _ in found[origin.name]] == SIZES
        assert all(seconds > 0 for _, seconds in found[origin.name])
    assert not pages.forgotten, "what was read last is in the page cache again"


def test_a_store_says_when_it_has_measured(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_read = threading.Event()
    monkeypatch.setattr(Calibration, "run", lambda *_: may_read.wait(30))
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        assert store.wait_for_costs(0), "nothing is being measured"
        store.keep_costs(LoadOrCompute(block_size=LAYOUT.block_size))
        assert not store.wait_for_costs(0.01)
        may_read.set()
        assert store.wait_for_costs()


def test_measuring_ends_when_its_time_is_over(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may capture graphs after that, beside which no other thread may use the GPU."""
    FakePages(monkeypatch)
    reads: list[int] = []
    may_read, decode = threading.Event(), ColdStore.decode_blocks

    def decode_late(store: ColdStore, infos: Sequence[object], *args: object, **options: object) -> object:
        reads.append(len(infos))
        may_read.wait(30)
        return decode(store, infos, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdStore, "decode_blocks", decode_late)
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        monkeypatch.setattr(store._tiers._loader._coded, "decode_for_nothing", lambda _: pytest.fail("too late"))  # type: ignore[attr-defined]
        store.keep_costs(costs)
        assert not store.wait_for_costs(0.2) and reads == [1]
        may_read.set()
        assert store.wait_for_costs() and reads == [1]
    assert not costs.measured().get("DISK")


def test_nothing_is_made_ready_where_there_is_nothing_to_measure(filled: Path) -> None:
    asked: list[str] = []
    measured_with(filled, lambda count: 0.1 * count, get_ready=lambda: asked.append("once"))
    assert asked == ["once"]
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    for origin in (Origin.PAGE_CACHE, Origin.DISK):
        costs.record_load(1, origin=origin, seconds=1.0)
    with ColdStore(filled, min_free_bytes=0) as cold:
        calibration_of(cold, lambda _: 1.0, get_ready=lambda: asked.append("twice")).run(costs)
    assert asked == ["once"], "all is known"


def test_a_system_that_writes_blocks_before_it_forgets_them_is_asked_again(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch, num_deaf=3)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    assert [size for size, _ in found["DISK"]] == SIZES


def test_what_is_known_is_not_measured_again(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePages(monkeypatch)
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    costs.record_load(5, origin=Origin.DISK, seconds=7.0)
    found = calibrated(filled, costs)
    assert found["DISK"] == [(5, 7.0)]
    assert found["PAGE_CACHE"]
    monkeypatch.setattr(Calibration, "_some_keys", lambda *_: pytest.fail("the costs beside the store have all"))
    assert calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size)) == found


def test_a_disk_that_cannot_be_told_from_the_page_cache_is_not_measured(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch, can_forget=False)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    assert "PAGE_CACHE" in found and "DISK" not in found


def test_blocks_are_measured_from_disk_first_and_out_of_the_page_cache_if_they_lie_there(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch)  # reads that are only timed bring nothing into it
    costs, asked = measured_with(filled, lambda count: 0.01 * count)
    assert asked == [1, 2, 4, 8, 16, 1], "the last was to bring a block there"
    assert costs.measured()["DISK"] and not costs.measured().get("PAGE_CACHE")


def test_blocks_that_the_system_does_not_forget_are_left_out(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux drops whole folios that nothing maps; a block may share one with a page of the store's tree."""
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        kept = {key.block_hash for key in store.keys(TOKENS)[1:3]}
    pages = FakePages(monkeypatch)
    forget = ColdStore.forget_pages
    monkeypatch.setattr(
        ColdStore, "forget_pages", lambda store, each: forget(store, [x for x in each if x not in kept])
    )
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    assert [size for size, _ in found["DISK"]] == SIZES and not pages.forgotten & kept
    assert [size for size, _ in found["PAGE_CACHE"]] == SIZES


def test_what_left_the_page_cache_is_brought_back_before_it_is_measured_there(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = FakePages(monkeypatch)
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    costs.record_load(5, origin=Origin.DISK, seconds=7.0)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        pages.forgotten |= {key.block_hash for key in store.keys(TOKENS)}
    assert [size for size, _ in calibrated(filled, costs)["PAGE_CACHE"]] == SIZES


@pytest.mark.parametrize(
    ("seconds", "num_threads", "asked", "of_32"),
    [
        (lambda count: 0.3 * count, 8, [1, 2, 4], 9.6),  # a slow disk is read for a second and what was begun
        (lambda count: 0.4, 8, [1, 2, 4], None),  # one block takes as long as four: more would, too
        (lambda count: 0.4, 4, [1, 2, 4], 3.2),  # four are as many as are read side by side
        (lambda count: 0.01, 16, [1, 2, 4, 8, 16], 0.02),
    ],
)
def test_only_what_tells_of_more_blocks_is_recorded(
    filled: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    num_threads: int,
    asked: list[int],
    of_32: float | None,
) -> None:
    FakePages(monkeypatch, can_forget=False)
    costs, found = measured_with(filled, seconds, num_threads=num_threads)
    assert found == asked
    load_s = costs.load_s(32, origin=Origin.PAGE_CACHE)
    assert load_s == (None if of_32 is None else pytest.approx(of_32))


def test_fewer_blocks_at_once_than_threads_tell_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePages(monkeypatch, can_forget=False)
    costs, asked = measured_with(filled, lambda count: 0.01, most=4)
    assert asked == [1, 2, 4] and not costs.measured().get("PAGE_CACHE")
    assert measured_with(filled, lambda count: 0.01, most=3)[1] == [], "no four blocks can be read"


def test_the_blocks_of_one_sequence_are_chosen_in_its_order_without_a_walk_over_the_store(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColdStore, "iter_entries", lambda *_: pytest.fail("a store may have millions"))
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        assert store.cold is not None
        some = calibration_of(store.cold, lambda _: None)._some_keys()
        assert some == list(store.keys(TOKENS)[:24])


def test_blocks_of_several_sequences_are_taken_where_one_is_short(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        for first in (0, 1000, 2000):
            save(store, store.keys(range(first, first + 3 * LAYOUT.block_size)))
        store.flush()
        assert store.cold is not None
        some = calibration_of(store.cold, lambda _: None)._some_keys()
    assert len({key.block_hash for key in some}) == 9


def test_a_block_that_cannot_be_read_ends_the_measurement(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePages(monkeypatch, can_forget=False)
    monkeypatch.setattr(ColdStore, "decode_blocks", lambda *_, **__: [MissReason.CORRUPT])
    assert calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size)) == {"compute": []}


def test_a_store_of_few_blocks_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        save(store, store.keys(TOKENS[: 3 * LAYOUT.block_size]))
        store.flush()
    assert calibrated(path, LoadOrCompute(block_size=LAYOUT.block_size)) == {"compute": []}


class SlowReads:
    """Lets the reads of a calibration take a while. begun: set once there is one."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
        self.begun = threading.Event()
        decode = ColdStore.decode_blocks

        def decode_slowly(store: ColdStore, *args: Any, **options: Any) -> Any:
            if threading.current_thread().name.startswith("tierkv-io"):
                self.begun.set()
                time.sleep(seconds)
            return decode(store, *args, **options)

        patch.setattr(ColdStore, "decode_blocks", decode_slowly)


def test_a_store_that_closes_waits_for_no_further_measurement(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePages(monkeypatch, can_forget=False)
    slow, costs = SlowReads(monkeypatch), LoadOrCompute(block_size=LAYOUT.block_size)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
        assert slow.begun.wait(10)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert costs.measured() == {"compute": []}


def test_the_first_request_ends_the_measurement_and_does_not_wait_for_it(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch, can_forget=False)
    slow, costs = SlowReads(monkeypatch), LoadOrCompute(block_size=LAYOUT.block_size)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
        assert slow.begun.wait(10)
        assert load(store, list(store.keys(TOKENS))) == (NUM_BLOCKS, [])
        assert store.wait_for_costs()
    assert costs.measured() == {"compute": []}


def test_a_load_of_held_blocks_takes_no_spare_slot(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spare slots may be in use by a load that waits for a disk."""
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        loader = store._tiers._loader  # type: ignore[attr-defined]
        found: list[Any] = []
        keys = list(store.keys(TOKENS[: 8 * LAYOUT.block_size]))
        loading = threading.Thread(target=lambda: found.append(load(store, keys)), daemon=True)
        with loader._spare_lock:
            loading.start()
            loading.join(20)
            assert found == [(8, [])]
            assert loader.time_reading(list(store.keys(TOKENS)[:2])) is None, "it does not wait for them either"


def test_costs_that_were_measured_last_are_kept(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, close = LoadOrCompute(block_size=LAYOUT.block_size), OwnTiers.close

    def record_and_close(tiers: OwnTiers) -> bool:
        costs.record_compute(64, 0.5)
        return close(tiers)

    monkeypatch.setattr(OwnTiers, "close", record_and_close)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
    again = LoadOrCompute(block_size=LAYOUT.block_size)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        store.keep_costs(again)
    assert again.measured()["compute"] == [(64, 0.5)]
