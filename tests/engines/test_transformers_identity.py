"""The identity of a model whose `generate` is cached: each of its fields changed alone gives no hit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_hunt import small_store
from generate_models import VOCABULARY, make_generator
from small_caches import SIZE, one_thread, opened
from torch import Tensor
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.integrations.transformers import identity, persistent_cache

__all__ = ["one_thread"]

IDS = torch.randint(6, VOCABULARY, (1, 50), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


def ask(model: Any, **options: Any) -> Any:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, **options)


def plain(model: Any) -> Tensor:
    found: Tensor = type(model).generate(model, IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    return found


@pytest.fixture
def model() -> Any:
    return make_generator("mistral")


def with_config(**changed: Any) -> Callable[[], Any]:
    """Return how to make the model with other fields in its configuration, and the same weights."""

    def make() -> Any:
        base = make_generator("mistral")
        config = copy.deepcopy(base.config)
        for name, value in changed.items():
            setattr(config, name, value)
        other = type(base)(config).eval()
        other.load_state_dict(base.state_dict())
        return other

    return make


def _one_weight() -> Any:
    other = make_generator("mistral")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return other


def _a_subclass() -> Any:
    other = make_generator("mistral")
    other.__class__ = type("Another", (type(other),), {})
    return other


def _an_attribute() -> Any:
    other = make_generator("mistral")
    other.model.layers[0].self_attn.scaling *= 1.01
    return other


def _merged_adapter() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(make_generator("mistral"), config).merge_and_unload()


def _attention() -> Any:
    other = make_generator("mistral")
    other.set_attn_implementation("eager")
    return other


OTHERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "one weight": (_one_weight, {}),
    "all weights": (lambda: make_generator("mistral", seed=1), {}),
    "rope": (with_config(rope_parameters={"rope_type": "default", "rope_theta": 5e3}), {}),
    "a scaled rope": (
        with_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        {},
    ),
    "window": (with_config(sliding_window=22), {}),
    "no window": (with_config(sliding_window=None), {}),
    "norm": (with_config(rms_norm_eps=1e-5), {}),
    "activation": (with_config(hidden_act="gelu"), {}),
    "dtype": (lambda: make_generator("mistral").to(torch.bfloat16), {}),
    "attention": (_attention, {}),
    "class": (_a_subclass, {}),
    "an attribute of a module": (_an_attribute, {}),
    "a merged adapter": (_merged_adapter, {}),
    "block size": (lambda: make_generator("mistral"), {"block_size": 4}),
    "adapter": (lambda: make_generator("mistral"), {"adapter": "a digest"}),
    "salt": (lambda: make_generator("mistral"), {"salt": "tenant"}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_changed_field_gives_no_hit(name: str, model: Any, tmp_path: Path) -> None:
    make, options = OTHERS[name]
    other = make()
    with opened(model, tmp_path / "store"):
        ask(model)
    with opened(other, tmp_path / "store", **options) as cache:
        assert torch.equal(ask(other), plain(other))
        assert cache.stats().num_loaded_tokens == 0 and not cache.stats().uncached
    with opened(model, tmp_path / "store") as cache:
        assert torch.equal(ask(model), plain(model))
        assert cache.stats().num_loaded_tokens == 48


def test_another_version_of_transformers_gives_no_hit(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(model, tmp_path / "store"):
        ask(model)
    monkeypatch.setattr(identity.transformers, "__version__", "5.99.0")
    with opened(model, tmp_path / "store") as cache:
        ask(model)
        assert cache.stats().num_loaded_tokens == 0


def test_the_name_is_for_humans(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "store", name="one"):
        ask(model)
    with opened(make_generator("mistral"), tmp_path / "store", name="other") as cache:
        ask(cache.model)
        assert cache.stats().num_loaded_tokens == 48


# --- A model that changes while its cache is open ------------------------------------------------------


def _write(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.01)


def _write_past_torch(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.detach().numpy()[0, 0] += 0.5


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weights": (_write, "weights have changed"),
    "bytes": (_write_past_torch, "weights have changed"),
    "training": (lambda m: m.train(), "train mode"),
    "hook": (lambda m: m.model.layers[0].register_forward_hook(lambda *_: None), "forward hook"),
    "attention": (lambda m: m.set_attn_implementation("eager"), "attention implementation has changed"),
    "scaling": (lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.3), "has changed"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_model_that_has_changed_is_not_cached(name: str, model: Any, tmp_path: Path) -> None:
    change, reason = CHANGES[name]
    with opened(model, tmp_path / "store") as cache:
        ask(model)
        before = cache.stats()
        change(model)
        got, want = ask(model), plain(model)
        after = cache.stats()
        assert torch.equal(got, want)
        assert after.num_saved_blocks == before.num_saved_blocks
        assert after.num_loaded_tokens == 0
        ((found, count),) = after.uncached.items()
        assert reason in found and count == 1


def test_caching_goes_on_after_training_mode(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "store") as cache:
        ask(model)
        model.train()
        ask(model)
        model.eval()
        assert torch.equal(ask(model), plain(model))
        assert cache.stats().num_loaded_tokens == 48


def test_autocast_is_not_cached(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "store") as cache:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ask(model), plain(model))
        assert "autocast" in next(iter(cache.stats().uncached))


# --- The model stays usable for all else ---------------------------------------------------------------


def test_the_model_trains_and_runs_while_its_cache_is_open(model: Any, tmp_path: Path) -> None:
    want = model(IDS).logits
    with opened(model, tmp_path / "store"):
        assert torch.equal(model(IDS).logits, want)
        model(IDS, labels=IDS).loss.backward()
        assert model.model.embed_tokens.weight.grad is not None
        found = model(IDS, use_cache=True)
        assert found is not None
        with torch.inference_mode():
            ask(model)
        ask(model)


def test_close_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    before = dict(vars(model))
    cache = opened(model, tmp_path / "store")
    assert vars(model).keys() - before.keys() == {"generate", "_prefill", "prepare_inputs_for_generation"}
    with pytest.raises(ConfigError, match="has a persistent cache already"):
        opened(model, tmp_path / "store")
    cache.close()
    cache.close()
    assert vars(model).keys() == before.keys()
    assert torch.equal(ask(model), plain(model))
    with opened(model, tmp_path / "store") as cache:
        ask(model)


def test_a_wrapper_of_the_users_survives_close(model: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def wrap(inner: Any) -> Any:
        def generate(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        return generate

    model.generate = before = wrap(model.generate)
    cache = opened(model, tmp_path / "store")
    model.generate = after = wrap(model.generate)
    ask(model)
    cache.close()
    assert vars(model)["generate"] is after
    assert torch.equal(ask(model), plain(model)) and len(calls) == 4
    model.generate = before
    with opened(model, tmp_path / "store"):
        pass
    assert vars(model)["generate"] is before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_the_plain_generate(copied: Callable[[Any], Any], model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "store") as cache:
        ask(model)
        other = copied(model)
        _write(other)
        assert torch.equal(ask(other), plain(other))
        assert cache.stats().num_calls == 1
        with opened(other, None, cold=cache.store.cold) as another:
            ask(other)
            assert another.stats().num_loaded_tokens == 0


def test_the_cache_is_no_part_of_the_identity(model: Any, tmp_path: Path) -> None:
    from tierkv.engine.model_identity import namespace_of
    from tierkv.engine.model_support import probe_layout

    layout = probe_layout(model, block_size=SIZE)
    before = namespace_of(model, layout).digest
    with opened(model, tmp_path / "store"):
        assert namespace_of(model, layout).digest == before


# --- Adapters ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_an_unmerged_adapter_is_named_and_may_not_be_switched(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.add_adapter("other", config)
    wrapped.eval()
    with pytest.raises(UnsupportedModelError, match="adapters that are not merged"):
        opened(wrapped, tmp_path / "store")
    with opened(wrapped, tmp_path / "store", adapter="default") as cache:
        for _ in range(2):
            got = wrapped.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, plain(cache.model)) and cache.stats().num_loaded_tokens == 48
        wrapped.set_adapter("other")
        wrapped.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6)
        wrapped.set_adapter("default")
        with wrapped.disable_adapter():
            wrapped.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6)
        wrapped.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, adapter_names=["other"])
        stats = cache.stats()
        assert stats.num_loaded_tokens == 48 and sum(stats.uncached.values()) == 3
        assert torch.equal(wrapped.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False), got)
        assert cache.stats().num_loaded_tokens == 96


# --- What is refused -----------------------------------------------------------------------------------


def small_llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **options)).eval()


def _custom_attention() -> Any:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return value, None

    AttentionInterface.register("mine", attention)
    model = small_llama()
    model.set_attn_implementation("mine")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an encoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).eval(),
        UnsupportedModelError,
        "encoder",
    ),
    "a state": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)).eval(),
        UnsupportedModelError,
        "cannot be cached by prefix",
    ),
    "rope by length": (
        lambda: small_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        UnsupportedModelError,
        "rope depends on the prompt's length",
    ),
    "train mode": (lambda: small_llama().train(), ConfigError, "train mode"),
    "another attention": (_custom_attention, UnsupportedModelError, "not identified"),
    "a module": (lambda: torch.nn.Linear(2, 2), UnsupportedModelError, "no generate of Transformers"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_identified_is_refused(name: str, tmp_path: Path) -> None:
    make, error, reason = REFUSED[name]
    with pytest.raises(error, match=reason):
        opened(make(), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_model_whose_keys_depend_on_later_tokens_fails_the_self_test(tmp_path: Path) -> None:
    class Peeking(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any, cache: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            embeds = self.model.embed_tokens(input_ids)
            embeds = embeds + embeds.mean(dim=1, keepdim=True)
            return super().forward(inputs_embeds=embeds, cache=cache, position_ids=position_ids, **kwargs)

    torch.manual_seed(0)
    config = make_generator("llama").config
    with pytest.raises(UnsupportedModelError, match="fails the self-test"):
        opened(Peeking(config).eval(), tmp_path / "store")


def test_options_that_contradict_each_other_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path or config"):
        persistent_cache(model, tmp_path, config=small_store(tmp_path))
    with pytest.raises(ConfigError, match="block_size is 1024"):
        persistent_cache(model, tmp_path / "store", block_size=1024)
