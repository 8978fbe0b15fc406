from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from places import Place
from tiny_models import FAMILIES, make_model
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from tierkv.engine import model_support
from tierkv.engine.attention import use_tierkv_attention
from tierkv.engine.model_support import check_block_size, check_supported, context_of, probe_layout, self_test
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_families_that_people_serve_pass(family: str, place: Place) -> None:
    model = make_model(family, block_size=place.block_size, device=place.device, dtype=place.dtype)
    check_supported(model)
    layout = probe_layout(model, block_size=place.block_size)
    assert layout.layers == (LayerLayout(kv_heads=2, k_dim=64, v_dim=64),) * 3
    self_test(model, layout)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        }
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=256))
    with pytest.raises(UnsupportedModelError, match=f"rope depends on the prompt's length .{kind}"):
        check_supported(model)


def test_a_model_with_state_beside_k_and_v_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM cannot be cached"):
        check_supported(model)


def test_an_encoder_is_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UnsupportedModelError, match="it is an encoder"):
        check_supported(BertLMHeadModel(config))


class LooksAhead(LlamaForCausalLM):  # type: ignore[misc]
    """A model whose logits depend on later tokens."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """Add the mean of all embeddings to each token's logits."""
        mean = self.model.embed_tokens(input_ids).mean(1, keepdim=True)
        output = super().forward(input_ids, **options)
        output.logits = output.logits + mean.sum() * torch.arange(output.logits.shape[-1])
        return output


def test_a_model_whose_tokens_depend_on_later_ones_fails_the_self_test() -> None:
    torch.manual_seed(0)
    model = LooksAhead(LlamaConfig(**SMALL)).eval()
    with pytest.raises(UnsupportedModelError, match="fails the self-test"):
        self_test(model, probe_layout(model, block_size=16))


@pytest.mark.parametrize(("kind", "is_refused"), [(LlamaForCausalLM, False), (LooksAhead, True)])
def test_more_rounding_than_usual_is_told_from_a_model_that_cannot_be_split(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], is_refused: bool
) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SMALL)).eval().to(torch.bfloat16)
    monkeypatch.setitem(model_support.TOLERANCE, "bfloat16", 1e-5)  # as if 32 layers had rounded
    with pytest.raises(UnsupportedModelError, match="fails the self-test") if is_refused else nullcontext():
        self_test(model, probe_layout(model, block_size=16))
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_that_attends_twice_in_a_layer_is_refused() -> None:
    model = make_model("llama", block_size=16)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match="layer 0 is called twice"):
        probe_layout(model, block_size=16)


def test_attention_is_put_back_even_after_an_error() -> None:
    model = make_model("llama", block_size=16)
    with pytest.raises(ConfigError, match="without a tierkv batch"), use_tierkv_attention(model):
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_blocks_that_no_prompt_of_the_model_fills_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=128))
    check_block_size(model, 128)
    with pytest.raises(ConfigError, match="the context of LlamaForCausalLM is 128"):
        check_block_size(model, 129)


@pytest.mark.parametrize(("block_size", "split_at"), [(1024, 1024), (1025, 769), (1 << 20, 768)])
def test_the_self_test_costs_no_more_for_long_blocks_and_keeps_their_remainder(
    monkeypatch: pytest.MonkeyPatch, block_size: int, split_at: int
) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=1 << 21)).eval()
    pools: list[int] = []

    class Pool(HotPool):
        def __init__(self, layout: BlockLayout, num_blocks: int, device: torch.device) -> None:
            pools.append(layout.block_size)
            super().__init__(layout, num_blocks, device)

    monkeypatch.setattr(model_support, "HotPool", Pool)
    self_test(model, probe_layout(model, block_size=block_size))
    assert pools == [split_at]


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_a_stretched_rope_knows_as_many_more_positions(rope: dict[str, Any], context: int) -> None:
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 512}, rope_parameters=rope)
    assert context_of(LlamaForCausalLM(config)) == context
