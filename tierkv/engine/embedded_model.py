"""The embedded model: small and random, made once and kept under a cache directory.

Its answers are nonsense, but it is a real checkpoint, so that every command works offline on a laptop. Users may share
a cache directory: the files are as readable as the umask allows, and a user without access to them makes a copy there.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash

from tierkv.engine.embedded_files import MANIFEST, is_sound, places_of
from tierkv.engine.transformers_import import import_transformers
from tierkv.errors import ConfigError

__all__ = ["ready_embedded_model", "write_embedded_model"]

_SEED = 20_260
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ready_embedded_model(cache_dir: Path) -> Path:
    """Return the directory of the embedded model; make it if it is missing or damaged.

    Raises ConfigError with the name of the file that cannot be read or written.
    """
    failure: OSError | None = None
    for target in places_of(cache_dir):
        try:
            if not is_sound(target):
                _make(target)
            return target
        except OSError as exc:
            failure = failure or exc
    assert failure is not None
    raise ConfigError(
        f"the embedded model can be neither read nor made: {failure.filename or cache_dir}: {failure.strerror}",
        hint="set XDG_CACHE_HOME to a directory of your own, or name a model with --model",
    ) from failure


def write_embedded_model(path: Path) -> None:
    """Write the embedded model's checkpoint into a directory. The seed is fixed, so all machines make the same one."""
    transformers = import_transformers()
    tokenizer = _byte_tokenizer(transformers)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        dtype="float32",
    )
    model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:  # norms keep their ones
                scale = 1.0 if "embed" in parameter_name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _byte_tokenizer(transformers: Any) -> Any:
    """Return a tokenizer with one token per byte, and the special tokens and chat template of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def _make(target: Path) -> None:
    """Write the model into a temporary directory and rename it. Another process may rename its copy first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, damaged = (target.with_name(f".{target.name}.{secrets.token_hex(6)}") for _ in range(2))
    temporary.mkdir()
    try:
        _write_with_manifest(temporary)
        if is_sound(target):
            return
        with suppress(FileNotFoundError):
            os.rename(target, damaged)
        try:
            os.rename(temporary, target)
        except OSError:
            if not is_sound(target):
                raise
    finally:
        for path in (temporary, damaged):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()  # if it was no directory


def _write_with_manifest(path: Path) -> None:
    try:
        write_embedded_model(path)
    except (OSError, ConfigError):
        raise
    except Exception as exc:  # safetensors has an error of its own for a full disk
        raise OSError(errno.EIO, str(exc), str(path)) from exc
    names = sorted(os.listdir(path))
    contents = {name: (path / name).read_bytes() for name in names}
    manifest = {name: (len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in contents.items()}
    (path / MANIFEST).write_text(json.dumps(manifest) + "\n", "utf-8")
    mode = (path / MANIFEST).stat().st_mode & 0o777  # by the umask; some libraries make their files private
    for name in names:
        (path / name).chmod(mode)
