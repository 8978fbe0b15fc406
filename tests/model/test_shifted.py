"""The measurement of documents at other positions: its rotation is exact, and it compares what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, make_model
from torch import Tensor

from benchmarks import shifted
from benchmarks.random_models import save_model
from benchmarks.shifted import RECOMPUTED, Comparison, Row, compare, iter_ways, summarize
from benchmarks.shifted_prompts import KINDS, Prompt, make_prompts
from benchmarks.shifted_rows import (
    Rows,
    check_shiftable,
    compute,
    most_deviating,
    reuse,
    rotate_keys,
    shift_error,
)
from tierkv.engine.model_support import relative_error
from tierkv.errors import ShapeError, UnsupportedModelError

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 5e5,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def made(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SHAPE | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


ROTATED = {
    "llama": lambda: make_model("llama", block_size=16),
    "qwen3": lambda: make_model("qwen3", block_size=16),
    "qwen3_moe": lambda: make_model("qwen3_moe", block_size=16),
    "qwen2": lambda: made("Qwen2"),
    "rope in a quarter of each head": lambda: made("GPTNeoX", rotary_pct=0.25),
    **{f"llama, {name}": lambda rope=rope: made("Llama", rope_parameters=rope) for name, rope in _ROPES.items()},
}
REFUSED = {
    "have windows": lambda: make_model("gemma2", block_size=16),
    "has latents": lambda: make_model("deepseek_v2", block_size=16),
    "has sinks": lambda: made(
        "GptOss",
        layer_types=["full_attention"] * 4,
        sliding_window=None,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "depends on the prompt's length": lambda: made(
        "Llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    ),
    "one rope for all layers": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32)
    ).eval(),
    # found by their error alone
    "differ by": lambda: made("SmolLM3", no_rope_layers=[1, 1, 1, 0]),
    "rotated differ by": lambda: made("Cohere"),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", block_size=16)


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def difference(one: Rows, other: Rows) -> float:
    return max(relative_error(one.keys, other.keys), relative_error(one.values, other.values))


# The rotation


@pytest.mark.parametrize("name", ROTATED)
def test_rotated_keys_are_those_that_the_model_computes_at_the_other_position(name: str) -> None:
    model = ROTATED[name]()
    assert check_shiftable(model) < 1e-5
    assert shift_error(model, shift=3000) < 1e-3  # the model's own angles are float32
    there = compute(model, ids(20, 1), start=500)[0]
    assert difference(there.shifted(model, -500), compute(model, ids(20, 1))[0]) < 1e-4


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_whose_keys_cannot_be_rotated_is_refused(reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_shiftable(REFUSED[reason]())


def test_the_rotation_multiplies_complex_numbers_and_keeps_what_has_no_rope() -> None:
    keys = torch.randn(3, 5, 10, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    got = rotate_keys(keys, frequencies, -7)
    want = torch.complex(keys[..., :3], keys[..., 3:6]) * torch.polar(torch.ones(3).double(), frequencies * -7)
    torch.testing.assert_close(torch.complex(got[..., :3], got[..., 3:6]), want)
    assert torch.equal(got[..., 6:], keys[..., 6:])


def test_keys_of_16_bits_are_rotated_in_32() -> None:
    keys = torch.randn(4, 9, 64)
    frequencies = 1e4 ** -(torch.arange(32) / 32)
    half = rotate_keys(keys.bfloat16(), frequencies, 12_345)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate_keys(keys.bfloat16().float(), frequencies, 12_345).bfloat16())


def test_keys_narrower_than_the_rope_are_refused() -> None:
    with pytest.raises(ShapeError, match="narrower"):
        rotate_keys(torch.zeros(2, 6), torch.ones(4), 1)


# Reuse


def test_a_document_that_is_computed_anew_whole_is_exact(llama: Any) -> None:
    past, document = compute(llama, ids(24, 1))[0], ids(40, 2)
    cached = compute(llama, document)[0]
    got = reuse(llama, past, document, cached, position=0, recomputed=40)
    assert difference(got, compute(llama, torch.cat([ids(24, 1), document], dim=1))[0]) < 1e-5


def test_a_document_from_behind_the_same_prefix_at_another_position_is_exact(llama: Any) -> None:
    """Only the text in front makes an error: with the same text, moved as a whole, there is none."""
    past, document = compute(llama, ids(24, 1))[0], ids(40, 2)
    there = compute(llama, torch.cat([ids(24, 1), document], dim=1), start=300)[0].slice(24, 64)
    exact = compute(llama, document, past)[0]
    for recomputed in (0, 7):
        got = reuse(llama, past, document, there, position=324, recomputed=recomputed)
        assert difference(got.slice(24, 64), exact) < 1e-4
    kept = reuse(llama, past, document, there, position=324, recomputed=0, rotate=False)
    assert relative_error(kept.keys[:, :, :, 24:], exact.keys) > 0.1
    assert torch.equal(kept.values, past.append(there).values)


def test_the_first_tokens_are_exact_and_the_others_are_not(llama: Any) -> None:
    past, document = compute(llama, ids(24, 1))[0], ids(40, 2)
    exact = compute(llama, document, past)[0]
    got = reuse(llama, past, document, compute(llama, document)[0], position=0, recomputed=16).slice(24, 64)
    assert difference(got.slice(0, 16), exact.slice(0, 16)) < 1e-5
    assert difference(got.slice(16, 40), exact.slice(16, 40)) > 1e-2
    first_layer = Rows(keys=got.keys[:1], values=got.values[:1])  # it depends on the tokens alone
    assert difference(first_layer, Rows(keys=exact.keys[:1], values=exact.values[:1])) < 1e-5


def test_the_most_deviating_tokens_are_replaced(llama: Any) -> None:
    exact = compute(llama, ids(30, 1))[0]
    keys, values = exact.keys.clone(), exact.values.clone()
    keys[2, :, :, 5] += 1.0
    values[0, :, :, 11] += 1.0
    keys[1, :, :, 20] += 0.01
    got = most_deviating(Rows(keys=keys, values=values), exact, 2)
    assert torch.equal(got.values, exact.values)
    assert (got.keys != exact.keys).any(dim=(0, 1, 2, 4)).nonzero().flatten().tolist() == [20]


# The comparison


def prompt_of(llama: Any, *, kind: str, fact: list[int]) -> Prompt:
    parts = [ids(count, seed)[0].tolist() for count, seed in ((24, 1), (10, 2), (40, 3), (6, 4))]
    return Prompt(kind=kind, prefix=parts[0], other=parts[1], documents=[parts[2]], query=parts[3], fact=fact)


def test_each_way_is_compared_with_the_exact_answer(llama: Any) -> None:
    prompt = prompt_of(llama, kind="unrelated", fact=[])
    found = {each.way: each for each in compare(llama, prompt)}
    whole = prompt.tokens + prompt.query
    answer = llama.generate(torch.tensor([whole]), max_new_tokens=32, do_sample=False)[0, len(whole) :].tolist()

    def logits_behind(tokens: list[int]) -> Tensor:
        out: Tensor = llama(torch.tensor([tokens + prompt.query + answer[:-1]]), use_cache=False).logits
        return out[0, len(tokens) :].detach()

    want, got = logits_behind(prompt.tokens), logits_behind(prompt.prefix)
    kl = torch.nn.functional.kl_div(
        got.log_softmax(dim=-1), want.log_softmax(dim=-1), reduction="none", log_target=True
    ).sum(dim=-1)
    bare = found["no documents"]
    # Without documents the query is nearer to the prefix, so the positions are others than in a prompt with a gap.
    torch.testing.assert_close(torch.tensor(bare.kl), kl, rtol=1e-3, atol=1e-4, check_dtype=False)
    assert bare.logit_error == pytest.approx(relative_error(got, want), rel=1e-3)
    assert bare.agrees == (got[len(prompt.query) - 1 :].argmax(dim=-1) == torch.tensor(answer)).tolist()
    assert found["exact, 1000 rotated back"].logit_error < 1e-3
    assert max(found["exact, 1000 rotated back"].kl) < 1e-4
    assert all(found["exact, 1000 rotated back"].agrees)
    assert found["alone, first 0"].logit_error > 1e-2
    assert all(each.is_right is None for each in found.values())


def test_ways_leave_out_what_would_compute_the_whole_document(llama: Any) -> None:
    prompt = prompt_of(llama, kind="one fact", fact=[])
    exact = compute(llama, torch.tensor([prompt.tokens]))[0]
    ways = {way.name: way for way in iter_ways(llama, prompt, exact)}
    assert "exact, 1000 rotated back" not in ways  # of one kind alone
    assert {name for name in ways if "first" in name} == {
        f"{source}, first {count}" for source in ("alone", "elsewhere") for count in RECOMPUTED if count < 40
    }
    assert ways["alone, first 16"].share == 0.4
    best = ways["elsewhere, best 15% exact"].rows
    same = (best.keys == exact.keys).all(dim=4).all(dim=(0, 1, 2))
    assert int(same[24:].sum()) == round(0.15 * 40)
    behind_other = compute(llama, torch.tensor([prompt.other + prompt.documents[0]]))[0].slice(10, 50)
    assert difference(ways["elsewhere, first 0"].rows.slice(24, 64), behind_other.shifted(llama, 14)) < 1e-5


def test_an_answer_is_right_where_it_begins_with_the_fact(llama: Any) -> None:
    plain = prompt_of(llama, kind="one fact", fact=[])
    whole = plain.tokens + plain.query
    answer = llama.generate(torch.tensor([whole]), max_new_tokens=3, do_sample=False)[0, len(whole) :].tolist()
    found = {each.way: each.is_right for each in compare(llama, prompt_of(llama, kind="one fact", fact=answer))}
    assert found["exact, as bfloat16"] is True
    assert found["no documents"] is False
    wrong = [*answer[:2], (answer[2] + 1) % VOCABULARY]
    assert {each.is_right for each in compare(llama, prompt_of(llama, kind="one fact", fact=wrong))} == {None}


def test_rows_are_means_over_prompts_and_tokens() -> None:
    common: dict[str, Any] = {"kind": "one fact", "way": "alone, first 0", "share": 0.0}
    found = [
        Comparison(**common, logit_error=0.1, kl=[0.0] * 99, agrees=[True] * 4, is_right=True),
        Comparison(**common, logit_error=0.3, kl=[1.0], agrees=[True, False] * 2, is_right=False),
        Comparison(**common, logit_error=0.2, kl=[0.0] * 100, agrees=[True] * 4, is_right=None),
    ]
    assert summarize(found) == [
        Row(
            **common,
            logit_error=pytest.approx(0.2),
            kl=pytest.approx(1 / 200),
            kl_p99=0.0,
            agreement=pytest.approx(10 / 12),
            equal_answers=pytest.approx(2 / 3),
            right=1,
            asked=2,
        )
    ]


def test_prompts_are_the_same_for_a_seed_and_hold_their_facts() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    prompts = list(make_prompts(encode, 2, seed=3))
    assert prompts == list(make_prompts(encode, 2, seed=3)) != list(make_prompts(encode, 2, seed=4))
    assert [each.kind for each in prompts] == [*KINDS, *KINDS]
    for prompt in prompts:
        assert {len(document) for document in prompt.documents} == {256 if prompt.kind == "four facts" else 512}
        text = bytes(prompt.tokens).decode(errors="replace")
        assert text.count("The access code of the") == len(prompt.documents) * bool(prompt.fact)
        if prompt.fact:
            asked = bytes(prompt.query).decode().rpartition("Answer: ")[2] + bytes(prompt.fact).decode()
            assert f"\n\n{asked}.\n\n" in text


def test_the_command_says_how_many_prompts_it_had_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.LlamaConfig(**_SHAPE | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32})
    save_model(tmp_path / "model", config)
    kept = tmp_path / "rows.json"
    arguments = ["--model", str(tmp_path / "model"), "--minutes", "0", "--device", "cpu", "--json", str(kept)]
    monkeypatch.setattr(sys, "argv", ["shifted", *arguments])
    shifted.main()
    printed = capsys.readouterr().out
    assert "prompts: 1 of 32" in printed
    assert "alone, first 256" in printed
    assert {row["kind"] for row in json.loads(kept.read_text())["rows"]} == {"continued"}
