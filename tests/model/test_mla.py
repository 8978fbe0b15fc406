"""DeepSeek models keep the latent of MLA in the cache, and answer as with expanded K and V."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place, plain_logits
from tiny_models import FAMILIES, MLA, VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.cascade import CascadeCost
from tierkv.engine.generation import GenerationOptions
from tierkv.engine.mla import self_test as mla_self_test
from tierkv.engine.mla.layers import MlaInput, MlaLayer, mla_layers, mla_reasons, rope_order
from tierkv.engine.mla.model import LatentAttention, MlaChoice, choose_mla, latent_attention
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Runner, open_runner
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import OneRank
from tierkv.values.block import Tier
from tierkv.values.namespace import differing_fields

SIZE = 16
Open = Callable[..., Runner]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(count: int, **options: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), **options)


def choose(model: Any, wish: str = "auto") -> MlaChoice:
    return choose_mla(model, wish, block_size=SIZE, ranks=OneRank())


@pytest.fixture(params=sorted(MLA))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param, block_size=SIZE)


@pytest.fixture
def v3() -> Any:
    return make_model("deepseek_v3 with yarn", block_size=SIZE)


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a runner on one store; `hot` and `warm` in blocks of the latent."""
    opened: list[Any] = []

    def open_runner_of(model: Any, *, hot: int = 32, warm: int = 16, mla: str = "auto", **options: Any) -> Runner:
        block_bytes = probe_layout(model, block_size=SIZE, latent=latent_attention(model, mla)).block_bytes
        settings = {"cold_path": tmp_path / "store", "block_size": SIZE, "min_free_bytes": 0} | options
        config = CacheConfig(hot_bytes=hot * block_bytes, warm_bytes=warm * block_bytes, **settings)
        opened.append(open_runner(LoadedModel(model, None, "tiny"), config, mla=mla))
        runner: Runner = opened[-1].__enter__()
        return runner

    yield open_runner_of
    for context in opened:
        context.__exit__(None, None, None)


# --- What is chosen ----------------------------------------------------------------------------------------------


def test_a_runner_keeps_the_latent_and_greedy_answers_are_the_models_own(model: Any, open_one: Open) -> None:
    runner = open_one(model)
    assert runner.mla.latent is not None and runner.mla.latent.kernel == "torch" and runner.mla.fallbacks == {}
    assert runner.cache.layout.is_latent
    prompts = [tokens(n, seed=n) for n in (SIZE + 9, 5, 9 * SIZE + 1)]
    for _ in range(2):  # the second time from the cache
        for prompt, got in zip(prompts, runner.generate(prompts, greedy(12, keep_logits=True)), strict=True):
            fed = [*prompt, *got.token_ids[:-1]]
            assert got.logits is not None
            Place("cpu", torch.float32, SIZE).assert_logits(got.logits, model, fed, first=len(prompt) - 1)
            assert got.token_ids == plain_logits(model, fed)[len(prompt) - 1 :].argmax(-1).tolist()
    ways = runner.mla.latent.attention
    assert ways.expanded >= 2 and ways.absorbed > 12, "the long prompt is expanded, decoding never"
    runner.cache.check()


def test_expanded_is_kept_where_it_is_asked_for_and_for_other_models(open_one: Open, v3: Any) -> None:
    runner = open_one(v3, mla="expanded")
    assert runner.mla.latent is None and not runner.cache.layout.is_latent
    assert choose(make_model("llama", block_size=SIZE)).latent is None
    with pytest.raises(UnsupportedModelError, match="its class is not that of DeepSeek"):
        choose(make_model("llama", block_size=SIZE), "latent")
    with pytest.raises(ConfigError, match='"auto", "latent" or "expanded"'):
        choose(v3, "yes")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_other_family_counts_as_one_with_a_latent(family: str) -> None:
    assert next(mla_reasons(make_model(family, block_size=SIZE))).startswith("its class is not")


class _Subclass(torch.nn.Linear):
    pass


