"""The parts of nano-vLLM's integration that need no nano-vLLM: the namespace, what is loaded, when it is saved."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.load_or_compute import Origin
from tierkv.block_store.placement import Buffers
from tierkv.block_store.store import BlockStore
from tierkv.errors import UnsupportedModelError
from tierkv.integrations.nano_vllm.identity import namespace_of
from tierkv.integrations.nano_vllm.keys import SequenceKeys
from tierkv.integrations.nano_vllm.load_planner import LoadPlanner
from tierkv.integrations.nano_vllm.save_queue import SaveQueue
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

TOKENS = list(range(600))


# --- The namespace ---------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    packed_modules_mapping: ClassVar[dict[str, Any]] = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k")}

    def __init__(self, rope_base: float = 1e6) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(8, 16, bias=False)
        self.register_buffer("rope", rope_base ** -torch.arange(4.0), persistent=False)


class OtherModel(Model):
    pass


def runner_of(folder: Path, **changes: Any) -> Any:
    """Return what `namespace_of` reads of a ModelRunner, with a few things changed."""
    given = {
        "weight": 1.0,
        "model_class": Model,
        "rope_base": 1e6,
        "config": {},
        "dtype": torch.float32,
        "cache_shape": (2, 2, 8, 256, 2, 16),
        "rank": 0,
        "world_size": 1,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    weights = torch.full((8, 8), given["weight"])
    save_file({"q_proj.weight": weights, "k_proj.weight": weights + 1}, folder / "model.safetensors")
    config = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_bias": False, "_name_or_path": str(folder)}
    return SimpleNamespace(
        model=given["model_class"](given["rope_base"]),
        config=SimpleNamespace(
            model=str(folder), hf_config=SimpleNamespace(to_dict=lambda: {**config, **given["config"]})
        ),
        kv_cache=torch.empty(given["cache_shape"], dtype=given["dtype"]),
        rank=given["rank"],
        world_size=given["world_size"],
    )


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weight": 2.0},
    "rope_theta in the configuration": {"config": {"rope_theta": 1e4}},
    "rope tables": {"rope_base": 1e4},
    "norm": {"config": {"rms_norm_eps": 1e-5}},
    "bias": {"config": {"attention_bias": True}},
    "rope scaling": {"config": {"rope_scaling": {"rope_type": "yarn"}}},
    "a field that is new": {"config": {"sliding_window": 128}},
    "model class": {"model_class": OtherModel},
    "dtype": {"dtype": torch.bfloat16},
    "layers": {"cache_shape": (2, 3, 8, 256, 2, 16)},
    "block size": {"cache_shape": (2, 2, 8, 512, 2, 16)},
    "kv heads": {"cache_shape": (2, 2, 8, 256, 4, 16)},
    "head dim": {"cache_shape": (2, 2, 8, 256, 2, 32)},
    "rank": {"rank": 1, "world_size": 2},
    "number of ranks": {"world_size": 2},
}


def found_blocks(path: Path, runner: Any, *, salt: str = "") -> int:
    with BlockStore(BlockStoreConfig(cold_path=path, warm_bytes=0), namespace=namespace_of(runner, salt=salt)) as store:
        return store.contains(store.keys(TOKENS))


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Keep two blocks of a first runner in a store."""
    path = tmp_path / "store"
    config = BlockStoreConfig(cold_path=path, warm_bytes=8 << 20, cold_bytes=1 << 28)
    with BlockStore(config, namespace=namespace_of(runner_of(tmp_path / "model"))) as store:
        keys = store.keys(TOKENS)
        store.save(keys, Buffers([bytes(store.layout.block_bytes)] * len(keys)))
        store.flush()
    assert found_blocks(path, runner_of(tmp_path / "model")) == 2
    return path


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_one_changed_field_of_the_namespace_finds_nothing(
    store_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert found_blocks(store_path, runner_of(tmp_path / "model", **changes)) == 0


def test_another_salt_finds_nothing(store_path: Path, tmp_path: Path) -> None:
    assert found_blocks(store_path, runner_of(tmp_path / "model"), salt="tenant") == 0


def test_other_engine_sources_find_nothing(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.integrations.nano_vllm.identity._SOURCES", ("test_nano_vllm*.py",))
    monkeypatch.setattr("inspect.getfile", lambda _: str(Path(__file__).parent / "engines" / "x.py"))
    assert found_blocks(store_path, runner_of(tmp_path / "model")) == 0


def test_the_same_model_in_another_folder_is_found(store_path: Path, tmp_path: Path) -> None:
    assert found_blocks(store_path, runner_of(tmp_path / "copy")) == 2


def test_a_model_whose_files_lack_a_parameter_is_refused(tmp_path: Path) -> None:
    runner = runner_of(tmp_path / "model")
    save_file({"q_proj.weight": torch.ones(8, 8)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"no weights for qkv_proj\.weight"):
        namespace_of(runner)


# --- What is loaded --------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Reserved:
    """A reservation of which one block is read in `block_s` seconds of the clock, one after the other."""

    origin = Origin.DISK
    num_at_once = 1

    def __init__(self, clock: Clock, num_blocks: int, *, num_warm: int = 0, block_s: float = 0.0) -> None:
        self.clock, self.num_blocks, self.num_warm, self.block_s = clock, num_blocks, num_warm, block_s
        self.started, self.released = clock.now, False

    @property
    def num_ready(self) -> int:
        read = int((self.clock.now - self.started) / self.block_s) if self.block_s else self.num_blocks
        return min(self.num_blocks, self.num_warm + read)

    @property
    def is_reading(self) -> bool:
        return self.num_ready < self.num_blocks

    def wait(self, timeout_s: float) -> bool:
        self.clock.now += timeout_s
        return not self.is_reading

    def cut(self, num_blocks: int) -> None:
        self.num_blocks = min(self.num_blocks, num_blocks)

    def release(self) -> None:
        self.released = True


class Store:
    """Lends out the reservation that a test has made."""

    block_size = 256
    reserved: Reserved | None = None

    def keys(self) -> Any:
        return SequenceOfKeys()

    def wait_for_costs(self) -> bool:
        return True

    def keep_costs(self, costs: Any) -> None:
        """This store has no place for them."""

    def reserve(self, keys: Any, start: int) -> Reserved:
        assert self.reserved is not None
        self.start = start
        return self.reserved

    def load(self, reservation: Any, targets: Any) -> list[list[int]]:
        return list(targets.pages)


class SequenceOfKeys(list[int]):
    num_tokens = 0

    def extend(self, tokens: Any) -> None:
        super().extend(range(len(self), len(self) + len(tokens) // 256))
        self.num_tokens += len(tokens)


class Sequence:
    """A waiting sequence of ten blocks."""

    seq_id = 1
    num_blocks = 10
    num_tokens = 10 * 256
    token_ids: ClassVar[list[int]] = list(range(2560))
    block_table: ClassVar[list[int]] = list(range(50, 60))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def planner(store: Any, clock: Clock) -> LoadPlanner:
    return LoadPlanner(store, memory=None, keys=SequenceKeys(store), clock=clock)  # type: ignore[arg-type]


def test_blocks_behind_the_engines_own_are_loaded_into_its_table(
    planner: LoadPlanner, store: Store, clock: Clock
) -> None:
    store.reserved = Reserved(clock, 6)
    seq = Sequence()
    assert planner.promise(seq, 3, may_wait=True) == 9
    assert store.start == 3
    assert planner.load(seq, 3, 9) == ([[53], [54], [55], [56], [57], [58]], [53, 54, 55, 56, 57, 58])


def test_blocks_that_the_engine_has_got_meanwhile_are_left_out(
    planner: LoadPlanner, store: Store, clock: Clock
) -> None:
    store.reserved = Reserved(clock, 6)
    seq = Sequence()
    assert planner.promise(seq, 3, may_wait=True) == 9
    assert planner.promise(seq, 5, may_wait=True) == 9
    assert planner.load(seq, 5, 9)[1] == [-1, -1, 55, 56, 57, 58]


def test_blocks_that_the_engine_has_lost_meanwhile_are_reserved_anew(
    planner: LoadPlanner, store: Store, clock: Clock
) -> None:
    store.reserved = first = Reserved(clock, 6)
    seq = Sequence()
    planner.promise(seq, 3, may_wait=True)
    store.reserved = Reserved(clock, 8)
    assert planner.promise(seq, 1, may_wait=True) == 9
    assert first.released and store.start == 1


def test_while_others_are_decoded_a_sequence_waits_in_the_queue(
    planner: LoadPlanner, store: Store, clock: Clock
) -> None:
    store.reserved = Reserved(clock, 6, block_s=1.0)
    seq = Sequence()
    assert planner.promise(seq, 3, may_wait=False) is None
    assert planner.is_reading(seq)
    clock.now = 6.5
    assert not planner.is_reading(seq)
    assert planner.promise(seq, 3, may_wait=False) == 9


def test_a_slow_disk_is_left_when_computing_the_rest_takes_less(
    planner: LoadPlanner, store: Store, clock: Clock
) -> None:
    planner.record_compute(6 * 256, 6.0)
    store.reserved = Reserved(clock, 6, num_warm=1, block_s=1.1)
    assert planner.promise(Sequence(), 3, may_wait=True) == 3 + 1 + 1  # one was warm, one has been read
    assert clock.now < 3.0


def test_after_a_slow_load_the_next_is_not_tried(planner: LoadPlanner, store: Store, clock: Clock) -> None:
    planner.record_compute(6 * 256, 6.0)
    for expected in (3, 3):
        started = clock.now
        store.reserved = Reserved(clock, 6, block_s=100.0)
        assert planner.promise(Sequence(), 3, may_wait=True) == expected
        waited = clock.now - started
    assert waited == 0.0


def test_a_fast_disk_is_waited_for(planner: LoadPlanner, store: Store, clock: Clock) -> None:
    planner.record_compute(6 * 256, 6.0)
    store.reserved = Reserved(clock, 6, block_s=0.1)
    assert planner.promise(Sequence(), 3, may_wait=True) == 9


def test_nothing_in_the_store_promises_the_engines_own(planner: LoadPlanner, store: Store, clock: Clock) -> None:
    store.reserved = found = Reserved(clock, 0)
    assert planner.promise(Sequence(), 3, may_wait=True) == 3
    assert found.released


def test_computing_is_chosen_while_blocks_of_the_store_are_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=1, head_dim=8, dtype="bfloat16")
    config = BlockStoreConfig(cold_path=tmp_path, warm_bytes=64 * layout.block_bytes, min_free_bytes=0)
    namespace, tokens = Namespace(weights="w", layout=layout), list(range(44))
    with BlockStore(config, namespace=namespace) as store:
        store.save(store.keys(tokens), Buffers([bytearray(layout.block_bytes)] * 11))
    with BlockStore(config, namespace=namespace) as store:
        may_read = threading.Event()
        stored: Any = store._tiers._loader._stored  # type: ignore[attr-defined]
        read = stored.read_many_into
        monkeypatch.setattr(stored, "read_many_into", lambda *a, **k: (may_read.wait(5), read(*a, **k))[1])
        found: Any = SimpleNamespace(of=lambda _, count: store.keys(tokens)[:count])
        planner = LoadPlanner(store, memory=None, keys=found)  # type: ignore[arg-type]
        planner.record_compute(40, 0.001)
        for origin in Origin:
            planner._choice.record_load(10, origin=origin, seconds=9.0)
        seq = SimpleNamespace(seq_id=1, num_blocks=11, num_tokens=44)
        try:
            assert planner.promise(seq, 0, may_wait=False) == 0
        finally:
            may_read.set()


# --- When it is saved ------------------------------------------------------------------------------------------


class Saved:
    def __init__(self, num_saved: int = 0, num_skipped: int = 0) -> None:
        self.num_saved, self.num_skipped = num_saved, num_skipped
        self.waits = 0
        self.done = False

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waits += 1


class SavingStore(Store):
    def __init__(self) -> None:
        self.room = 100
        self.saved: list[tuple[int, list[int]]] = []
        self.saves: list[Saved] = []
        self.touched: list[int] = []

    def save(self, keys: Any, sources: Any, *, start: int) -> Saved:
        assert len(keys) == start + len(sources.pages)
        pages = [page for (page,) in sources.pages]
        num_saved = min(len(pages), self.room)
        self.room -= num_saved
        self.saved.append((start, pages[:num_saved]))
        self.saves.append(Saved(num_saved, len(pages) - num_saved))
        return self.saves[-1]

    def touch(self, keys: Any) -> None:
        self.touched.append(len(keys))


@pytest.fixture
def saving() -> SavingStore:
    return SavingStore()


@pytest.fixture
def queue(saving: Any) -> SaveQueue:
    return SaveQueue(saving, memory=None, keys=SequenceKeys(saving), idle_stream=nullcontext)  # type: ignore[arg-type]


def test_new_blocks_are_saved_a_few_at_a_time_and_in_order(queue: SaveQueue, saving: SavingStore) -> None:
    one, other = Sequence(), Sequence()
    queue.add(one, 2, [52, 53, 54])
    queue.add(other, 0, [60])
    queue.save(2)
    assert saving.saved == [(2, [52, 53])]
    assert queue.num_pending == 2
    queue.save(2)
    assert saving.saved[1:] == [(4, [54]), (0, [60])]


def test_blocks_without_room_stay_pending_so_that_no_gap_arises(queue: SaveQueue, saving: SavingStore) -> None:
    saving.room = 2
    queue.add(Sequence(), 0, [50, 51, 52])
    queue.add(Sequence(), 0, [60])
    queue.save(4)
    assert saving.saved == [(0, [50, 51]), (2, [])]
    assert queue.num_pending == 2
    saving.room = 9
    queue.save(4)
    assert saving.saved[2:] == [(2, [52]), (0, [60])]


def test_a_block_is_saved_before_it_is_overwritten_and_its_copy_is_waited_for(
    queue: SaveQueue, saving: SavingStore
) -> None:
    queue.add(Sequence(), 0, [50, 51])
    queue.release(51)
    assert saving.saved == [(0, [50, 51])]
    assert saving.saves[0].waits == 1
    queue.release(52)  # never saved
    saving.saves[0].done = True
    queue.release(50)
    assert saving.saves[0].waits == 1


def test_the_engines_own_hits_are_touched_in_the_store(queue: SaveQueue, saving: SavingStore) -> None:
    queue.add_used(Sequence(), 4)
    assert saving.touched == []
    queue.save(1)
    assert saving.touched == [4]
