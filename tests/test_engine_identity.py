"""The namespaces of vLLM's chunks and SGLang's pages: each field changed alone finds nothing. Runs without the engines.

The engines' own configurations are stand-ins here; tests/engines has the real ones.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace as Values
from typing import Any, NamedTuple

import numpy as np
import pytest

from tierkv import Buffers, ConfigError, Namespace
from tierkv.integrations.rows import DigestRows, store_config
from tierkv.integrations.sglang import identity as sglang_identity
from tierkv.integrations.vllm import tier_identity as vllm_identity

ROW = 64 * 64
DIGESTS = [sha256(bytes([i])).digest() for i in range(4)]


def hits(path: Path, namespace: Namespace, *, save: bool = False) -> int:
    """Return how many of the rows a store has for a namespace; save them first if asked to."""
    options = {"path": str(path), "warm_bytes": 32 * namespace.layout.block_bytes, "min_free_bytes": 0}
    rows = DigestRows(store_config(options, row_bytes=namespace.layout.block_bytes), namespace)
    keys = [rows.key(digest) for digest in DIGESTS]
    content = [np.full(rows.row_bytes, i, dtype=np.uint8) for i in range(len(keys))]
    if save:
        assert all(rows.save(keys, lambda at, end: Buffers(content[at:end])))
    found = sum(rows.found(keys))
    assert sum(rows.load(keys, lambda at, end: Buffers([np.empty_like(each) for each in content[at:end]]))) == found
    rows.close()
    return found


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Return a function that sets one field, named by a dotted path, of a value."""

    def apply(target: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            target = target[parent] if isinstance(target, dict) else getattr(target, parent)
        if isinstance(target, dict):
            target[name] = value
        else:
            setattr(target, name, value)

    return apply


# --- vLLM ------------------------------------------------------------------------------------------------


class Dtype(enum.Enum):
    BF16 = "torch.bfloat16"
    F16 = "torch.float16"


@dataclass
class ModelConfig:
    model: str
    revision: str | None = None
    hf_config: Any = None
    dtype: Any = Dtype.BF16
    quantization: str | None = None
    max_model_len: int = 4096
    seed: int = 0
    served_model_name: str = "tiny"
    field_of_a_later_version: Any = None


class HfConfig(Values):
    def to_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass
class CacheConfig:
    cache_dtype: str = "auto"
    block_size: int = 16
    kv_cache_dtype_skip_layers: list[str] = field(default_factory=list)
    mamba_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    calculate_kv_scales: bool = False
    prefix_caching_hash_algo: str = "sha256"


def make_model(folder: Path, weights: bytes = b"weights", config: bytes = b"{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_bytes(config)
    return folder


def vllm_values(folder: Path) -> Any:
    """Return all that the identity of vLLM's chunks is made of."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    hf_config = HfConfig(architectures=["Llama"], rope_parameters=rope, _name_or_path="x", transformers_version="5.0")
    parallel = Values(world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
    return Values(
        vllm=Values(
            model_config=ModelConfig(model=str(folder), hf_config=hf_config),
            cache_config=CacheConfig(),
            load_config=Values(load_format="auto", download_dir=None),
            attention_config=None,
            additional_config={},
            lora_config=None,
            speculative_config=None,
        ),
        config=Values(
            groups=[Values(tokens_per_block=16, layer_names=("l0", "l1"))],
            worker_kv_bytes_per_block=ROW,
            model=Values(name="tiny", dtype="bfloat16"),
            cache=Values(tokens_per_hash=16, blocks_per_chunk=1),
            parallel=parallel,
            replicated_layout=False,
            canonical_layout=False,
            kv_cache_layout="LBHNC",
        ),
        weights=None,
        adapters="",
        version="0.32.0",
        row_bytes=ROW,
    )


def vllm_namespace(values: Any) -> Namespace:
    engine = vllm_identity.engine_fields(values.vllm, weights=values.weights, adapters=values.adapters)
    return vllm_identity.chunk_namespace(
        values.config,
        row_bytes=values.row_bytes,
        weights=values.weights or vllm_identity.folder_weights(values.vllm),
        engine=engine,
        version=values.version,
        adapters=values.adapters,
    )


VLLM_FIELDS = {
    "the weights, by an option": change("weights", "another digest"),
    "an adapter": change("adapters", "a digest"),
    "vLLM's version": change("version", "0.33.0"),
    "bytes of a row": change("row_bytes", 2 * ROW),
    "rope": change("vllm.model_config.hf_config.rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    "the architecture": change("vllm.model_config.hf_config.architectures", ["Qwen3"]),
    "the dtype of the model": change("vllm.model_config.dtype", Dtype.F16),
    "quantisation": change("vllm.model_config.quantization", "fp8"),
    "the longest request, which chooses rope's factors": change("vllm.model_config.max_model_len", 8192),
    "a field of a later version": change("vllm.model_config.field_of_a_later_version", {"a": [1]}),
    "the dtype of KV, as asked for": change("vllm.cache_config.cache_dtype", "fp8"),
    "the dtype of KV": change("config.model.dtype", "float16"),
    "layers without a quantised KV": change("vllm.cache_config.kv_cache_dtype_skip_layers", ["0"]),
    "the dtype of states": change("vllm.cache_config.mamba_cache_dtype", "float32"),
    "the attention": change("vllm.attention_config", {"backend": "x"}),
    "a plugin's settings": change("vllm.additional_config", {"x": 1}),
    "how weights are loaded": change("vllm.load_config.load_format", "safetensors"),
    "speculative decoding": change("vllm.speculative_config", Values(method="ngram")),
    "block size": change("config.groups", [Values(tokens_per_block=32, layer_names=("l0", "l1"))]),
    "groups": change("config.groups", [Values(tokens_per_block=16, layer_names=(name,)) for name in ("l0", "l1")]),
    "layers": change("config.groups", [Values(tokens_per_block=16, layer_names=("l1", "l0"))]),
    "bytes of a block": change("config.worker_kv_bytes_per_block", ROW // 2),
    "tokens of a hash": change("config.cache.tokens_per_hash", 8),
    "blocks of a chunk": change("config.cache.blocks_per_chunk", 2),
    "workers": change("config.parallel.world_size", 2),
    "tensor-parallel ranks": change("config.parallel.tp_size", 2),
    "pipeline ranks": change("config.parallel.pp_size", 2),
    "prefill context ranks": change("config.parallel.pcp_size", 2),
    "decode context ranks": change("config.parallel.dcp_size", 2),
    "one copy for all ranks": change("config.replicated_layout", True),
    "the canonical layout": change("config.canonical_layout", True),
    "the layout": change("config.kv_cache_layout", "LBNHC"),
}
VLLM_SAME = {
    "the seed": change("vllm.model_config.seed", 1),
    "the name": change("vllm.model_config.served_model_name", "other"),
    "memory": change("vllm.cache_config.gpu_memory_utilization", 0.5),
    "where the configuration came from": change("vllm.model_config.hf_config._name_or_path", "y"),
    "the version of transformers": change("vllm.model_config.hf_config.transformers_version", "5.1"),
}


def test_a_draft_models_files_are_part_of_vllms_identity(tmp_path: Path) -> None:
    digests = set()
    for number, weights in enumerate((b"one", b"two", b"one")):
        values = vllm_values(make_model(tmp_path / "model"))
        draft = ModelConfig(model=str(make_model(tmp_path / f"draft{number}", weights=weights)))
        values.vllm.speculative_config = Values(method="eagle", draft_model_config=draft)
        digests.add(vllm_namespace(values).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change("vllm.load_config.load_format", "dummy"), "load_format 'dummy'.*weights="),
        (change("vllm.lora_config", Values()), "LoRA is enabled.*adapters="),
        (change("vllm.cache_config.calculate_kv_scales", True), "calculate_kv_scales"),
        (change("vllm.cache_config.prefix_caching_hash_algo", "xxhash"), "can be forged"),
        (change("vllm.model_config.model", "/nowhere"), "is not known.*weights="),
        (change("vllm.model_config.field_of_a_later_version", object()), "cannot be written down"),
        (change("vllm.model_config.field_of_a_later_version", print), "cannot be written down"),
        (change("row_bytes", 100), "100 bytes"),
    ],
)
def test_an_engine_whose_chunks_cannot_be_named_is_refused(tmp_path: Path, apply: Any, message: str) -> None:
    values = vllm_values(make_model(tmp_path / "model"))
    apply(values)
    with pytest.raises(ConfigError, match=message):
        vllm_namespace(values)


def test_options_stand_in_for_what_vllm_cannot_say(tmp_path: Path) -> None:
    values = vllm_values(make_model(tmp_path / "model"))
    values.vllm.load_config.load_format, values.weights = "dummy", "seed 0"
    values.vllm.lora_config, values.adapters = Values(), "adapters of May"
    values.vllm.model_config.model = "/nowhere"
    assert vllm_namespace(values).weights == "seed 0" and vllm_namespace(values).adapter == "adapters of May"


# --- SGLang ----------------------------------------------------------------------------------------------

MODEL_FIELDS = (
    *("model_path", "revision", "download_dir", "dtype", "quantization", "kv_cache_dtype", "load_format"),
    *("json_model_override_args", "model_impl", "context_length", "field_of_a_later_version", "weight_loader_threads"),
)


def sglang_values(folder: Path) -> Any:
    """Return all that the identity of SGLang's pages is made of."""
    return Values(
        settings={
            "model_path": str(folder),
            "load_format": "auto",
            "dtype": "auto",
            "json_model_override_args": "{}",
            "attention_backend": "fa3",
            "quantization_param_path": None,
            "enable_lora": None,
            "port": 30000,
        },
        config=Values(
            tp_rank=0,
            tp_size=2,
            is_mla_model=False,
            model_name="tiny",
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            dcp_rank=0,
            dcp_size=1,
        ),
        pool=Values(
            dtype="torch.bfloat16",
            layout="page_first",
            page_size=64,
            start_layer=0,
            end_layer=2,
            layer_num=2,
            head_num=2,
            head_dim=64,
            v_head_dim=64,
        ),
        weights=None,
        adapters="",
        kv_dtype=None,
        version="0.5.23",
        row_bytes=ROW,
    )


def sglang_namespace(values: Any) -> Namespace:
    engine = sglang_identity.server_fields(
        values.settings, MODEL_FIELDS, weights=values.weights, adapters=values.adapters
    )
    return sglang_identity.page_namespace(
        values.config,
        values.pool,
        row_bytes=values.row_bytes,
        weights=values.weights or sglang_identity.folder_weights(values.settings),
        engine=engine,
        version=values.version,
        adapters=values.adapters,
        kv_dtype=values.kv_dtype,
    )


SGLANG_FIELDS = {
    "the weights, by an option": change("weights", "another digest"),
    "an adapter": change("adapters", "a digest"),
    "SGLang's version": change("version", "0.5.24"),
    "bytes of a page": change("row_bytes", 2 * ROW),
    "rope": change("settings.json_model_override_args", '{"rope_theta": 5000}'),
    "the dtype of the model": change("settings.dtype", "float16"),
    "quantisation": change("settings.quantization", "fp8"),
    "the dtype of KV, as asked for": change("settings.kv_cache_dtype", "fp8_e4m3"),
    "the implementation": change("settings.model_impl", "transformers"),
    "the longest request": change("settings.context_length", 8192),
    "a field of a later version": change("settings.field_of_a_later_version", [1]),
    "the attention": change("settings.attention_backend", "flashinfer"),
    "speculative decoding": change("settings.speculative_algorithm", "NGRAM"),
    "how weights are loaded": change("settings.load_format", "safetensors"),
    "the dtype of KV": change("pool.dtype", "torch.float16"),
    "the dtype of KV, by an option": change("kv_dtype", "fp8_e4m3"),
    "the layout": change("pool.layout", "layer_first"),
    "the page size": change("pool.page_size", 32),
    "the first layer": change("pool.start_layer", 1),
    "the last layer": change("pool.end_layer", 3),
    "layers": change("pool.layer_num", 4),
    "heads": change("pool.head_num", 4),
    "the dim of K": change("pool.head_dim", 32),
    "the dim of V": change("pool.v_head_dim", 32),
    "the kind of attention": change("config.is_mla_model", True),
    "the rank": change("config.tp_rank", 1),
    "ranks": change("config.tp_size", 4),
    "the pipeline rank": change("config.pp_rank", 1),
    "pipeline ranks": change("config.pp_size", 2),
    "the context rank": change("config.attn_cp_rank", 1),
    "context ranks": change("config.attn_cp_size", 2),
    "the decode context rank": change("config.dcp_rank", 1),
    "decode context ranks": change("config.dcp_size", 2),
}
SGLANG_SAME = {
    "the port": change("settings.port", 30001),
    "threads": change("settings.weight_loader_threads", 8),
    "the name": change("config.model_name", "other"),
}


def test_the_scales_of_a_quantised_kv_are_part_of_sglangs_identity(tmp_path: Path) -> None:
    digests = set()
    for number, content in enumerate((None, "1.0", "2.0", "1.0")):
        values = sglang_values(make_model(tmp_path / "model"))
        if content:
            scales = tmp_path / f"scales{number}.json"
            scales.write_text(content)
            values.settings["quantization_param_path"] = str(scales)
        digests.add(sglang_namespace(values).digest)
    assert len(digests) == 3


def test_ranks_of_multi_latent_attention_have_one_namespace(tmp_path: Path) -> None:
    digests = set()
    for rank in range(2):
        values = sglang_values(make_model(tmp_path / "model"))
        values.config.is_mla_model, values.config.tp_rank = True, rank
        digests.add(sglang_namespace(values).digest)
    values.config.tp_size = 4
    digests.add(sglang_namespace(values).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change("settings.load_format", "dummy"), "load_format 'dummy'.*weights="),
        (change("settings.checkpoint_engine_wait_weights_before_ready", True), "checkpoint_engine.*weights="),
        (change("settings.modelopt_checkpoint_restore_path", "/x"), "modelopt.*weights="),
        (change("settings.enable_lora", True), "LoRA is enabled.*adapters="),
        (change("settings.lora_paths", ["/x"]), "LoRA is enabled.*adapters="),
        (change("settings.quantization_param_path", "/nowhere"), "/nowhere cannot be read"),
        (change("settings.model_path", "/nowhere"), "is not known.*weights="),
        (change("settings.field_of_a_later_version", object()), "cannot be written down"),
        (change("pool.dtype", "torch.uint8"), "does not say what K and V are.*kv_dtype"),
    ],
)
def test_a_server_whose_pages_cannot_be_named_is_refused(tmp_path: Path, apply: Any, message: str) -> None:
    values = sglang_values(make_model(tmp_path / "model"))
    apply(values)
    with pytest.raises(ConfigError, match=message):
        sglang_namespace(values)


