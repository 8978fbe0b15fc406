"""A model that changes while a runner is open is noticed: no K and V are served, or stored, under another's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from tiny_models import VOCABULARY, make_model
from torch import Tensor, nn

from tierkv.config import CacheConfig
from tierkv.engine import checksums
from tierkv.engine.attention import forward
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.errors import ConfigError, TierKVError, UnsupportedModelError

BLOCK = 16


@pytest.fixture
def model() -> Any:
    return make_model("llama", block_size=BLOCK)


@contextmanager
def opened(model: Any, store: Path | None = None, **options: Any) -> Iterator[Runner]:
    config = CacheConfig(
        cold_path=store, block_size=BLOCK, hot_bytes=8 << 20, warm_bytes=4 << 20, cold_bytes=64 << 20, min_free_bytes=0
    )
    with open_runner(LoadedModel(model, None, "tiny"), config, **options) as runner:
        yield runner


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(count: int = 2, **options: Any) -> GenerationOptions:
    """Whole blocks only, unless the test says else: so the blocks and steps can be counted."""
    return GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), **{"store_partial": False, **options})


def attention(model: Any) -> Any:
    return model.model.layers[1].self_attn


def write_one_number(model: Any) -> None:
    attention(model).k_proj.weight.data[3, 5] += 1


def write_rope_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(2)


def replace_parameter(model: Any) -> None:
    old = attention(model).k_proj.weight
    attention(model).k_proj.weight = nn.Parameter(old.detach() * 2)


def replace_memory(model: Any) -> None:
    attention(model).k_proj.weight.data = attention(model).k_proj.weight.data * 2


def load_others(model: Any) -> None:
    model.load_state_dict(make_model("llama", block_size=BLOCK, seed=5).state_dict())


def replace_module(model: Any) -> None:
    attention(model).k_proj = nn.Linear(128, 128, bias=False).eval()


def change_class(model: Any) -> None:
    attention(model).k_proj.__class__ = Doubled


class Doubled(nn.Linear):
    """A projection of other K from the same weights."""

    def forward(self, given: Tensor) -> Tensor:
        """Return the product twice."""
        return 2 * super().forward(given)


def change_scaling(model: Any) -> None:
    attention(model).scaling = 0.01


def change_rope_scaling(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


def change_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def change_config(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0


def add_hook(model: Any) -> None:
    attention(model).k_proj.register_forward_hook(lambda module, given, output: output * 2)


def add_pre_hook(model: Any) -> None:
    attention(model).register_forward_pre_hook(lambda module, given: None)


def replace_forward(model: Any) -> None:
    own = attention(model).k_proj.forward
    attention(model).k_proj.forward = lambda given: own(given) * 2


def train(model: Any) -> None:
    model.train()


def train_one(model: Any) -> None:
    model.model.layers[2].mlp.train()


CHANGES = [
    write_one_number,
    write_rope_frequencies,
    replace_parameter,
    replace_memory,
    load_others,
    replace_module,
    change_class,
    change_scaling,
    change_rope_scaling,
    change_epsilon,
    change_config,
    add_hook,
    add_pre_hook,
    replace_forward,
    train,
    train_one,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_while_a_runner_is_open_refuses_what_comes_and_stores_nothing(
    model: Any, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    known, new = tokens(40), tokens(40, seed=2)
    with opened(model, tmp_path / "store") as runner:
        runner.generate([known], greedy())
        change(model)
        calls = (
            lambda p: runner.generate([p], greedy(store_partial=True)),
            lambda p: list(runner.stream([p])),
            runner.prefill,
        )
        for prompt in (known, new):
            for call in calls:
                with pytest.raises(TierKVError, match=r"changed|train mode|hook|forward"):
                    call(prompt)
        with pytest.raises(TierKVError):
            runner.check_model()
        assert runner.cache.match(new).num_cached_tokens == 0
        runner.cache.check()


@pytest.mark.parametrize("length", [BLOCK - 1, 3], ids=["at a block's end", "in a block"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_tokens_of_a_stream_gives_no_other_token_and_stores_nothing(
    model: Any, change: Callable[[Any], None], length: int
) -> None:
    prompt = tokens(length)
    with opened(model) as runner:
        stream = runner.stream([prompt], greedy(8, store_partial=True))
        first = next(stream).token_id
        change(model)
        with pytest.raises(TierKVError):
            next(stream)
        assert runner.cache.match([*prompt, first, 7]).num_cached_tokens <= length
        runner.cache.check()


def test_a_model_that_is_what_it_was_again_is_served_again(model: Any) -> None:
    with opened(model) as runner:
        (want,) = runner.generate([tokens(40)], greedy())
        change_scaling(model)
        with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.scaling"):
            runner.generate([tokens(40)], greedy())
        attention(model).scaling = 64**-0.5
        assert runner.generate([tokens(40)], greedy())[0].token_ids == want.token_ids


@contextmanager
def patched(place: Any, name: str) -> Iterator[None]:
    own = getattr(place, name)
    setattr(place, name, lambda *given, **options: own(*given, **options))
    try:
        yield
    finally:
        setattr(place, name, own)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (modeling.LlamaAttention, "forward"),
        (nn.Linear, "forward"),
        (modeling, "apply_rotary_pos_emb"),
        (modeling, "rotate_half"),  # which the one before calls
    ],
    ids=["class", "class of torch", "function", "function of a function"],
)
def test_code_that_is_replaced_while_a_runner_is_open_is_noticed(model: Any, place: Any, name: str) -> None:
    with opened(model) as runner:
        runner.generate([tokens(20)], greedy())
        with patched(place, name), pytest.raises(TierKVError, match=name):
            runner.generate([tokens(20)], greedy())
        runner.generate([tokens(20)], greedy())


def test_a_hook_of_all_modules_is_refused_while_it_is_there(model: Any) -> None:
    with opened(model) as runner:
        hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
        try:
            with pytest.raises(UnsupportedModelError, match="all modules"):
                runner.generate([tokens(20)], greedy())
        finally:
            hook.remove()
        runner.generate([tokens(20)], greedy())


@pytest.mark.parametrize(
    "change", [train, train_one, add_hook, add_pre_hook, replace_forward], ids=lambda c: c.__name__
)
def test_a_model_whose_k_and_v_depend_on_more_is_refused_at_opening(
    model: Any, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    change(model)
    with pytest.raises(TierKVError), opened(model, tmp_path / "store"):
        pass
    assert not (tmp_path / "store").exists()


def test_autocast_is_refused_at_opening_and_while_open(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"), opened(model):
        pass
    with opened(model) as runner:
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
            runner.generate([tokens(20)], greedy())
        runner.generate([tokens(20)], greedy())


def test_another_default_dtype_is_refused_while_open_and_another_namespace_at_opening(model: Any) -> None:
    layout = probe_layout(model, block_size=BLOCK)
    before = namespace_of(model, layout).digest
    with opened(model) as runner:
        torch.set_default_dtype(torch.float64)
        try:
            with pytest.raises(ConfigError, match="default dtype"):
                runner.generate([tokens(20)], greedy())
            assert namespace_of(model, layout).digest != before
        finally:
            torch.set_default_dtype(torch.float32)


class Quantised(nn.Linear):
    """Keeps a tensor, an object with a tensor, and a number of its own, as quantised layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.absmax = torch.ones(linear.out_features)
        self.quant_state = SimpleNamespace(scales=torch.ones(linear.out_features), blocksize=64)
        self.zero_points = [0.0, 0.0]

    def forward(self, given: Tensor) -> Tensor:
        """Return the product, scaled."""
        scale = self.absmax * self.quant_state.scales * (self.quant_state.blocksize / 64)
        return super().forward(given) * scale + self.zero_points[1]