def _hook(module: Any, inputs: Any, output: Any) -> None:
    return None


def test_what_does_not_compute_as_its_class_keeps_k_and_v(v3: Any) -> None:
    reasons = lambda model=v3: list(mla_reasons(model))  # noqa: E731
    assert reasons() == []
    attention = v3.model.layers[1].self_attn
    hook = attention.kv_b_proj.register_forward_hook(_hook)
    assert reasons() == ["layer 1 has hooks or a forward of its own"]
    hook.remove()
    attention.forward = attention.forward
    assert reasons() == ["layer 1 has hooks or a forward of its own"]
    del attention.forward
    plain = attention.kv_b_proj
    attention.kv_b_proj = _Subclass(48, 4 * 56, bias=False)
    assert reasons() == ["kv_b_proj of layer 1 is no plain linear module"]
    attention.kv_b_proj = torch.nn.Linear(48, 4 * 56, bias=True)
    assert reasons() == ["kv_b_proj of layer 1 is no plain linear module"]
    attention.kv_b_proj = plain
    attention.layer_idx = 2
    assert reasons() == ["layer 1 calls itself 2"]
    attention.layer_idx = 1
    scaling = attention.scaling
    del attention.scaling
    assert reasons() == ["this Transformers' attention has no scaling"]
    attention.scaling = scaling
    v3.model.layers = v3.model.layers[:2]
    assert reasons() == ["it does not run all of its layers"]


# --- Faults that the self-test must find -------------------------------------------------------------------------


def _roll_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MlaLayer.key_weight.fget
    assert right is not None
    monkeypatch.setattr(MlaLayer, "key_weight", property(lambda layer: right(layer).roll(1, 0)))


def _swap_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MlaLayer.value_weight.fget
    assert right is not None
    monkeypatch.setattr(MlaLayer, "value_weight", property(lambda layer: right(layer).flip(1)))


def _scale_without_yarn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlaLayer, "scale", property(lambda layer: (layer.nope_dim + layer.rope_dim) ** -0.5))


def _rotate_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MlaLayer.project

    def project(layer: MlaLayer, hidden: Any, positions: Any) -> MlaInput:
        new = right(layer, hidden, positions)
        wrong = right(layer, hidden, tuple(each.roll(1, 1) for each in positions))
        return MlaInput(query=new.query, query_rope=new.query_rope, latent=wrong.latent)

    monkeypatch.setattr(MlaLayer, "project", project)


def _latent_without_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MlaLayer.project

    def project(layer: MlaLayer, hidden: Any, positions: Any) -> MlaInput:
        new = right(layer, hidden, positions)
        new.latent[:, : layer.rank] = layer.module.kv_a_proj_with_mqa(hidden)[0, :, : layer.rank]
        return new

    monkeypatch.setattr(MlaLayer, "project", project)


def _absorbed_alone_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierkv.engine.mla import attention as mla_attention

    right = mla_attention._attend_latents
    monkeypatch.setattr(mla_attention, "_attend_latents", lambda *args: right(*args) * 1.1)


def _expanded_alone_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierkv.engine.mla import attention as mla_attention

    right = mla_attention._attend_expanded

    def attend(layer: MlaLayer, new: Any, span: Any, latents: Any, out: Any) -> None:
        right(layer, new, span, latents, out)
        out[span] *= 1.1

    monkeypatch.setattr(mla_attention, "_attend_expanded", attend)


def _called_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def project(layer: MlaLayer, hidden: Any) -> MlaInput:
        raise AssertionError("not reached")

    monkeypatch.setattr(MlaLayer, "project", project)


