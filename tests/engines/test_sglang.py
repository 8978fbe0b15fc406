"""tierkv as a storage backend of SGLang's HiCache: its real factory, host pools and cache controller, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cold_blocks import damage_record

from tierkv import ColdStore, ConfigError

torch = pytest.importorskip("torch")
try:
    import sglang_on_cpu as on_cpu
    from sglang_on_cpu import PAGE, Controller, mha_pool, mla_pool, open_backend, page_keys, page_of
except ImportError as exc:
    pytest.skip(f"SGLang cannot be imported: {exc}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = page_keys(range(5 * PAGE))
FIRST, OTHER = torch.arange(5 * PAGE), torch.arange(8 * PAGE, 13 * PAGE)
MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
POOLS = [
    *((mha_pool, layout, {}) for layout in MHA_LAYOUTS),
    *((mha_pool, layout, {"v_dim": 16}) for layout in ("page_first", "page_first_direct")),
    *((mla_pool, layout, {}) for layout in ("layer_first", "page_first", "page_first_direct")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sglang") / "model"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def store_pages(folder: Path, pool: Any, keys: list[str] = KEYS, indices: Any = FIRST, **changes: Any) -> None:
    backend = open_backend(folder, pool, **changes)
    assert backend.batch_set_v1(keys, indices) == [True] * len(keys)
    backend.close()


def damage(folder: Path, pool: Any, at: int) -> None:
    backend = open_backend(folder, pool)
    (key,) = backend._keys(backend._rows, [KEYS[at]])
    backend.close()
    with ColdStore(folder) as cold:
        damage_record(cold, key.block_hash, offset=400)


@pytest.mark.parametrize(("make", "layout", "options"), POOLS)
def test_pages_come_back_to_other_places_after_a_restart(
    tmp_path: Path, make: Any, layout: str, options: dict[str, Any]
) -> None:
    pool, other = make(layout, seed=1, **options), make(layout, seed=2, **options)
    before = {page: page_of(other, page) for page in range(20)}
    backend = open_backend(tmp_path, pool)
    assert backend.batch_exists(KEYS) == 0 and not backend.exists(KEYS[0])
    assert backend.batch_get_v1(KEYS, FIRST) == [False] * 5
    assert backend.batch_set_v1(KEYS, FIRST) == [True] * 5
    assert backend.batch_exists(KEYS) == 5 and backend.exists(KEYS[4])
    backend.close()
    backend = open_backend(tmp_path, other)
    assert backend.batch_exists(KEYS) == 5
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    assert backend._rows.counts.loaded == 5
    backend.close()
    for page in range(20):
        expected = page_of(pool, page - 8) if 8 <= page < 13 else before[page]
        assert page_of(other, page) == expected, page


@pytest.mark.parametrize(
    ("make", "layout"), [(mha_pool, layout) for layout in MHA_LAYOUTS] + [(mla_pool, "layer_first")]
)
def test_flat_pages_and_pages_in_place_are_the_same_bytes(tmp_path: Path, make: Any, layout: str) -> None:
    pool, other = make(layout, seed=1), make(layout, seed=2)
    flat = [pool.get_data_page(i * PAGE) for i in range(5)]
    backend = open_backend(tmp_path, pool, interface_v1=0)
    assert backend.batch_set(KEYS[:2], flat[:2]) and backend.set(KEYS[2], flat[2])
    assert backend.batch_set_v1(KEYS[3:], FIRST[3 * PAGE :]) == [True] * 2
    found = backend.batch_get(KEYS, [other.get_dummy_flat_data_page() for _ in KEYS])
    assert all(torch.equal(page, right) for page, right in zip(found, flat, strict=True))
    assert torch.equal(backend.get(KEYS[1], other.get_dummy_flat_data_page()), flat[1])
    assert torch.equal(backend.get(KEYS[4]), flat[4]), "without a place for it"
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    backend.close()
    backend = open_backend(tmp_path, other)
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    for i in range(5):
        assert torch.equal(other.get_data_page((8 + i) * PAGE), flat[i])
        other.set_from_flat_data_page(i * PAGE, backend.get(KEYS[i]))
        assert page_of(other, i) == page_of(pool, i)
    backend.close()


def test_a_batch_is_there_up_to_its_first_gap(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    backend = open_backend(tmp_path, pool)
    backend.batch_set_v1(KEYS[:2], FIRST[: 2 * PAGE])
    backend.batch_set_v1(KEYS[3:4], FIRST[3 * PAGE : 4 * PAGE])
    assert backend.batch_exists(KEYS) == 2
    assert backend.batch_get_v1(KEYS, OTHER) == [True, True, False, False, False]
    assert backend.batch_exists([KEYS[0], "00" * 32, *KEYS[1:]]) == 1
    assert backend.batch_exists([]) == 0 and backend.batch_get_v1([], OTHER[:0]) == []
    assert [page is not None for page in backend.batch_get(KEYS)] == [True, True, False, False, False]
    backend.close()


def test_a_damaged_page_is_a_miss_until_it_is_stored_again(tmp_path: Path) -> None:
    pool, other = mha_pool("page_first", seed=1), mha_pool("page_first", seed=2)
    store_pages(tmp_path, pool)
    damage(tmp_path, pool, 2)
    backend = open_backend(tmp_path, other)
    before = page_of(other, 10)
    assert backend.batch_get_v1(KEYS, OTHER) == [True, True, False, False, False]
    assert page_of(other, 10) == before, "bytes that were not verified"
    assert backend.batch_exists(KEYS) == 2
    backend.close()
    backend = open_backend(tmp_path, pool)
    assert backend.get(KEYS[2]) is None
    assert backend.batch_set_v1(KEYS, FIRST) == [True] * 5
    assert backend.batch_exists(KEYS) == 5
    backend.close()
    backend = open_backend(tmp_path, other)
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    assert page_of(other, 10) == page_of(pool, 2)
    backend.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "weights-b"},
        {"engine": "other pages"},
        {"adapters": "an adapter"},
        {"tp_rank": 1, "tp_size": 2},
        {"tp_size": 2},
        {"pp_size": 2},
        {"attn_cp_size": 2},
    ],
)
def test_another_identity_finds_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    pool = mha_pool("page_first")
    store_pages(tmp_path, pool)
    backend = open_backend(tmp_path, pool, **changes)
    assert backend.batch_exists(KEYS) == 0 and backend.batch_get_v1(KEYS, OTHER) == [False] * 5
    backend.close()
    backend = open_backend(tmp_path, pool, model_name="another name of the same model")
    assert backend.batch_exists(KEYS) == 5
    backend.close()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: mha_pool("page_first_direct"), "layout"),
        (lambda: mha_pool("page_first", dtype=torch.float16), "dtype"),
        (lambda: mha_pool("page_first", page=8), "page size"),
        (lambda: mha_pool("page_first", v_dim=16), "shape"),
        (lambda: mla_pool("page_first"), "attention"),
    ],
)
def test_pages_of_another_pool_are_not_found(tmp_path: Path, other: Any, reason: str) -> None:
    store_pages(tmp_path, mha_pool("page_first"))
    backend = open_backend(tmp_path, other())
    assert backend.batch_exists(KEYS) == 0, reason
    backend.close()


def test_each_rank_has_its_own_pages(tmp_path: Path) -> None:
    pools = [mha_pool("page_first", seed=rank) for rank in range(2)]
    store_pages(tmp_path, pools[0], tp_rank=0, tp_size=2)
    backend = open_backend(tmp_path, pools[1], tp_rank=1, tp_size=2)
    assert backend.batch_exists(KEYS) == 0, "SGLang takes the minimum over the ranks"
    assert backend.batch_set_v1(KEYS[:3], FIRST[: 3 * PAGE]) == [True] * 3
    backend.close()
    for rank, expected in ((0, 5), (1, 3)):
        target = mha_pool("page_first", seed=9)
        backend = open_backend(tmp_path, target, tp_rank=rank, tp_size=2)
        assert backend.batch_exists(KEYS) == expected
        assert backend.batch_get_v1(KEYS, OTHER) == [i < expected for i in range(5)]
        assert page_of(target, 8) == page_of(pools[rank], 0)
        backend.close()


RANK = """
import sys
from pathlib import Path
import torch
from sglang_on_cpu import PAGE, mha_pool, open_backend, page_keys, page_of
folder, rank, life = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
keys, pool, target = page_keys(range(16 * PAGE)), mha_pool("page_first", seed=rank), mha_pool("page_first", seed=9)
backend = open_backend(folder, pool if life == "first" else target, tp_rank=rank, tp_size=2)
if life == "first":
    assert backend.batch_exists(keys) == 0
    for at in range(0, 16, 2):
        assert backend.batch_set_v1(keys[at : at + 2], torch.arange(at * PAGE, (at + 2) * PAGE)) == [True] * 2
