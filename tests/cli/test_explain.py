"""`tierkv explain`: how far a prompt is stored, and why no further."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tierkv.storage.cold import ColdStore
from tierkv.tools.namespace_words import how_it_differs

Command = Callable[..., Any]
SYSTEM = "You are a careful assistant. " * 12 + "Answer briefly."
SIZE = ("--block-size", 16)


@pytest.fixture
def system(command: Command, tmp_path: Path) -> Path:
    """Warm a system prompt; return its file."""
    path = tmp_path / "system.txt"
    path.write_text(SYSTEM)
    assert command("warm", path, *SIZE).code == 0
    return path


def explain(command: Command, *arguments: object) -> dict[str, Any]:
    printed = command("explain", *arguments, "--json")
    assert printed.code == 0, printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def test_it_finds_what_a_run_finds(command: Command, system: Path) -> None:
    found = explain(command, "Hello", "--system", system, *SIZE)
    answer = json.loads(command("run", "Hello", "--system", system, *SIZE, "--max-new-tokens", 1, "--json").out)
    assert (
        found["cached_tokens"] == {"warm": 0, "cold": answer["cached_tokens"]["cold"]} and found["found_tokens"] > 300
    )
    assert found["prompt_tokens"] == answer["prompt_tokens"]
    assert found["reason"] == "nothing is stored behind it"
    assert found["before"].endswith("<|im_start|>user\n") and found["prompt"].startswith("Hello<|im_end|>")
    assert "stored" not in found


def test_it_shows_both_texts_where_they_part(command: Command, system: Path) -> None:
    assert command("run", "How do I begin?", "--system", system, *SIZE, "--max-new-tokens", 1).code == 0
    found = explain(command, "How do I end?", "--system", system, *SIZE)
    assert found["reason"] == "another text is stored from there on"
    assert found["before"].endswith("How do I ") and found["prompt"].startswith("end?")
    assert found["stored"].startswith("beg")
    printed = command("explain", "How do I end?", "--system", system, *SIZE)
    assert "end?<|im_end|>\\n" in printed.out, "in one line"


def test_a_prompt_that_parts_at_its_beginning_is_shown_beside_a_stored_one(command: Command, system: Path) -> None:
    # ChatML begins every prompt alike, so the texts part behind its first token at the earliest.
    found = explain(command, "Hello", *SIZE)
    assert found["before"] == "<|im_start|>" and found["prompt"].startswith("user\n")
    assert found["stored"].startswith("system\n")


def test_a_prompt_that_is_stored_whole_has_its_last_token_left(command: Command, system: Path) -> None:
    assert command("run", "Hello", "--system", system, *SIZE, "--max-new-tokens", 4).code == 0
    found = explain(command, "Hello", "--system", system, *SIZE)
    assert found["found_tokens"] == found["prompt_tokens"] - 1
    assert found["reason"].startswith("found whole") and "before" not in found


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (("--dtype", "bfloat16", *SIZE), "the same model in float32"),
        (("--block-size", 32), "the same model in blocks of 16 tokens"),
        (("--salt", "another", *SIZE), "the same model without --salt"),
        (("--codec", "lossy-int8", *SIZE), "the same model through --codec auto"),
    ],
)
def test_it_names_the_field_of_the_namespace_that_differs(
    command: Command, system: Path, options: tuple[object, ...], how: str
) -> None:
    found = explain(command, "Hello", "--system", system, *options)
    assert found["found_tokens"] == 0 and found["namespace"] is None
    assert found["reason"].startswith("nothing is stored for this model")
    (other,) = found["elsewhere"]
    assert other["how"] == how and other["found_tokens"] > 300
    assert f"{how} has {other['found_tokens']} tokens" in " ".join(
        command("explain", "Hello", "--system", system, *options).out.replace("│", " ").split()
    )


def test_a_namespace_that_has_no_more_is_not_named(command: Command, system: Path) -> None:
    assert command("warm", system, "--block-size", 32).code == 0
    assert explain(command, "Hello", "--system", system, *SIZE)["elsewhere"] == []


def test_the_weights_are_read_only_if_asked(command: Command, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = explain(command, "Hello", "--system", system, *SIZE, "--read-weights")
    assert exact["weights_compared"] and exact["found_tokens"] > 300

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    quick = explain(command, "Hello", "--system", system, *SIZE)
    assert not quick["weights_compared"]
    assert {**quick, "weights_compared": True} == exact


def test_other_weights_of_the_same_configuration_are_told_apart_only_by_reading_them(
    command: Command, system: Path, embedded_cache: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_cache / "tierkv" / "embedded-model-1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_cache / "tierkv" / "embedded-model-1")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    tuned = ("--model", tmp_path / "tuned", "--system", system, *SIZE)
    guessed = explain(command, "Hello", *tuned)
    assert guessed["found_tokens"] > 300 and not guessed["weights_compared"]
    exact = explain(command, "Hello", *tuned, "--read-weights")
    assert exact["found_tokens"] == 0
    assert exact["elsewhere"][0]["how"] == "the same model with other weights or settings"
    assert command("warm", system, "--model", tmp_path / "tuned", *SIZE).code == 0
    assert explain(command, "Hello", *tuned)["fitting_namespaces"] == 2
    assert "1 more namespaces fit" in " ".join(command("explain", "Hello", *tuned).out.replace("│", " ").split())


def test_several_prompts_are_explained_one_by_one(command: Command, system: Path) -> None:
    found = explain(command, "Hello", "Goodbye", "--system", system, *SIZE)
    assert [each["prompt"].split("<")[0] for each in found["prompts"]] == ["Hello", "Goodbye"]


def test_it_notes_no_use(command: Command, system: Path, tmp_path: Path) -> None:
    def entries() -> list[tuple[float, int]]:
        with ColdStore(tmp_path / "store", read_only=True) as store:
            return [(entry.last_access, entry.access_count) for _, entry in store.iter_entries()]

    before = entries()
    explain(command, "Hello", "--system", system, *SIZE)
    assert entries() == before


def test_without_a_store_there_is_nothing_to_explain(command: Command) -> None:
    printed = command("explain", "Hello")
    assert printed.code == 2 and "there is no store" in printed.err


def test_a_model_of_another_kind_is_named_with_its_fields() -> None:
    stored = {"name": "other", "dtype": "float32", "architecture": {"class": "A", "a": 1, "b": 2, "c": 3}}
    wanted = {"dtype": "float32", "architecture": {"class": "B", "a": 2, "b": 3, "c": 4}}
    assert how_it_differs(wanted, stored) == (
        "other, which differs in architecture.a, architecture.b, architecture.c and 1 more fields"
    )


def test_ids_that_the_tokenizer_does_not_know_are_numbers() -> None:
    from tierkv.tools.explain import _text

    class Narrow:
        def decode(self, *_: object, **__: object) -> str:
            raise IndexError

    assert _text(Narrow(), np.arange(3).tolist()) == "0 1 2"
