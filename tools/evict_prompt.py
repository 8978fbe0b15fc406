"""The prompts of `tierkv evict --prompt`: tokens as `tierkv warm` makes them, under the namespaces of one model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tierkv.engine.prompts import PromptRequest, prefix_tokens, read_prompts
from tierkv.errors import ConfigError
from tierkv.storage.codecs import CODECS
from tierkv.tools.evict import PromptBlocks
from tierkv.tools.options import EngineOptions
from tierkv.tools.prefetch import identify

__all__ = ["prompt_blocks"]


def prompt_blocks(prompt: str, options: EngineOptions) -> list[PromptBlocks]:
    """Return the prompts of a file, or a text that is one, under the model's namespace and its lossy ones.

    Raises ConfigError for a file that holds no prompt, and for a text without tokens.
    """
    requests = read_prompts(Path(prompt)) if _is_file(prompt) else [PromptRequest(system=prompt.strip())]
    loaded, namespace = identify(options)
    lossy = [codec.name for codec in CODECS if codec.is_lossy]
    namespaces = [replace(namespace, lossy_codec=name).digest for name in ("", *lossy)]
    found = []
    for request in requests:
        tokens = prefix_tokens(loaded.tokenizer, request)
        if not tokens:
            raise ConfigError("the prompt has no tokens")
        found += [PromptBlocks.of(digest, tokens, options.block_size) for digest in namespaces]
    return found


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:
        return False
