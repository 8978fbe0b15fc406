"""`tierkv daemon prefetch`: tell the daemon which prompts will come, so that it brings their blocks up from disk."""

from __future__ import annotations

import os

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import Count, Hello, Prefetch
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import check_supported, probe_layout
from tierkv.engine.models import LoadedModel, load_model
from tierkv.engine.prompts import PromptRequest, prefix_tokens
from tierkv.errors import ConfigError
from tierkv.tools.options import EngineOptions, embedded_directory
from tierkv.tools.render import print_json
from tierkv.values.block import as_token_array, iter_chain
from tierkv.values.namespace import Namespace

__all__ = ["identify", "prefetch"]


def identify(options: EngineOptions) -> tuple[LoadedModel, Namespace]:
    """Load the model that is meant, for its tokenizer, and return the namespace of its blocks."""
    loaded = load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache_dir=embedded_directory(options.model, os.environ),
    )
    check_supported(loaded.model)
    layout = probe_layout(loaded.model, block_size=options.block_size)
    return loaded, namespace_of(loaded.model, layout, salt=options.salt, name=loaded.name)


def prefetch(requests: list[PromptRequest], options: EngineOptions, *, as_json: bool) -> None:
    """Announce the prompts of a file to the daemon and print how many blocks they have.

    The model is loaded for its tokenizer and its identity; it computes nothing.
    """
    if options.socket is None:
        raise ConfigError("prefetch needs a daemon's socket: --socket, or TIERKV_SOCKET")
    loaded, namespace = identify(options)
    layout = namespace.layout
    hello = Hello(
        namespace=namespace.digest,
        description=namespace.describe(),
        block_bytes=layout.block_bytes,
        client=f"prefetch, process {os.getpid()}",
    )
    blocks = 0
    with DaemonClient(options.socket, hello) as client:
        for request in requests:
            tokens = as_token_array(prefix_tokens(loaded.tokenizer, request)).tobytes()
            chain = iter_chain(namespace.digest, tokens, options.block_size)
            message = Prefetch(hashes=b"".join(block_hash for block_hash, _ in chain), tokens=tokens)
            blocks += client.call(message, Count).count
    if as_json:
        print_json({"prompts": len(requests), "blocks": blocks})
    else:
        print(f"announced {len(requests)} prompts, {blocks} whole blocks")
