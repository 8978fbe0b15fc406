"""In words, how a stored namespace differs from the one that a command asks for."""

from __future__ import annotations

from typing import Any

from tierkv.values.namespace import differing_fields

__all__ = ["how_it_differs"]

_MOST_FIELDS = 3
_MLA = "architecture.mla"
_UNREAD = ("weights", "architecture.modules")


def how_it_differs(wanted: dict[str, Any], stored: dict[str, Any]) -> str:
    """Return a namespace by its difference: "the same model in bfloat16".

    wanted: the fields that are known of the namespace asked for; its weights may be missing. stored: a description.
    """
    fields = differing_fields(stored, wanted)
    if _MLA in fields:
        fields = [name for name in fields if name != "layers"]  # it follows
    # In another dtype, the same weights have another digest.
    weights_differ = "weights" in wanted and "dtype" not in fields and any(name in _UNREAD for name in fields)
    fields = [name for name in fields if name not in _UNREAD]
    words = [_WORDS[name](stored) for name in fields if name in _WORDS]
    words = [word for word in dict.fromkeys(words) if word]
    others = [name for name in fields if name not in _WORDS]
    name = str(stored.get("name", "")) or "unnamed"
    if others:
        listed = ", ".join(others[:_MOST_FIELDS])
        more = f" and {len(others) - _MOST_FIELDS} more fields" if len(others) > _MOST_FIELDS else ""
        return f"{name}, which differs in {listed}{more}" + "".join(f", {word}" for word in words)
    if weights_differ or not words:
        words.append("with other weights or settings")
    return f"the same model {', '.join(words)}"


def _rank(stored: dict[str, Any]) -> str:
    return f"as rank {stored.get('tp_rank')} of {stored.get('tp_size')}"


def _mla(stored: dict[str, Any]) -> str:
    held = (stored.get("architecture") or {}).get("mla")
    return "with the latent in its blocks (--mla latent)" if held else "with expanded K and V (--mla expanded)"


_WORDS: dict[str, Any] = {
    _MLA: _mla,
    "dtype": lambda stored: f"in {stored.get('dtype')}",
    "block_size": lambda stored: f"in blocks of {stored.get('block_size')} tokens",
    "salt": lambda stored: "with another --salt" if stored.get("salt") else "without --salt",
    "lossy_codec": lambda stored: f"through --codec {stored.get('lossy_codec') or 'auto'}",
    "adapter": lambda stored: "with another adapter" if stored.get("adapter") else "without an adapter",
    "tp_rank": _rank,
    "tp_size": _rank,
}