else:
    assert backend.batch_exists(keys) == 16
    assert backend.batch_get_v1(keys, torch.arange(16 * PAGE, 32 * PAGE)) == [True] * 16
    assert [page_of(target, 16 + i) for i in range(16)] == [page_of(pool, i) for i in range(16)]
backend.close()
"""


def test_ranks_in_processes_of_their_own_share_a_store(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent), *sys.path])}
    for life in ("first", "second"):
        command = [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "store")]
        ranks = [
            subprocess.Popen([*command, str(rank), life], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors[-3000:]


def test_ranks_of_multi_latent_attention_share_what_one_of_them_writes(tmp_path: Path) -> None:
    writer, reader = mla_pool("page_first", seed=1), mla_pool("page_first", seed=2)
    mla = {"is_mla_model": True, "tp_size": 2}
    backend = open_backend(tmp_path, reader, tp_rank=1, **mla)
    assert backend.batch_set_v1(KEYS, FIRST) == [True] * 5 and backend.batch_exists(KEYS) == 0
    assert backend.set(KEYS[0], reader.get_data_page(0)) and backend.batch_exists(KEYS) == 0
    backend.close()
    store_pages(tmp_path, writer, tp_rank=0, **mla)
    backend = open_backend(tmp_path, reader, tp_rank=1, **mla)
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    assert [page_of(reader, 8 + i) for i in range(5)] == [page_of(writer, i) for i in range(5)]
    backend.close()


def test_a_full_disk_is_misses(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    backend = open_backend(tmp_path, pool, min_free_bytes=1 << 60)
    assert len(backend.batch_set_v1(KEYS, FIRST)) == 5
    backend.close()
    backend = open_backend(tmp_path, pool)
    assert backend.batch_exists(KEYS) == 0 and backend.batch_get_v1(KEYS, OTHER) == [False] * 5
    backend.close()


def test_a_closed_backend_has_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    backend = open_backend(tmp_path, pool)
    backend.batch_set_v1(KEYS, FIRST)
    for close in (backend._rows.close, backend.close, backend.close):  # the store alone, then all of it
        close()
        assert backend.batch_exists(KEYS) == 0 and backend.batch_get_v1(KEYS, OTHER) == [False] * 5
        assert backend.batch_set_v1(KEYS, FIRST) == [False] * 5
        assert backend.get(KEYS[0]) is None and not backend.set(KEYS[0], pool.get_data_page(0))
    assert not backend.clear()


def test_clear_forgets_this_ranks_pages(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    store_pages(tmp_path, pool, weights="weights-b")
    backend = open_backend(tmp_path, pool)
    backend.batch_set_v1(KEYS, FIRST)
    assert backend.clear() and backend.batch_exists(KEYS) == 0
    backend.close()
    backend = open_backend(tmp_path, pool, weights="weights-b")
    assert backend.batch_exists(KEYS) == 5
    backend.close()


def test_a_flush_of_sglangs_cache_ends_the_use_of_the_store_unless_the_weights_are_fixed(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    store_pages(tmp_path, pool)
    backend = open_backend(tmp_path, pool)
    pool.clear()  # before the first use: SGLang does so when it starts
    assert backend.batch_exists(KEYS) == 5
    pool.clear()
    assert backend.batch_exists(KEYS) == 0 and backend.batch_get_v1(KEYS, OTHER) == [False] * 5
    assert backend.batch_set_v1(KEYS, FIRST) == [False] * 5
    backend.close()
    backend = open_backend(tmp_path, pool, weights_are_fixed=True)
    assert backend.batch_exists(KEYS) == 5
    pool.clear()
    assert backend.batch_get_v1(KEYS, OTHER) == [True] * 5
    backend.close()


def test_indices_that_are_no_whole_pages_are_misses(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    backend = open_backend(tmp_path, pool)
    for indices in (FIRST + 1, FIRST[:-1], FIRST[:PAGE], FIRST + pool.page_num * PAGE, FIRST - PAGE):
        assert backend.batch_set_v1(KEYS, indices) == [False] * 5
        assert backend.batch_get_v1(KEYS, indices) == [False] * 5
    assert backend.batch_exists(KEYS) == 0
    backend.close()


def test_what_is_no_digest_or_no_page_is_a_miss(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    backend = open_backend(tmp_path, pool)
    assert backend.batch_exists(["no hex", *KEYS]) == 0 and backend.batch_exists(["00" * 16]) == 0
    assert backend.batch_set_v1([*KEYS[:2], "no hex"], FIRST[: 3 * PAGE]) == [True, True, False]
    assert not backend.set(KEYS[3], torch.zeros(3)) and not backend.set(KEYS[3], None)
    assert backend.get(KEYS[0], torch.zeros(3)) is None
    backend.close()


def test_backup_and_prefetch_threads_never_get_another_pages_bytes(tmp_path: Path) -> None:
    source = mha_pool("page_first_direct", seed=1)
    target = mha_pool("page_first_direct", seed=2)
    keys = page_keys(range(16 * PAGE))
    backend = open_backend(tmp_path, source, warm_bytes=0, weights_are_fixed=True)
    views = on_cpu.buffers_of(target)
    memory = backend._rows.store.register([views])
    stop = threading.Event()

    def back_up() -> int:
        num_saved = 0
        while not stop.is_set():
            # Not all of them where the readers hold the whole warm memory at that moment.
            num_saved += sum(backend.batch_set_v1(keys, torch.arange(16 * PAGE)))
            stop.wait(0.01)  # else the readers might find nothing, however often they look
            backend.clear()
        return num_saved

    def prefetch(first: int) -> int:
        from tierkv import Strided

        right = 0
        for _ in range(60):
            known = backend._keys(backend._rows, keys)
            came = backend._rows.load(known, lambda at, end: Strided(memory, [[first + i] for i in range(at, end)]))
            for i, is_here in enumerate(came):
                assert not is_here or page_of(target, first + i) == page_of(source, i)
            right += sum(came)
        return right

    with ThreadPoolExecutor(3) as threads:
        writing = threads.submit(back_up)
        reading = [threads.submit(prefetch, first) for first in (0, 16)]
        right = [each.result() for each in reading]
        stop.set()
        num_saved = writing.result()
    assert sum(right) and num_saved
    assert set(backend._rows.store.stats().skip_reasons) <= {"no_room"}
    backend.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "path is missing"),
        ({"weights": None}, "weights have no digest"),
        ({"colour": "red"}, "unknown options: colour"),
        ({"codec": "lossy-int8"}, "lossy"),
        ({"weights_are_fixed": 1}, "weights_are_fixed"),
    ],
)
def test_a_backend_that_cannot_name_its_pages_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend(tmp_path, mha_pool("page_first"), **changes)


def test_a_pool_that_is_not_plain_k_and_v_is_refused(tmp_path: Path) -> None:
    pool = mha_pool("page_first")
    pool.layout = "page_unified"
    with pytest.raises(ConfigError, match="'page_unified' of SGLang's host pool is not supported"):
        open_backend(tmp_path, pool)
    pool = mha_pool("page_first")
    pool.target_layer_num = on_cpu.LAYERS - 1
    with pytest.raises(ConfigError, match="draft model"):
        open_backend(tmp_path, pool)
    pool = mha_pool("page_first")
    pool.get_page_buffer_meta = lambda indices: ([pool.kv_buffer.data_ptr()], [64])  # of a later SGLang, say
    with pytest.raises(ConfigError, match="other buffers than K and V"):
        open_backend(tmp_path, pool)
    pool = mha_pool("page_first", dtype=torch.uint8)
    with pytest.raises(ConfigError, match="give the option kv_dtype"):
        open_backend(tmp_path, pool)
    store_pages(tmp_path, pool, kv_dtype="fp8_e4m3")
    backend = open_backend(tmp_path, pool, kv_dtype="fp8_e5m2")
    assert backend.batch_exists(KEYS) == 0
    with pytest.raises(ConfigError, match="host pool swa beside K and V"):
        backend.register_mem_host_pool_v2(pool, "swa")
    backend.close()


def test_without_a_server_the_identity_must_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context._CONTEXT, "_server_args", None)
    with pytest.raises(ConfigError, match="what decides K and V cannot be had from SGLang"):
        open_backend(tmp_path, mha_pool("page_first"), engine=None)


def test_the_cache_controller_backs_up_and_prefetches_across_a_restart(tmp_path: Path, model: Path) -> None:
    tokens = list(range(100, 100 + 6 * PAGE))
    on_cpu.publish_server(model)
    source, target = mha_pool("page_first", seed=1), mha_pool("page_first", seed=2)
    own = {"engine": None, "weights": None}  # the identity is taken from the server's settings and the model's folder
    with Controller(tmp_path, source, **own) as controller:
        assert controller.back_up(tokens) == len(tokens)
    with Controller(tmp_path, target, **own) as controller:
        assert controller.prefetch(tokens + [1] * PAGE, first_page=8) == (len(tokens), len(tokens))
        assert [page_of(target, 8 + i) for i in range(6)] == [page_of(source, i) for i in range(6)]
        assert controller.prefetch([5, *tokens], first_page=8) == (0, 0)
    on_cpu.publish_server(model, json_model_override_args='{"rope_theta": 5000}')
    with Controller(tmp_path, target, **own) as controller:
        assert controller.prefetch(tokens) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"load_format": "dummy"}, {}, "load_format 'dummy'"),
        ({"lora_paths": ["a=/nowhere"], "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}, {}, "LoRA is enabled"),
    ],
)
def test_a_server_whose_pages_cannot_be_named_is_refused(
    tmp_path: Path, model: Path, arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    on_cpu.publish_server(model, **arguments)
    with pytest.raises(ConfigError, match=message):
        open_backend(tmp_path, mha_pool("page_first"), engine=None, weights=None, **changes)
