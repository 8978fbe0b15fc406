"""Models of random weights, saved as engines read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["save_model"]


def save_model(folder: Path, config: Any, *, seed: int = 0, device: str = "cpu") -> None:
    """Save a model of a Transformers configuration, in its dtype, and a tokenizer with a word for each token."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
    ).save_pretrained(folder)
