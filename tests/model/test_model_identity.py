from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from transformers import LlamaConfig, LlamaForCausalLM

from tierkv.engine.embedded_model import write_embedded_model
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import load_model
from tierkv.engine.weights_digest import weights_digest
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.values.namespace import differing_fields


def test_equal_weights_have_equal_digests_and_one_changed_bit_another() -> None:
    model, again = make_model("llama", block_size=16), make_model("llama", block_size=16)
    assert weights_digest(model) == weights_digest(again)
    with torch.no_grad():
        again.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    assert weights_digest(model) != weights_digest(again)


def test_a_change_in_any_piece_of_a_large_tensor_makes_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.engine.weights_digest._PIECE_BYTES", 64)
    model = torch.nn.Linear(16, 16)
    found = {weights_digest(model)}
    for row in range(16):
        with torch.no_grad():
            model.weight[row, 3] += 1
        found.add(weights_digest(model))
    with torch.no_grad():
        model.weight.copy_(model.weight[[1, 0, *range(2, 16)]])  # the same pieces in another order
    found.add(weights_digest(model))
    assert len(found) == 18
    monkeypatch.setattr("tierkv.engine.weights_digest._MAX_THREADS", 1)
    assert weights_digest(model) in found, "threads finish in any order"


def test_a_buffer_that_is_not_saved_counts_too() -> None:
    model = make_model("llama", block_size=16)
    before = weights_digest(model)
    model.model.rotary_emb.inv_freq[0] += 1
    assert weights_digest(model) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_another_namespace(dtype: torch.dtype) -> None:
    model = make_model("llama", block_size=16)
    namespace = namespace_of(model, probe_layout(model, block_size=16))
    model.to(dtype)
    other = namespace_of(model, probe_layout(model, block_size=16))
    assert other.digest != namespace.digest
    assert "dtype" in differing_fields(other.identity(), namespace.identity())


def test_another_rope_setting_is_another_namespace_and_is_named() -> None:
    def namespace(theta: float):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        model = LlamaForCausalLM(config).eval()
        return namespace_of(model, probe_layout(model, block_size=16))

    names = differing_fields(namespace(1e4).identity(), namespace(1e6).identity())
    assert "architecture.rope_parameters.rope_theta" in names


class LoraLinear(torch.nn.Linear):
    """What PEFT puts in a projection's place: `scaling` and `active_adapters` are plain attributes, not weights."""

    adapter_layer_names = ("lora_A", "lora_B")
    scaling = 1.0


def test_a_model_with_adapters_has_no_namespace_until_the_active_one_is_named() -> None:
    model = make_model("llama", block_size=16)
    layout = probe_layout(model, block_size=16)
    plain = namespace_of(model, layout).digest
    model.model.layers[0].self_attn.k_proj.__class__ = LoraLinear
    with pytest.raises(UnsupportedModelError, match="adapters that are not merged"):
        namespace_of(model, layout)
    assert namespace_of(model, layout, adapter="a").digest not in (
        plain,
        namespace_of(model, layout, adapter="b").digest,
    )


def test_the_embedded_model_is_the_same_wherever_it_is_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        load_model(None, cache_dir=tmp_path / name)
    digests = {weights_digest(load_model(None, cache_dir=tmp_path / name).model) for name in ("a", "b")}
    assert len(digests) == 1


def test_a_model_by_its_directory_is_the_same_as_loaded_before(tmp_path: Path) -> None:
    write_embedded_model(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), cache_dir=tmp_path, device="cpu")
    embedded = load_model(None, cache_dir=tmp_path, device="cpu")
    assert weights_digest(loaded.model) == weights_digest(embedded.model)
    assert loaded.tokenizer.encode("hi é") == embedded.tokenizer.encode("hi é")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hi é")) == "hi é"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("/nowhere/at/all", {}, "there is no model"),
        ("no-such/model", {}, "cannot load the model"),
        (None, {"device": "abacus"}, "no device"),
        (None, {"dtype": "int3"}, "no dtype"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    tmp_path: Path, name: str | None, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_model(name, cache_dir=tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(str(tmp_path), cache_dir=tmp_path)
