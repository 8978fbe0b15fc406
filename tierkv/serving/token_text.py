"""How single tokens are written: as text and as bytes, for log-probabilities."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

__all__ = ["TokenTexts"]


class TokenTexts:
    """Text and bytes of a tokenizer's tokens. A byte-level tokenizer has tokens that are a part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_of = _byte_alphabet() if _is_byte_level(tokenizer) else {}

    def text(self, token_id: int) -> str:
        """Return a token's text; bytes that are no character are U+FFFD."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def bytes(self, token_id: int) -> list[int]:
        """Return a token's bytes, each from 0 to 255."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return [int(byte[1], 16)]
        if piece and all(character in self._byte_of for character in piece):
            return [self._byte_of[character] for character in piece]
        return list(self.text(token_id).encode("utf-8", "replace"))


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    except (ValueError, AttributeError):
        return False
    return "ByteLevel" in json.dumps(decoder)


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for. Source: GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