QUANTISED: dict[str, Callable[[Quantised], object]] = {
    "tensor": lambda layer: layer.absmax.data.mul_(2),
    "other tensor": lambda layer: setattr(layer, "absmax", layer.absmax * 2),
    "tensor of an object": lambda layer: layer.quant_state.scales.data[3].add_(1),
    "number of an object": lambda layer: setattr(layer.quant_state, "blocksize", 32),
    "number of a list": lambda layer: layer.zero_points.__setitem__(1, 0.5),
}


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_what_a_quantised_layer_keeps_beside_parameters_is_identity_and_is_watched(model: Any, name: str) -> None:
    attention(model).k_proj = layer = Quantised(attention(model).k_proj).eval()
    layout = probe_layout(model, block_size=BLOCK)
    before = namespace_of(model, layout)
    assert namespace_of(model, layout).digest == before.digest
    with opened(model) as runner:
        assert runner.cache.namespace.digest == before.digest
        runner.generate([tokens(20)], greedy())
        QUANTISED[name](layer)
        with pytest.raises(ConfigError, match="changed"):
            runner.generate([tokens(20)], greedy())
    assert namespace_of(model, layout).digest != before.digest


class Counting(nn.Linear):
    """Counts its calls, in a number and in a buffer: which decides nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.num_calls = 0
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        """Return the product."""
        self.num_calls += 1
        self.calls += 1
        self.last = given
        return super().forward(given)


def test_what_a_pass_changes_by_itself_is_neither_identity_nor_a_change(model: Any, tmp_path: Path) -> None:
    attention(model).k_proj = Counting(attention(model).k_proj).eval()
    digests = set()
    for _ in range(2):
        with opened(model, tmp_path / "store") as runner:
            digests.add(runner.cache.namespace.digest)
            runner.prefill(tokens(40))
            (found,) = runner.generate([tokens(40)], greedy())
            assert sum(found.cached_tokens.values()) >= 2 * BLOCK
            runner.check_model()
    assert len(digests) == 1


class Noisy(nn.Linear):
    """Adds a little noise, whatever mode it is in."""

    noise = 1e-3

    def forward(self, given: Tensor) -> Tensor:
        """Return the product, and noise."""
        product = super().forward(given)
        return product + self.noise * torch.randn_like(product)


@pytest.mark.parametrize("noise", [1.0, 1e-5])
def test_a_model_that_is_random_fails_the_self_test_however_little(
    model: Any, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noisy, "noise", noise)
    attention(model).k_proj.__class__ = Noisy
    with pytest.raises(UnsupportedModelError, match="two equal passes differ"), opened(model):
        pass


def test_settings_of_modules_are_identity(model: Any) -> None:
    layout = probe_layout(model, block_size=BLOCK)
    digests = {namespace_of(model, layout).digest}
    for change in (change_scaling, change_rope_scaling, change_epsilon, change_class):
        change(model)
        digests.add(namespace_of(model, layout).digest)
    assert len(digests) == 5


def test_a_model_from_disk_has_the_namespace_of_the_one_that_was_saved(model: Any, tmp_path: Path) -> None:
    layout = probe_layout(model, block_size=BLOCK)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert namespace_of(loaded, layout).identity() == namespace_of(model, layout).identity()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("use", ["switch", "disable", "scale", "scale in place", "merge"])
def test_the_active_adapter_and_its_scale_are_watched_and_are_identity(model: Any, use: str) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, options, adapter_name="A")
    adapted.add_adapter("B", options)
    adapted.set_adapter("A")
    adapted.eval()
    inner = adapted.base_model.model
    layout = probe_layout(inner, block_size=BLOCK)
    before = namespace_of(inner, layout, adapter="A").digest
    scalings = [module.scaling for module in inner.modules() if isinstance(getattr(module, "scaling", None), dict)]
    with opened(inner, adapter="A") as runner:
        runner.generate([tokens(20)], greedy())
        if use == "switch":
            adapted.set_adapter("B")
        elif use == "disable":
            adapted.base_model.disable_adapter_layers()
        elif use == "merge":
            adapted.merge_adapter()
        elif use == "scale in place":
            scalings[0]["A"] *= 2
        else:
            adapted.base_model.model.model.layers[0].self_attn.k_proj.scaling = {"A": 9.0, "B": 1.0}
        with pytest.raises(ConfigError, match="changed"):
            runner.generate([tokens(20)], greedy())
    assert namespace_of(inner, layout, adapter="A").digest != before


def test_between_two_passes_the_model_is_everybodys(model: Any) -> None:
    ids = torch.tensor([tokens(10)])
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    with opened(model) as runner:
        (answer,) = runner.generate([tokens(20)], greedy())
        assert model.config._attn_implementation == "sdpa"
        stream = runner.stream([tokens(20)], greedy())
        next(stream)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
        model(ids, output_hidden_states=True)
        model.generate(ids, max_new_tokens=2, do_sample=False, cache_implementation="static")
        model.train().eval()
        assert len(list(stream)) == 1
        assert runner.generate([tokens(20)], greedy())[0].token_ids == answer.token_ids
        runner.check_model()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)


def test_two_runners_share_a_model_and_close_in_any_order(model: Any, tmp_path: Path) -> None:
    prompt = tokens(40)
    first, second = opened(model, tmp_path / "a"), opened(model, tmp_path / "b")
    one = first.__enter__()
    (want,) = one.generate([prompt], greedy(6))
    stream = one.stream([prompt], greedy(6))
    got = [next(stream).token_id]
    other = second.__enter__()
    assert other.generate([prompt], greedy(6))[0].token_ids == want.token_ids
    got += [event.token_id for event in stream]
    assert got == want.token_ids
    first.__exit__(None, None, None)
    (again,) = other.generate([prompt], greedy(6))
    assert again.token_ids == want.token_ids and sum(again.cached_tokens.values()) == 2 * BLOCK
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_a_call_of_the_model_from_inside_a_pass_says_why_it_fails(model: Any) -> None:
    from tierkv.engine.attention import use_tierkv_attention

    with use_tierkv_attention(model), pytest.raises(ConfigError, match="another thread"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)


def test_a_pass_after_which_the_model_is_another_is_not_committed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are written while a pass runs, by another thread say, are found after it and before its commit."""
    prompt = tokens(5 * BLOCK)
    passes = 0

    def forward_and_write(*given: Any, **options: Any) -> Tensor:
        nonlocal passes
        passes += 1
        logits = forward(*given, **options)
        if passes == 3:
            write_one_number(model)
        return logits

    with opened(model, max_step_tokens=BLOCK) as runner:
        monkeypatch.setattr("tierkv.engine.attention.forward", forward_and_write)
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.prefill(prompt)
        assert passes == 4, "the third is checked while the fourth is computed"
        assert runner.cache.match(prompt).num_cached_tokens == 2 * BLOCK
        runner.cache.check()