FAULTS = [
    _roll_keys,
    _swap_values,
    _scale_without_yarn,
    _rotate_one_further,
    _latent_without_its_norm,
    _absorbed_alone_is_wrong,
    _expanded_alone_is_wrong,
    _called_in_another_way,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_model_that_fails_the_self_test_keeps_k_and_v_and_that_is_logged_and_counted(
    fault: Callable[[pytest.MonkeyPatch], None], v3: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    fault(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="tierkv.engine.mla.model"):
        choice = choose(v3)
    assert choice.latent is None and not choice.layout.is_latent
    assert choice.fallbacks == {"latent": 1}
    assert "fails the self-test" in caplog.text
    with pytest.raises(UnsupportedModelError, match="fails the self-test"):
        choose(v3, "latent")


def test_a_runner_of_a_model_that_fails_is_right_with_k_and_v(
    v3: Any, monkeypatch: pytest.MonkeyPatch, open_one: Open
) -> None:
    _roll_keys(monkeypatch)
    runner = open_one(v3, hot=160, warm=80)
    assert runner.mla.latent is None and runner.mla.fallbacks == {"latent": 1}
    prompt = tokens(3 * SIZE + 2)
    (got,) = runner.generate([prompt], greedy(3, keep_logits=True))
    assert got.logits is not None
    Place("cpu", torch.float32, SIZE).assert_logits(
        got.logits, v3, [*prompt, *got.token_ids[:-1]], first=len(prompt) - 1
    )


# --- Identity ----------------------------------------------------------------------------------------------------


def test_blocks_of_k_and_v_and_of_the_latent_are_never_mistaken_for_each_other(v3: Any, open_one: Open) -> None:
    prompt = tokens(4 * SIZE + 1)
    spaces = []
    for mla in ("expanded", "latent", "expanded", "latent"):
        runner = open_one(v3, mla=mla)
        (got,) = runner.generate([prompt], greedy(1))
        spaces.append((runner.cache.namespace, got.cached_tokens[Tier.COLD]))
        runner.cache.close()
    assert [cached for _, cached in spaces] == [0, 0, 4 * SIZE, 4 * SIZE]
    expanded, latent = spaces[0][0], spaces[1][0]
    assert expanded.digest != latent.digest
    assert differing_fields(expanded.identity(), latent.identity()) == ["architecture.mla", "layers"]


def test_the_order_of_the_rope_part_is_part_of_the_namespace(v3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = mla_layers(v3)[0]
    assert rope_order(layer) == "even dims, odd dims"
    assert rope_order(mla_layers(make_model("deepseek_v2", block_size=SIZE))[0]) == "as projected"
    layout = choose(v3).layout
    before = namespace_of(v3, layout)
    import transformers.models.deepseek_v3.modeling_deepseek_v3 as modeling

    right = modeling.apply_rotary_pos_emb_interleave

    def in_place(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        """Rotate as a later Transformers might: equal scores, the dims in their own order."""
        return tuple(each.unflatten(-1, (2, -1)).mT.flatten(-2) for each in right(query, key, cos, sin))  # type: ignore[return-value]

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb_interleave", in_place)
    assert choose(v3).fallbacks == {}
    after = namespace_of(v3, layout)
    assert differing_fields(before.identity(), after.identity()) == ["architecture.mla.rope_order"]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb_interleave", lambda *each: (right(*each)[0], each[1].flip(-1)))
    with pytest.raises(UnsupportedModelError, match="order that is not known"):
        namespace_of(v3, layout)


# --- The model outside of a pass ---------------------------------------------------------------------------------


def test_between_passes_the_model_is_as_it_was(v3: Any, open_one: Open) -> None:
    prompt = tokens(3 * SIZE)
    before = plain_logits(v3, prompt)
    runner, other = open_one(v3), open_one(v3, mla="expanded", cold_path=None)
    for _ in range(2):
        runner.generate([prompt], greedy(2))
        assert not any("forward" in vars(module) for module in v3.modules())
        assert torch.equal(plain_logits(v3, prompt), before)
        other.generate([prompt], greedy(2))


def test_a_latent_attention_is_undone_after_an_error_and_may_be_nested(v3: Any) -> None:
    latent = LatentAttention(v3)
    attention = v3.model.layers[0].self_attn
    with latent:
        with latent:
            assert "forward" in vars(attention)
        assert "forward" in vars(attention), "the outer block has not ended"
    assert "forward" not in vars(attention)
    with pytest.raises(ConfigError, match="without a tierkv batch"), latent:
        v3(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    assert "forward" not in vars(attention)


def test_new_weights_are_not_computed_with_old_ones(v3: Any) -> None:
    """The projections are views: a copy that absorbs weights once would answer for weights that are gone."""
    latent = LatentAttention(v3)
    with torch.no_grad():
        for layer in v3.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(0.5)
    from tierkv.engine.model_support import self_test

    assert self_test(v3, probe_layout(v3, block_size=SIZE, latent=latent), latent=latent) < 1e-5


def test_a_changed_projection_is_found_before_it_is_cached(v3: Any, open_one: Open) -> None:
    runner = open_one(v3)
    runner.generate([tokens(SIZE)], greedy(1))
    with torch.no_grad():
        v3.model.layers[1].self_attn.kv_b_proj.weight.mul_(1.5)
    with pytest.raises(ConfigError, match="weights have changed"):
        runner.generate([tokens(SIZE)], greedy(1))


def test_a_pass_leaves_nothing_of_its_batch_behind(v3: Any, open_one: Open) -> None:
    runner = open_one(v3)
    runner.generate([tokens(SIZE)], greedy(2))
    assert runner.mla.latent is not None
    assert runner.mla.latent.attention._plan is None, "it refers to the pool"


def test_there_are_no_graphs_and_no_cascade_over_latents(v3: Any, open_one: Open) -> None:
    runner = open_one(v3, hot=64)
    cost = CascadeCost.of_cpu(heads=4, kv_heads=1, head_dim=64, token_bytes=256)
    runner = Runner(runner.loaded, runner.cache, cascade_cost=cost, use_graphs=True)
    assert runner._pass.graphs is None and runner._pass._cascade_cost is None
    shared = tokens(6 * SIZE)
    answers = runner.generate([[*shared, n] for n in range(6)], greedy(4))
    assert runner.cascade_steps == 0 and all(len(each.token_ids) == 4 for each in answers)


def test_a_call_that_is_not_the_decoders_own_is_refused(v3: Any) -> None:
    attention = v3.model.layers[0].self_attn
    hidden = torch.zeros(1, 2, 128)
    positions = v3.model.rotary_emb(hidden, torch.arange(2)[None])
    batch: Any = object()
    with LatentAttention(v3):
        with pytest.raises(UnsupportedModelError, match="a way that is not known"):
            attention(hidden, position_embeddings=positions, attention_mask=torch.ones(2, 2), tierkv=batch)
        with pytest.raises(UnsupportedModelError, match="a way that is not known"):
            attention(hidden, tierkv=batch)
        with pytest.raises(ConfigError, match="packed input"):
            attention(hidden.expand(2, 2, 128), position_embeddings=positions, tierkv=batch)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_a_small_fault_in_16_bits_is_found_in_the_module_that_has_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a bfloat16 model with experts would hide it."""
    from tierkv.engine.mla import attention as mla_attention

    model = make_model("deepseek_v3", block_size=SIZE, dtype=torch.bfloat16)
    assert choose(model).latent is not None
    name = "_attend_latents" if way == "absorbed" else "_attend_cpu"
    right: Callable[..., Any] = getattr(mla_attention, name)

    def near(query: Any, keys: Any, values: Any, *more: Any) -> Any:
        return right(query, keys, values, *more) * (1.05 if keys.shape[1] > 1 else 1.0)  # latents have one head

    def near_latents(*args: Any) -> Any:
        return right(*args) * 1.05

    monkeypatch.setattr(mla_attention, name, near_latents if way == "absorbed" else near)
    with pytest.raises(UnsupportedModelError, match="attention of layer 0 over latents differs by"):
        choose(model, "latent")
    monkeypatch.setattr(mla_self_test, "layer_error", lambda *args: [])
    assert choose(model, "latent").latent is not None, "the logits alone do not find it"
