"""`--mla`: commands of a DeepSeek model keep the latent, and name a store of its expanded K and V."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from benchmarks.random_models import save_model
from tierkv.tools.namespace_words import how_it_differs

Command = Callable[..., Any]
SIZE = ("--block-size", 16)


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
        max_position_embeddings=1024,
        dtype="float32",
    )
    save_model(tmp_path / "deepseek", config)
    return tmp_path / "deepseek"


def test_expanded_blocks_of_the_same_model_are_named_by_explain_and_inspect(
    command: Command, deepseek: Path, tmp_path: Path
) -> None:
    text = " ".join(f"t{7 * i % 250}" for i in range(70))
    (tmp_path / "prompt.txt").write_text(text)

    def explain(*options: str) -> dict[str, Any]:
        printed = command(
            "explain", "t3 t4", "--system", tmp_path / "prompt.txt", "--model", deepseek, *SIZE, *options, "--json"
        )
        assert printed.code == 0, printed.err
        found: dict[str, Any] = json.loads(printed.out)
        return found

    warm = ("warm", tmp_path / "prompt.txt", "--model", deepseek, *SIZE)
    printed = command(*warm, "--mla", "expanded")
    assert printed.code == 0, printed.err
    assert explain("--mla", "expanded")["found_tokens"] >= 64
    missed = explain()
    assert missed["found_tokens"] == 0
    assert missed["elsewhere"][0]["how"] == "the same model with expanded K and V (--mla expanded)"
    assert command(*warm).code == 0
    assert explain()["found_tokens"] >= 64
    assert explain("--read-weights")["found_tokens"] >= 64
    inspected = " ".join(command("inspect").out.split())
    assert "it differs in architecture.mla, layers" in inspected


def test_an_unknown_wish_is_refused(command: Command, deepseek: Path) -> None:
    printed = command("run", "t1 t2", "--model", deepseek, *SIZE, "--mla", "compressed")
    assert printed.code == 2 and 'mla must be "auto", "latent" or "expanded"' in printed.err


def test_the_latent_in_a_store_is_named() -> None:
    wanted = {"architecture": {"class": "A"}, "layers": [[4, 32, 16]]}
    stored = {"name": "a", "architecture": {"class": "A", "mla": {"cache": "latent"}}, "layers": [[1, 48, 0]]}
    assert how_it_differs(wanted, stored) == "the same model with the latent in its blocks (--mla latent)"
    assert how_it_differs(wanted, {**wanted, "layers": [[4, 32, 8]]}) == "unnamed, which differs in layers"
