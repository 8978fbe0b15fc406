"""The namespace of vLLM's blocks: each field that decides K and V, changed alone, finds nothing. Needs no vLLM."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.placement import Buffers
from tierkv.block_store.store import BlockStore
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.integrations.vllm.identity import Identity, identity_of, refuse_unsupported
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.pages import EnginePages
from tierkv.values.layout import BlockLayout

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=64, kv_heads=2, head_dim=32, dtype="float32")
TOKENS = list(range(100, 100 + 3 * 64))

BASE = Identity(
    weights="digest of the files",
    settings="digest of the configuration",
    config={"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    engine_version="0.32.0",
    model_dtype="torch.float32",
    quantization="None",
    cache_dtype="fp8",
    scales=[[1.0, 1.0], [1.0, 1.0]],
    max_model_len=None,
    attention=["vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"],
    device="cuda",
    pages={"page_tokens": 32, "pages": [[[2, 32, 64], [1, 2, 3]]] * 2, "layers": {"layers.0": 0, "layers.1": 1}},
    layout=LAYOUT,
    tp_rank=0,
    tp_size=2,
)

CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weights": "digest of other files"},
    "settings": {"settings": "another digest"},
    "rope": {"config": {**BASE.config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
    "architecture": {"config": {**BASE.config, "architectures": ["MistralForCausalLM"]}},
    "version of vLLM": {"engine_version": "0.33.0"},
    "model dtype": {"model_dtype": "torch.bfloat16"},
    "quantization": {"quantization": "fp8"},
    "KV dtype": {"cache_dtype": "fp8_e5m2"},
    "KV scales": {"scales": [[1.0, 1.0], [1.0, 2.0]]},
    "longest context": {"max_model_len": 8192},
    "attention backend": {"attention": ["vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"]},
    "device": {"device": "cpu x86_64 AVX512 amx=False"},
    "order of a page": {"pages": {**BASE.pages, "pages": [[[2, 32, 64], [2, 1, 3]]] * 2}},
    "tokens of a page": {"pages": {**BASE.pages, "page_tokens": 16}},
    "order of the layers": {"pages": {**BASE.pages, "layers": {"layers.1": 0, "layers.0": 1}}},
    "dtype of the bytes": {"layout": dataclasses.replace(LAYOUT, dtype="bfloat16")},
    "block size": {"layout": dataclasses.replace(LAYOUT, block_size=32)},
    "heads": {"layout": BlockLayout.uniform(num_layers=2, block_size=64, kv_heads=4, head_dim=16, dtype="float32")},
    "layers": {"layout": BlockLayout.uniform(num_layers=4, block_size=64, kv_heads=1, head_dim=32, dtype="float32")},
    "rank": {"tp_rank": 1},
    "ranks": {"tp_size": 4},
}


@pytest.fixture(scope="module")
def cold_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three blocks of BASE."""
    path = tmp_path_factory.mktemp("store")
    with open_store(path, BASE) as store:
        keys = store.keys(TOKENS)
        store.save(keys, Buffers([bytes(LAYOUT.block_bytes)] * 3))
        store.flush()
    return path


def open_store(path: Path, identity: Identity) -> BlockStore:
    return BlockStore(BlockStoreConfig(cold_path=path, warm_bytes=1 << 20), namespace=identity.namespace())


def test_the_same_identity_finds_its_blocks_whatever_the_model_is_called(cold_path: Path) -> None:
    with open_store(cold_path, dataclasses.replace(BASE, name="/another/folder")) as store:
        assert store.contains(store.keys(TOKENS)) == 3


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_field_changed_alone_finds_nothing(cold_path: Path, change: dict[str, Any]) -> None:
    with open_store(cold_path, dataclasses.replace(BASE, **change)) as store:
        assert store.contains(store.keys(TOKENS)) == 0


def test_the_table_has_every_field_of_the_identity() -> None:
    changed = {name for change in CHANGES.values() for name in change}
    assert changed == {field.name for field in dataclasses.fields(Identity)} - {"name"}


# --- what is read from vLLM's configuration


class FakeBackend:
    pass


class FakeLayer:
    _k_scale_float = 1.0
    _v_scale_float = 0.5

    def get_attn_backend(self) -> type:
        return FakeBackend