def test_an_answer_that_a_stop_token_ends_is_checked_and_then_stored(model: Any) -> None:
    prompt = tokens(3)
    with opened(model) as runner:
        (free,) = runner.generate([prompt], greedy(6, use_cache=False))
        assert free.token_ids[3] not in free.token_ids[:3]
        stopped = GenerationOptions(max_new_tokens=6, stop_ids=frozenset(free.token_ids[3:4]), store_partial=True)
        (answer,) = runner.generate([prompt], stopped)
        assert answer.token_ids == free.token_ids[:4]
        runner.cache.flush()
        assert runner.cache.match([*prompt, *answer.token_ids, 7]).num_cached_tokens == len(prompt) + 3


@pytest.mark.parametrize("store_partial", [True, False])
def test_a_change_amid_a_call_is_told_when_a_stop_token_ends_it(
    model: Any, monkeypatch: pytest.MonkeyPatch, store_partial: bool
) -> None:
    prompt = tokens(3)
    with opened(model) as runner:
        (free,) = runner.generate([prompt], greedy(6, use_cache=False))
        assert free.token_ids[3] not in free.token_ids[:3]
        stopped = GenerationOptions(
            max_new_tokens=6, stop_ids=frozenset(free.token_ids[3:4]), store_partial=store_partial
        )
        passes = 0

        def forward_and_write(*given: Any, **options: Any) -> Tensor:
            nonlocal passes
            passes += 1
            logits = forward(*given, **options)
            if passes == 4:
                write_one_number(model)
            return logits

        monkeypatch.setattr("tierkv.engine.attention.forward", forward_and_write)
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.generate([prompt], stopped)
        assert passes == 4
        runner.cache.check()


