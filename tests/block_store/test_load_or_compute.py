"""Load or compute: what was measured decides, and a wait is given up when computing the rest is faster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from stored_blocks import eventually

from tierkv import BlockLayout, BlockStoreConfig, Buffers, ConfigError, LoadOrCompute, Namespace
from tierkv.block_store import cost_file
from tierkv.block_store.cost_file import CostFile
from tierkv.block_store.load_or_compute import Origin, reading_s
from tierkv.block_store.store import BlockStore


def test_blocks_are_loaded_until_both_ways_are_measured() -> None:
    choice = LoadOrCompute(block_size=256)
    assert choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32) == 32
    choice.record_load(32, origin=Origin.DISK, seconds=9.0)
    assert choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32) == 32
    choice.record_compute(8192, 0.2)
    assert choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32) == 0
    assert choice.worth_loading(32, origin=Origin.WARM, num_rest_tokens=32) == 32, "another kind of load"
    assert choice.worth_loading(0, origin=Origin.WARM, num_rest_tokens=32) == 0


def test_the_page_cache_says_nothing_about_the_disk() -> None:
    choice = LoadOrCompute(block_size=256)
    choice.record_compute(8192, 0.2)
    choice.record_load(32, origin=Origin.PAGE_CACHE, seconds=0.1)
    choice.record_load(32, origin=Origin.DISK, seconds=0.3)
    assert choice.worth_loading(32, origin=Origin.PAGE_CACHE, num_rest_tokens=32) == 32
    assert choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32) == 0


def test_the_way_that_is_not_chosen_is_tried_again() -> None:
    choice = LoadOrCompute(block_size=256)
    choice.record_compute(8192, 0.2)
    choice.record_load(32, origin=Origin.DISK, seconds=0.3)
    asked = 0
    while not choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32):
        asked += 1
        assert asked < 60
    assert asked > 5
    choice.record_load(32, origin=Origin.DISK, seconds=0.3)
    assert not choice.worth_loading(32, origin=Origin.DISK, num_rest_tokens=32), "it was measured anew"


@pytest.mark.parametrize(
    ("num_left", "num_read", "waited_s", "is_worth"),
    [
        (32, 0, 0.06, True),
        (32, 0, 0.07, False),
        (31, 1, 0.06, True),  # the first of eight that are read side by side: the others are about to come
        (31, 1, 0.07, False),
        (24, 8, 0.045, True),
        (24, 8, 0.07, False),
        (1, 31, 5.0, False),
        (4, 0, 0.012, True),  # all of them are read at once
        (4, 0, 0.013, False),
        (0, 0, 0.001, False),  # nothing is left to wait for
        (0, 32, 0.001, False),
    ],
)
def test_a_wait_is_worth_it_as_long_as_the_rest_comes_sooner_than_it_can_be_computed(
    num_left: int, num_read: int, waited_s: float, is_worth: bool
) -> None:
    choice = LoadOrCompute(block_size=256)
    seen = {"num_read": num_read, "num_at_once": 8, "waited_s": waited_s}
    assert choice.worth_waiting(num_left, **seen) == (num_left > 0), "nothing is measured"  # type: ignore[arg-type]
    choice.record_compute(8192, 0.2)
    assert choice.worth_waiting(num_left, num_read=num_read, num_at_once=8, waited_s=waited_s) == is_worth


@pytest.mark.parametrize(
    ("num_blocks", "num_read", "num_at_once", "seconds"),
    [
        (32, 32, 8, 1.0),
        (32, 16, 8, 2.0),
        (4, 4, 8, 1.0),  # all have come
        (4, 0, 8, 3.0),
        (4, 3, 8, 4 / 3),  # one after another, as it seems
        (300, 183, 256, 300 / 183),
        (0, 0, 8, 1.0),  # what could not be read was given up
        (32, 0, 1, 32.0),
        (32, 1, 16, 3.0),
    ],
)
def test_how_long_reading_takes_is_judged_by_whole_rounds(
    num_blocks: int, num_read: int, num_at_once: int, seconds: float
) -> None:
    assert reading_s(num_blocks, num_read=num_read, num_at_once=num_at_once, waited_s=1.0) == seconds


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("inf"), True])
def test_nonsense_is_refused(seconds: float) -> None:
    choice = LoadOrCompute(block_size=256)
    with pytest.raises(ConfigError):
        choice.record_compute(1, seconds)
    with pytest.raises(ConfigError):
        choice.record_load(1, origin=Origin.WARM, seconds=seconds)


def measured() -> LoadOrCompute:
    choice = LoadOrCompute(block_size=4)
    choice.record_compute(128, 0.2)
    choice.record_load(32, origin=Origin.DISK, seconds=0.3)
    return choice


def open_store(path: Path, **options: object) -> BlockStore:
    layout = BlockLayout.uniform(dtype="bfloat16", block_size=4, num_layers=1, kv_heads=1, head_dim=8)
    config = BlockStoreConfig(cold_path=path, warm_bytes=1 << 16, **options)  # type: ignore[arg-type]
    return BlockStore(config, namespace=Namespace(name="tiny", weights="0" * 64, layout=layout))


def test_the_next_process_knows_the_costs(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        costs = LoadOrCompute(block_size=4)
        store.keep_costs(costs)
        costs.restore(measured().measured())
    with open_store(tmp_path / "store", read_only=True) as store:
        costs = LoadOrCompute(block_size=4)
        store.keep_costs(costs)
        assert costs.worth_loading(32, origin=Origin.DISK, num_rest_tokens=1) == 0, "it need not try the slow disk"
        costs.record_compute(128, 9.0)
        with pytest.raises(ConfigError, match="already"):
            store.keep_costs(costs)
    with open_store(tmp_path / "store") as store:
        costs = LoadOrCompute(block_size=4)
        store.keep_costs(costs)
        assert costs.compute_s(128) == pytest.approx(0.2), "a reader of a store writes nothing"


def test_costs_are_kept_while_the_process_runs(tmp_path: Path) -> None:
    costs = LoadOrCompute(block_size=4)
    kept = CostFile(tmp_path, "a", costs, save_s=0.01)
    costs.restore(measured().measured())
    path = tmp_path / "costs-a.json"
    for _ in range(1000):
        if path.exists() and json.loads(path.read_text()) == json.loads(json.dumps(costs.measured())):
            break
        kept._has_ended.wait(0.01)
    else:
        pytest.fail("nothing was kept")
    kept.close()
    assert [each.name for each in tmp_path.iterdir()] == ["costs-a.json"]


def test_the_first_costs_of_a_kind_are_saved_at_once_and_whole(tmp_path: Path) -> None:
    costs = LoadOrCompute(block_size=4)
    kept = CostFile(tmp_path, "a", costs, save_s=3600)
    path = tmp_path / "costs-a.json"
    for origin in (Origin.DISK, Origin.PAGE_CACHE):
        costs.record_loads([(1, 0.1), (2, 0.2), (4, 0.4)], origin=origin)
        eventually(lambda name=origin.name: path.exists() and name in json.loads(path.read_text()))  # type: ignore[misc]
        assert json.loads(path.read_text())[origin.name] == [[1, 0.1], [2, 0.2], [4, 0.4]]
    kept.close()


def test_observers_are_called_for_the_first_works_of_a_kind_only() -> None:
    costs, calls = LoadOrCompute(block_size=4), []
    costs.observe(lambda: calls.append(costs.measured()))
    costs.record_compute(8, 0.1)
    costs.record_compute(9, 0.1)
    costs.record_loads([(1, 0.1), (2, 0.2)], origin=Origin.DISK)
    costs.record_load(4, origin=Origin.DISK, seconds=1.0)
    costs.restore({"DISK": [(8, 1.0)], "WARM": [(1, 0.1), (2, 0.2)]})
    assert [len(each) for each in calls] == [1, 2, 3]
    assert calls[1]["DISK"] == [(1, 0.1), (2, 0.2)], "all of them are there"


@pytest.mark.parametrize("process", ["../other", "a-b", "a/b", "\u00e9"])
def test_a_name_of_a_process_that_is_none_is_refused(tmp_path: Path, process: str) -> None:
    with open_store(tmp_path / "store") as store, pytest.raises(ConfigError, match="letters"):
        store.keep_costs(LoadOrCompute(block_size=4), process=process)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"compute": [[1, -1]]}',
        '{"compute": [[1, NaN]]}',
        '{"compute": [[0, 1]]}',
        '{"compute": [[true, 1]]}',
        '{"compute": [1]}',
        '{"compute": 1}',
        '{"TAPE": [[1, 1]]}',
        '{"compute": [[128, 0.2]], "DISK": [["many", 1]]}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_damaged_file_of_costs_is_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs-a.json").write_text(text, errors="surrogatepass")
    costs = LoadOrCompute(block_size=4)
    kept = CostFile(tmp_path, "a", costs)
    assert not any(costs.measured().values()), "nothing of it is taken"
    costs.restore(measured().measured())
    kept.close()
    again = LoadOrCompute(block_size=4)
    CostFile(tmp_path, "a", again, is_kept=False)
    assert again.measured() == measured().measured()


def test_a_fifo_in_place_of_the_costs_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "costs-a.json")
    CostFile(tmp_path, "a", LoadOrCompute(block_size=4)).close()


def test_the_costs_of_few_namespaces_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_file, "_MAX_FILES", 2)
    for at, name in enumerate("abc"):
        costs = LoadOrCompute(block_size=4)
        kept = CostFile(tmp_path, name, costs)
        costs.restore(measured().measured())
        kept.close()
        os.utime(tmp_path / f"costs-{name}.json", (at, at))
    costs.record_compute(7, 1.0)
    kept._save()
    assert {each.name for each in tmp_path.iterdir()} == {"costs-b.json", "costs-c.json"}


def test_a_store_says_where_blocks_lie(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        keys = store.keys(range(32))
        store.save(keys, Buffers([bytes(store.layout.block_bytes)] * len(keys)))
        assert store.origin(keys) is Origin.WARM and store.reserve(keys).origin is Origin.WARM
    with open_store(tmp_path / "store") as store:
        keys = store.keys(range(32))
        assert store.origin(keys) is Origin.PAGE_CACHE
        with store.reserve(keys) as reserved:
            assert reserved.origin is Origin.PAGE_CACHE
