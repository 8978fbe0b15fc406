"""Fused passes: the plain model's logits, its own weights without a second copy, and only for models known to fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from places import plain_logits
from tiny_models import _COMMON, VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine import split_linears
from tierkv.engine.fused_model import FusedDecoder, fuse_model
from tierkv.engine.fused_ops import Norm, add_norm
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.weights_digest import weights_digest
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import OneRank

BLOCK = 16


def make(family: str) -> Any:
    if family == "qwen2":
        torch.manual_seed(0)
        options = {key: value for key, value in _COMMON.items() if key != "head_dim"} | {
            "hidden_size": 256,
            "initializer_range": 0.1,
        }
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    elif family == "llama with biases":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    elif family == "qwen3 with windows":
        torch.manual_seed(0)
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Qwen3Config(**_COMMON, layer_types=kinds, use_sliding_window=True, sliding_window=25)
        model = transformers.Qwen3ForCausalLM(config)
    else:
        return make_model(family, block_size=BLOCK)
    model.set_attn_implementation("sdpa")
    return model.eval()


FUSED = ["llama", "qwen2", "qwen3", "mistral", "llama with biases", "qwen3 with windows"]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def opened(model: Any, **options: Any) -> Iterator[Runner]:
    config = CacheConfig(block_size=BLOCK, hot_bytes=40 * 3 * 2 * BLOCK * 4 * 64 * 4, warm_bytes=1 << 20)
    with open_runner(LoadedModel(model, None, "tiny"), config, **options) as runner:
        yield runner


def greedy(count: int = 6, **options: Any) -> GenerationOptions:
    """Whole blocks only, unless the test says else: so the blocks and steps can be counted."""
    return GenerationOptions(
        max_new_tokens=count, stop_ids=frozenset(), keep_logits=True, **{"store_partial": False, **options}
    )


@pytest.mark.parametrize("family", FUSED)
def test_fused_logits_are_the_plain_models(family: str) -> None:
    model = make(family)
    plain = copy.deepcopy(model)
    prompts = [tokens(70), tokens(33, seed=2), tokens(70) + tokens(5, seed=3)]
    with opened(model, fuse="on") as runner:
        assert isinstance(runner._pass._compute, FusedDecoder)
        for options in (greedy(), greedy()):  # the second time the prefixes are hits
            for prompt, answer in zip(prompts, runner.generate(prompts, options), strict=True):
                whole = [*prompt, *answer.token_ids[:-1]]
                want = plain_logits(plain, whole)[len(prompt) - 1 :]
                assert answer.logits is not None
                assert float((answer.logits.double() - want).abs().max()) <= 1e-4
        runner.cache.check()


@pytest.mark.parametrize("family", FUSED)
def test_the_model_stays_its_plain_self(family: str) -> None:
    model = make(family)
    before, want = weights_digest(model), plain_logits(model, tokens(40))
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    with opened(model, fuse="on") as runner:
        runner.generate([tokens(20)], greedy(2))
        assert torch.equal(plain_logits(model, tokens(40)), want)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    assert weights_digest(model) == before
    assert torch.equal(plain_logits(model, tokens(40)), want)
    assert torch.equal(plain_logits(copy.deepcopy(model), tokens(40)), want)


def test_merged_weights_are_stored_once_and_are_merged_once() -> None:
    model = make("qwen3")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    first = fuse_model(model, "on", OneRank())
    second = fuse_model(model, "on", OneRank())
    assert first is not None and second is not None
    for one, other in zip(first._layers, second._layers, strict=True):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert one.gate_up.weight.data_ptr() == other.gate_up.weight.data_ptr()
    for parts in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        storages = {part.weight.untyped_storage().data_ptr() for part in parts}
        assert len(storages) == 1
        sizes = sum(part.weight.numel() * part.weight.element_size() for part in parts)
        assert parts[0].weight.untyped_storage().nbytes() == sizes


def test_a_weight_written_in_place_is_found_although_it_is_a_view() -> None:
    model = make("llama")
    with opened(model, fuse="on") as runner:
        runner.generate([tokens(40)], greedy(2))
        with torch.no_grad():
            model.model.layers[2].self_attn.v_proj.weight[3, 3] += 1
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.generate([tokens(40)], greedy(2))


def test_a_number_written_past_torchs_count_is_found_too() -> None:
    model = make("llama")
    with opened(model, fuse="on") as runner:
        model.model.layers[0].mlp.up_proj.weight.data.numpy()[0, 0] += 1
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.check_model()


def test_a_runner_that_was_opened_before_the_weights_moved_refuses_to_go_on() -> None:
    model = make("llama")
    with opened(model, fuse="off") as runner, opened(model, fuse="on") as other:
        want = other.generate([tokens(40)], greedy(2))[0].token_ids
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.generate([tokens(40)], greedy(2))
        with opened(model, fuse="off") as plain, opened(model, fuse="on") as fused:
            for each in (plain, other, fused):
                assert each.generate([tokens(40)], greedy(2))[0].token_ids == want


def change_class(model: Any) -> None:
    class Other(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Other


def add_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(torch.nn.functional.relu)


def tie(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[0].self_attn.k_proj.weight


def share_memory(model: Any) -> None:
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = torch.nn.Parameter(first.weight.detach())


def replace_linear(model: Any) -> None:
    class Quantised(torch.nn.Linear):
        pass

    model.model.layers[2].self_attn.q_proj.__class__ = Quantised


def replace_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def subclass_weight(model: Any) -> None:
    class Packed(torch.nn.Parameter):
        pass

    module = model.model.layers[0].self_attn.q_proj
    module.weight = Packed(module.weight.detach())


def widen_norm(model: Any) -> None:
    model.model.norm.double()


def replace_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = torch.nn.functional.relu


def replace_forward_of_class(model: Any) -> None:
    class LlamaMLP(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        pass

    LlamaMLP.__module__ = type(model).__module__
    LlamaMLP.__qualname__ = "LlamaMLP"
    LlamaMLP.forward = torch.nn.Identity.forward
    for layer in model.model.layers:
        layer.mlp.__class__ = LlamaMLP


CHANGES = [
    replace_forward_of_class,
    change_class,
    add_hook,
    tie,
    share_memory,
    replace_linear,
    replace_activation,
    subclass_weight,
    widen_norm,
    replace_forward,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_not_plainly_one_of_the_known_ones_is_left_alone(
    change: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    change(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(UnsupportedModelError, match="cannot be fused"):
        fuse_model(model, "on", OneRank())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
    with caplog.at_level("INFO"):
        assert fuse_model(model, "auto", OneRank()) is None
    assert "runs without fused kernels" in caplog.text


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_other_families_run_as_before(family: str) -> None:
    model = make(family)
    with pytest.raises(UnsupportedModelError, match="its class is not"), opened(model, fuse="on"):
        pass
    with opened(model, fuse="auto") as runner:
        assert not isinstance(runner._pass._compute, FusedDecoder)
        assert runner.generate([tokens(20)], greedy(2))


def test_ranks_fuse_only_a_model_that_is_split() -> None:
    class Two(OneRank):
        size = 2

    with pytest.raises(UnsupportedModelError, match="not split by their outputs"):
        fuse_model(make("llama"), "on", Two())


def test_on_a_cpu_nothing_is_fused_unless_it_is_asked_for() -> None:
    model = make("llama")
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for wish in ("auto", "off"):
        assert fuse_model(model, wish, OneRank()) is None
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    with pytest.raises(ConfigError, match="fuse must be"), opened(model, fuse="yes"):
        pass


def test_a_fused_pass_that_computes_something_else_is_found_at_opening(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    plain = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args, **options: plain(*args, **options) * 1.01)
    with pytest.raises(UnsupportedModelError, match="self-test"), opened(model, fuse="on"):
        pass
    monkeypatch.setattr(type(model), "device", property(lambda self: self.lm_head.weight.device))
    monkeypatch.setattr("tierkv.engine.fused_model.fuse_model", lambda *_: FusedDecoder(model))
    with opened(model, fuse="auto") as runner:  # it goes on with the plain model
        assert not isinstance(runner._pass._compute, FusedDecoder)
    assert "fused kernels are off" in caplog.text


class SumsOfOneRank:
    """The sums of a model on one rank, which offer those with a norm for few tokens. calls: their buffers, in order."""

    size = 1
    max_norm_rows = 24

    def __init__(self) -> None:
        self.calls: list[int | None] = []
        self.ended_early = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls.append(None)
        return torch.nn.functional.linear(x, weight)

    def linear_add_norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *norm: Any, buffer: int
    ) -> torch.Tensor:
        assert x.shape[0] <= self.max_norm_rows
        self.calls.append(buffer)
        residual += torch.nn.functional.linear(x, weight)
        return add_norm(residual, None, Norm(*norm))[0]

    def end_early(self) -> None:
        self.ended_early += 1


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> SumsOfOneRank:
    """Give sums to every fused decoder."""
    sums, plain = SumsOfOneRank(), FusedDecoder.__init__
    monkeypatch.setattr(FusedDecoder, "__init__", lambda self, model, _: plain(self, model, sums))  # type: ignore[arg-type]
    return sums


def test_sums_with_a_norm_use_two_buffers_in_turn_in_passes_of_any_size(sums: SumsOfOneRank) -> None:
    model = make("llama")
    plain, layers = copy.deepcopy(model), model.config.num_hidden_layers
    prompts = [tokens(70), tokens(7, seed=2), tokens(70) + tokens(5, seed=3)]
    with opened(model, fuse="on") as runner:
        sums.calls.clear()
        for batch in (prompts[:1], prompts, prompts[1:2]):
            for prompt, answer in zip(batch, runner.generate(batch, greedy()), strict=True):
                whole = [*prompt, *answer.token_ids[:-1]]
                want = plain_logits(plain, whole)[len(prompt) - 1 :]
                assert answer.logits is not None
                assert float((answer.logits.double() - want).abs().max()) <= 1e-4
    passes = [sums.calls[at : at + 2 * layers] for at in range(0, len(sums.calls), 2 * layers)]
    large, small = [None] * 2 * layers, [0, 1] * layers
    assert large in passes and small in passes
    assert all(each in (large, small) for each in passes), "a pass makes all of its sums with norms, or none"


def test_a_pass_that_fails_between_two_sums_is_waited_for(sums: SumsOfOneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(make("llama"), fuse="on") as runner:
        monkeypatch.setattr("tierkv.engine.fused_model.gate", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.generate([tokens(7)], greedy())
        assert sums.calls[-1] == 0 and sums.ended_early == 1


@pytest.mark.parametrize(("family", "with_norms"), [("llama", True), ("llama with biases", False)])
def test_sums_with_a_norm_are_for_models_without_biases_after_them(
    family: str, with_norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make(family), {}
    model.model.layers[0].self_attn.o_proj.weight.device_mesh = SimpleNamespace(ndim=1, get_group=lambda: None)
    monkeypatch.setattr(split_linears, "RankSums", lambda _, **options: seen.update(options))
    split_linears.open_sums(model)
    assert seen["with_norms"] == with_norms