def test_a_change_between_two_calls_gives_no_token_although_no_block_is_completed(model: Any) -> None:
    with opened(model) as runner:
        runner.generate([tokens(20)], greedy())
        write_one_number(model)
        with pytest.raises(ConfigError, match="weights have changed"):
            next(runner.stream([tokens(3, seed=9)], greedy(6)))
        runner.cache.check()


def test_a_large_model_is_sampled_and_every_byte_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "WHOLE_BYTES", 0)
    monkeypatch.setattr(checksums, "PHASES", 16)
    tensors = [torch.zeros(64, 1024), torch.zeros(3), torch.zeros(1000, dtype=torch.bfloat16), torch.zeros(0)]
    sums = checksums.Checksums([*tensors, tensors[0].T])
    assert sums.num_bytes == 64 * 4096 + 12 + 2000 and sums.phases == 16
    assert all(sums.start()() for _ in range(40)) and sums.is_same()
    for tensor, place in ((tensors[0], 123_456 // 4), (tensors[1], 2), (tensors[2], 999)):
        flat = tensor.view(-1)
        flat[place] = 1
        noticed = [not sums.start()() for _ in range(16)]
        assert any(noticed) and not sums.is_same()
        flat[place] = 0
        assert sums.is_same()
    tensors[0][5:9] = 1  # 16 lines in a row: every sample has one of them
    assert not any(sums.start()() for _ in range(16))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small models be sampled as large ones are."""
    monkeypatch.setattr(checksums, "WHOLE_BYTES", 0)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("sync", ["all", "one layer's keys", "counted"])
def test_a_sync_of_a_sampled_model_is_noticed_by_the_next_request(model: Any, sync: str) -> None:
    other = make_model("llama", block_size=BLOCK, seed=5)
    with opened(model) as runner:
        runner.generate([tokens(20)], greedy())
        if sync == "all":
            for old, new in zip(model.parameters(), other.parameters(), strict=True):
                old.data.copy_(new)
        elif sync == "counted":
            with torch.no_grad():
                attention(model).k_proj.weight[3, 5] += 1  # one number, but torch counts it
        else:
            attention(model).k_proj.weight.data.copy_(attention(other).k_proj.weight)
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.generate([tokens(20)], greedy())


@pytest.mark.usefixtures("sampled")
def test_one_number_of_a_sampled_model_is_noticed_by_asking_and_once_its_turn_has_come(model: Any) -> None:
    with opened(model) as runner:
        runner.check_model()
        attention(model).k_proj.weight.data[3, 5] += 1
        with pytest.raises(ConfigError, match="weights have changed"):
            runner.check_model()
        stream = runner.stream([tokens(3)], greedy(200))  # a pass looks at one line of the 64 of this weight
        with pytest.raises(ConfigError, match="weights have changed"):
            list(stream)
