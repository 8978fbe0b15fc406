"""A random model, and the judge of what engines answer with it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.random_models import save_model

__all__ = ["VOCABULARY", "is_answer", "is_tie", "save_llama"]

VOCABULARY = 1000


def save_llama(folder: Path, *, seed: int = 0) -> None:
    """Save a Llama of two layers and VOCABULARY tokens. The spread of its weights makes the greedy tokens stable."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    save_model(folder, config, seed=seed)


def is_answer(folder: Path, prompt: list[int], answer: list[int], *, most: float = 1e-4) -> bool:
    """Return whether each token of an answer is the one that the model, in float64, finds most probable.

    most: how much the logit of another token may be above it, for float32 rounds.
    """
    import torch
    import transformers

    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = judge(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    taken = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return bool((logits.amax(-1) - taken < most).all())


def is_tie(folder: Path, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Return whether two answers part where the model has two tokens as probable as each other.

    The shape of a batch changes the last bits of float32, so that either may be chosen. What follows is not judged.
    """
    end = 1 + next(at for at, (left, right) in enumerate(zip(one, other, strict=True)) if left != right)
    found = [is_answer(folder, prompt, answer[:end]) for answer in (one, other)]
    print(f"answers to {len(prompt)} tokens part at {end - 1}: {one[end - 1]}, {other[end - 1]}; right: {found}")
    return all(found)
