"""How many threads of a process read and decode: ranks of one machine share its cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tierkv.block_store.config import BlockStoreConfig
from tierkv.config import CacheConfig
from tierkv.integrations.vllm.options import Options
from tierkv.values.cores import available_cores, default_io_threads


@pytest.mark.parametrize(
    ("cores", "num_processes", "want"),
    [(1, 1, 1), (6, 1, 6), (128, 1, 8), (16, 2, 8), (16, 8, 2), (16, 5, 3), (2, 8, 1), (128, 8, 8)],
)
def test_processes_of_a_machine_share_its_cores_and_each_has_one(cores: int, num_processes: int, want: int) -> None:
    assert default_io_threads(num_processes, cores=cores) == want


def test_only_the_cores_that_the_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert available_cores() == default_io_threads() == CacheConfig().io_threads == 3
    assert BlockStoreConfig(warm_bytes=1 << 20).io_threads == 3
    assert Options(path=Path("store")).store_config(num_workers=3).io_threads == 1


def test_a_number_that_is_given_is_taken_as_it_is() -> None:
    assert CacheConfig(num_io_threads=40).io_threads == 40
    assert Options(path=Path("store"), num_io_threads=40).store_config(num_workers=8).io_threads == 40
