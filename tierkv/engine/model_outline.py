"""What a model's small files say of it: its tokenizer, and its namespace but for the weights, which are not read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierkv.engine.embedded_files import EMBEDDED
from tierkv.engine.mla.model import latent_attention
from tierkv.engine.model_identity import architecture_of
from tierkv.engine.model_support import probe_layout
from tierkv.engine.models import device_of, dtype_of, first_line, path_of
from tierkv.engine.transformers_import import import_transformers
from tierkv.errors import ConfigError
from tierkv.values.namespace import Namespace

__all__ = ["ModelOutline", "read_outline", "without_unread"]

_UNREAD = ("weights", "name")
_UNREAD_ARCHITECTURE = "modules"


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A model whose weights were not read. tokenizer: Hugging Face's. name: of the model, as requested.

    fields: the fields of its namespace's description, without the digests of its weights and of its modules' settings.
    """

    tokenizer: Any
    name: str
    fields: dict[str, Any]

    def fits(self, description: dict[str, Any]) -> bool:
        """Return whether a namespace's description agrees with all that is known of this model."""
        return without_unread(description) == self.fields


def read_outline(
    name: str | None,
    *,
    cache_dir: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    block_size: int = 256,
    salt: str = "",
    mla: str = "auto",
) -> ModelOutline:
    """Read a model's configuration and tokenizer, build the model without memory, and return what that says.

    Arguments as for `load_model` and for a namespace. Takes no longer for larger models. Raises ConfigError, in one
    line, for an unknown or damaged model and for one that cannot be built so; UnsupportedModelError as `probe_layout`.
    """
    transformers = import_transformers()
    kind = dtype_of(dtype, device_of(device))
    path = path_of(name, cache_dir)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if kind == "auto":
            kind = getattr(config.get_text_config(), "dtype", None) or torch.float32
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    except Exception as exc:  # a model's files make Transformers and its libraries raise anything
        raise ConfigError(f"cannot read the configuration of {name or EMBEDDED!r}: {first_line(exc)}") from exc
    layout = probe_layout(model, block_size=block_size, latent=latent_attention(model, mla, use_library=False))
    namespace = Namespace(
        weights="not read",
        architecture=json.loads(json.dumps(architecture_of(model, layout), default=str)),
        layout=layout,
        salt=salt,
    )
    return ModelOutline(tokenizer, name or EMBEDDED, without_unread(json.loads(namespace.describe())))


def without_unread(description: dict[str, Any]) -> dict[str, Any]:
    """Return a description without the fields that only a model in memory decides."""
    known = {key: value for key, value in description.items() if key not in _UNREAD}
    architecture = known.get("architecture")
    if isinstance(architecture, dict):
        known["architecture"] = {key: value for key, value in architecture.items() if key != _UNREAD_ARCHITECTURE}
    return known