class FakeHfConfig:
    def __init__(self, **fields: Any) -> None:
        self.fields = {"model_type": "llama", "_name_or_path": "somewhere", "dtype": torch.float32, **fields}

    def to_dict(self) -> dict[str, Any]:
        return self.fields


def spec_of(name: str, **fields: Any) -> Any:
    return type(name, (), fields)()


def config_of(folder: Path, **changes: Any) -> Any:
    """A configuration as vLLM's, changed at dotted paths."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            hf_config=FakeHfConfig(),
            dtype=torch.float32,
            quantization=None,
            max_model_len=4096,
            use_mla=False,
            get_total_num_kv_heads=lambda: 8,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=32),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={"a": FakeLayer(), "b": FakeLayer()}),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return config


def groups_of(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def read(config: Any, **fields: Any) -> bytes:
    pages = {"page_tokens": 32, "pages": [], "layers": {"a": 0, "b": 1}}
    arguments: dict[str, Any] = {"version": "0.32.0", "pages": pages, "layout": LAYOUT, "device": "cuda", "tp_rank": 0}
    return identity_of(config, **{**arguments, "weights": "", **fields}).namespace().digest


def test_the_model_folder_may_move_but_its_files_may_not_change(folder: Path, tmp_path_factory: Any) -> None:
    moved = tmp_path_factory.mktemp("moved")
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert read(config_of(folder)) == read(config_of(moved))
    (moved / "model.safetensors").write_bytes(b"weightt")
    assert read(config_of(folder)) != read(config_of(moved))


@pytest.mark.parametrize(
    "change",
    [
        {"model_config__hf_config": FakeHfConfig(rope_theta=5e5)},
        {"model_config__dtype": torch.bfloat16},
        {"model_config__quantization": "fp8"},
        {"cache_config__cache_dtype": "bfloat16"},
        {"parallel_config__tensor_parallel_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_vllms_configuration_counts(folder: Path, change: dict[str, Any]) -> None:
    assert read(config_of(folder, **change)) != read(config_of(folder))


@pytest.mark.parametrize(
    ("num_heads", "use_mla", "num_ranks", "slices"),
    [
        (8, False, 4, [0, 1, 2, 3]),
        (2, False, 4, [0, 0, 1, 1]),  # each head on two ranks
        (1, False, 4, [0, 0, 0, 0]),
        (128, True, 4, [0, 0, 0, 0]),  # every rank has the whole latent
    ],
)
def test_ranks_with_the_same_slice_of_k_and_v_share_their_blocks(
    folder: Path, num_heads: int, use_mla: bool, num_ranks: int, slices: list[int]
) -> None:
    config = config_of(
        folder,
        model_config__use_mla=use_mla,
        model_config__get_total_num_kv_heads=lambda: num_heads,
        parallel_config__tensor_parallel_size=num_ranks,
    )
    digests = [read(config, tp_rank=rank) for rank in range(num_ranks)]
    assert [digests.index(digest) for digest in digests] == [slices.index(each) for each in slices]
    assert read(config_of(folder)) not in digests


def test_a_model_of_the_hub_is_looked_up_where_vllm_has_downloaded_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["cache_dir"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    here = config_of(folder)
    named = config_of(folder, model_config__model="org/tiny", model_config__revision="v1")
    named.load_config.download_dir = "/data/models"
    assert read(named) == read(here)
    assert asked == [("org/tiny", "v1", "/data/models")]


def test_a_configuration_that_no_two_processes_write_alike_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf_config\.plugin cannot be written down"):
        read(config_of(folder, model_config__hf_config=FakeHfConfig(plugin=object())))


def test_scales_of_an_fp8_cache_count(folder: Path) -> None:
    config = config_of(folder, cache_config__cache_dtype="fp8")
    before = read(config)
    config.compilation_config.static_forward_context["b"]._v_scale_float = 0.25
    assert read(config) != before


def test_the_longest_context_counts_where_rope_depends_on_it(folder: Path) -> None:
    def digest(length: int, rope_type: str) -> bytes:
        rope = FakeHfConfig(rope_scaling={"rope_type": rope_type})
        return read(config_of(folder, model_config__hf_config=rope, model_config__max_model_len=length))

    assert digest(4096, "llama3") == digest(8192, "llama3")
    assert digest(4096, "longrope") != digest(8192, "longrope")


FULL = spec_of("FullAttentionSpec")

REFUSED: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "policy": ({"kv_transfer_config__kv_load_failure_policy": "fail"}, [FULL], "kv_load_failure_policy"),
    "dynamic scales": ({"cache_config__calculate_kv_scales": True}, [FULL], "calculate_kv_scales"),
    "scales in the pages": ({"cache_config__cache_dtype": "fp8_per_token_head"}, [FULL], "fp8_per_token_head"),
    "draft model": ({"speculative_config": SimpleNamespace(method="eagle")}, [FULL], "eagle"),
    "pipeline": ({"parallel_config__pipeline_parallel_size": 2}, [FULL], "pipeline_parallel_size"),
    "random weights": ({"load_config__load_format": "dummy"}, [FULL], "dummy"),
    "two groups": ({}, [FULL, spec_of("SlidingWindowSpec")], "2 KV cache groups"),
    "sliding window": ({}, [spec_of("SlidingWindowSpec")], "SlidingWindowSpec"),
    "Mamba": ({}, [spec_of("MambaSpec")], "MambaSpec"),
    "mixed layers": (
        *({}, [spec_of("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL, "b": spec_of("SinkFullAttentionSpec")})]),
        "SinkFullAttentionSpec",
    ),
    "not causal": ({}, [spec_of("FullAttentionSpec", non_causal=True)], "later tokens"),
}


@pytest.mark.parametrize(("changes", "specs", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_cached_is_refused_with_the_reason(
    folder: Path, changes: dict[str, Any], specs: list[Any], reason: str
) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=reason):
        refuse_unsupported(config_of(folder, **changes), groups_of(*specs), "")


@pytest.mark.parametrize("spec", ["FullAttentionSpec", "MLAAttentionSpec"])
def test_attention_over_the_whole_prefix_is_accepted(folder: Path, spec: str) -> None:
    refuse_unsupported(config_of(folder), groups_of(spec_of(spec)), "")
    ngram = config_of(folder, speculative_config=SimpleNamespace(method="ngram"))
    refuse_unsupported(ngram, groups_of(spec_of("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL})), "")


# --- options


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="warm_byte, x"):
        Options.parse({"x": 1, "path": "/data", "warm_byte": 5})


@pytest.mark.parametrize("extra", [{"warm_bytes": "8G"}, {"block_tokens": 0}, {"codec": "zip"}, {"warm_bytes": 0}])
def test_an_option_that_makes_no_sense_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(extra))):
        Options.parse(extra)


def test_a_block_is_a_multiple_of_the_engines_blocks() -> None:
    tokens: Callable[[int], int] = Options.parse({"block_tokens": 100}).tokens_of_block
    assert [tokens(16), tokens(32), tokens(256)] == [112, 128, 256]


# --- pages


def test_pages_name_layers_that_share_a_tensor_once_and_split_the_engines_blocks() -> None:
    shared, other = torch.zeros(8, 2, 16, 64), torch.zeros(8, 16, 2, 64).transpose(1, 2)
    pages = EnginePages.of(
        {"a": shared, "b": other, "c": shared}, num_engine_blocks=4, engine_block_size=32, block_tokens=64
    )
    assert pages.layer_of == {"a": 0, "b": 1, "c": 0}
    assert (pages.pages_per_engine_block, pages.pages_per_block) == (2, 4)
    assert pages.pages_of([[3, -1]]) == [[6, 7, -1, -1]]
    assert pages.layout.block_bytes == 2 * 64 * 2 * 64 * 4
    assert pages.describe()["pages"] == [[[2, 16, 64], [1, 2, 3]], [[2, 16, 64], [2, 1, 3]]]


def test_pages_of_fp8_bytes_have_their_dtype_and_other_bytes_are_refused() -> None:
    kv = {"a": torch.zeros(4, 1, 32, 64, dtype=torch.uint8)}
    pages = EnginePages.of(kv, num_engine_blocks=4, engine_block_size=32, block_tokens=64, cache_dtype="fp8_e5m2")
    assert pages.layout.dtype == "float8_e5m2"
    with pytest.raises(UnsupportedModelError, match="uint8"):
        EnginePages.of(kv, num_engine_blocks=4, engine_block_size=32, block_tokens=64)