# --- both ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """values: all that an identity is made of, for a model's folder. fields: changes that count; same: that do not."""

    values: Callable[[Path], Any]
    namespace: Callable[[Any], Namespace]
    fields: dict[str, Callable[[Any], None]]
    same: dict[str, Callable[[Any], None]]


KINDS = {
    "vLLM": Kind(vllm_values, vllm_namespace, VLLM_FIELDS, VLLM_SAME),
    "SGLang": Kind(sglang_values, sglang_namespace, SGLANG_FIELDS, SGLANG_SAME),
}


@pytest.mark.parametrize(
    ("kind", "apply"),
    [
        pytest.param(kind, kind.fields[each], id=f"{name}: {each}")
        for name, kind in KINDS.items()
        for each in kind.fields
    ],
)
def test_each_field_changed_alone_finds_nothing(tmp_path: Path, kind: Kind, apply: Callable[[Any], None]) -> None:
    values = kind.values(make_model(tmp_path / "model"))
    assert hits(tmp_path / "store", kind.namespace(values), save=True) == 4
    other = deepcopy(values)
    apply(other)
    assert hits(tmp_path / "store", kind.namespace(other)) == 0
    assert hits(tmp_path / "store", kind.namespace(values)) == 4


@pytest.mark.parametrize(
    ("kind", "apply"),
    [
        pytest.param(kind, apply, id=f"{name}: {field}")
        for name, kind in KINDS.items()
        for field, apply in kind.same.items()
    ],
)
def test_what_does_not_change_k_and_v_changes_no_identity(
    tmp_path: Path, kind: Kind, apply: Callable[[Any], None]
) -> None:
    values = kind.values(make_model(tmp_path / "model"))
    other = deepcopy(values)
    apply(other)
    assert kind.namespace(other).digest == kind.namespace(values).digest


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_identity_follows_the_files_of_the_model_not_their_path(tmp_path: Path, kind: Kind) -> None:
    def found(folder: Path, *, save: bool = False) -> int:
        return hits(tmp_path / "store", kind.namespace(kind.values(folder)), save=save)

    assert found(make_model(tmp_path / "model"), save=True) == 4
    assert found(make_model(tmp_path / "moved")) == 4
    assert found(make_model(tmp_path / "trained", weights=b"others")) == 0
    assert found(make_model(tmp_path / "configured", config=b'{"a": 1}')) == 0
