"""The text of stored tokens, by the tokenizer of a local model. Needs no torch, which takes seconds to load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tierkv.engine.embedded_files import EMBEDDED, find_embedded_model
from tierkv.values.files import open_regular

__all__ = ["load_tokenizer"]

_MAX_BYTES = 256 << 20


def load_tokenizer(name: str, *, cache_dir: Path | None) -> Any | None:
    """Return the `tokenizers.Tokenizer` of a model in a local directory; None if it is missing or unreadable.

    cache_dir: the directory that keeps the embedded model. A directory without a tokenizer.json has none.
    """
    path: Path | None = Path(name)
    if name in ("", EMBEDDED):
        path = find_embedded_model(cache_dir) if cache_dir else None
    if path is None or not os.path.isdir(path):
        return None
    try:
        from tokenizers import Tokenizer

        with os.fdopen(open_regular(path / "tokenizer.json"), "rb") as file:
            return Tokenizer.from_buffer(file.read(_MAX_BYTES))
    except Exception:  # noqa: BLE001 - a damaged file makes the library raise anything; the text is optional
        return None
