"""The identity of a model: the namespace of its blocks, and the check that the model has not changed since then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import xxhash

from tierkv.engine.checksums import Checksums
from tierkv.engine.mla.layers import mla_layers, rope_order
from tierkv.engine.model_reader import read_state
from tierkv.engine.model_state import VOLATILE_FIELDS, ModelState, changed_paths, local_part
from tierkv.engine.model_support import check_call, check_state, read_stable_state
from tierkv.engine.weights_digest import weights_digest
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import REPLICATED, Namespace

__all__ = ["ModelCheck", "architecture_of", "namespace_of"]

_HINT = "open it anew"


def namespace_of(
    model: Any,
    layout: BlockLayout,
    *,
    adapter: str = "",
    salt: str = "",
    name: str = "",
    ranks: RankGroup | None = None,
    state: ModelState | None = None,
    is_replicated: bool = False,
) -> Namespace:
    """Return the namespace of a Hugging Face model's blocks.

    adapter: a digest of an adapter that is not merged into the weights.
    ranks: of a split model. Its digest covers the weights of all ranks, because K and V of each rank depend on all.
    state: from `read_stable_state`, if the caller has read it already. is_replicated: every rank computes the same
    blocks, see `are_replicated`; the namespace is then the same on all of them.
    Raises UnsupportedModelError for unmerged adapters without `adapter`: the weights do not say which one is active.
    """
    if not adapter and any(hasattr(module, "adapter_layer_names") for module in model.modules()):  # PEFT's layers
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters that are not merged into its weights",
            hint="merge them, or say by adapter= which one is active: a digest of its content and its scale",
        )
    group = ranks or OneRank()
    state = state or read_stable_state(model)
    architecture = architecture_of(model, layout)
    architecture["modules"] = _joint_digest(_settings_digest(state), group)
    if torch.get_default_dtype() != torch.float32:  # tensors that a model makes in its forward pass may have it
        architecture["default_dtype"] = str(torch.get_default_dtype())
    if is_replicated:
        architecture[REPLICATED] = True
    return Namespace(
        weights=_joint_digest(weights_digest(model, state), group),
        architecture=json.loads(json.dumps(architecture, default=str)),
        layout=layout,
        adapter=adapter,
        salt=salt,
        tp_rank=0 if is_replicated else group.rank,
        tp_size=1 if is_replicated else group.size,
        name=name,
    )


def architecture_of(model: Any, layout: BlockLayout) -> dict[str, Any]:
    """Return the class of a Hugging Face model and the fields of its configuration that decide K and V.

    For a layout of latents also in which order they hold the rope part.
    """
    config = model.config.get_text_config().to_dict()
    found = {"class": type(model).__name__} | {
        key: value for key, value in config.items() if key not in VOLATILE_FIELDS
    }
    if layout.is_latent:
        found["mla"] = {"cache": "latent", "rope_order": rope_order(mla_layers(model)[0])}
    return found


def _settings_digest(state: ModelState) -> str:
    """Return xxh3-128, in hex, over the classes of a model's modules and their values that are not tensors.

    Such values are scales, windows, epsilons, active adapters, and what `state_dict` says of packed weights.
    """
    lines = (f"{path}={state.settings[path]}\n" for path in sorted(state.identity - state.volatile))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode(errors="backslashreplace"))


class ModelCheck:
    """Compares a model with what it was when its cache was opened. Not thread-safe.

    state: what was read at opening; the namespace was made of it.
    """

    def __init__(self, model: Any, state: ModelState) -> None:
        self._model = model
        self._state = state
        self._device_type = torch.device(model.device).type
        self._dtype = torch.get_default_dtype()
        self._tensors = [tensor for path, tensor in state.tensors.items() if path not in state.volatile]
        self._split = [tensor for tensor in self._tensors if hasattr(tensor, "to_local")]
        self._whole = [tensor for tensor in self._tensors if not hasattr(tensor, "to_local")]
        self._counted = [tensor for tensor in self._whole if not tensor.is_inference()]
        self._versions = self._read_versions()
        self._checksums = Checksums(self._tensors)
        state.remember()

    def check(self) -> None:
        """Raise ConfigError for any change but numbers that were written into a tensor past torch's write count.

        It finds other or replaced tensors, settings, adapters, modes, hooks and functions. It also finds the writes
        that torch counts: training, `load_state_dict`, operations in place. UnsupportedModelError for a new forward
        hook.
        """
        check_call(self._device_type)
        if torch.get_default_dtype() != self._dtype:
            raise ConfigError(f"torch's default dtype has changed since the cache was opened, from {self._dtype}")
        if self._state.may_have_changed():
            self._compare_state()
        if self._read_versions() != self._versions:
            self._raise_for_weights()

    def check_whole(self) -> None:
        """Check everything, all bytes of all tensors included. Raises as `check` does."""
        self.check()
        if not self._checksums.is_same():
            self._raise_for_weights()

    def mark(self) -> torch.cuda.Event | None:
        """Return an event behind the work on the GPU's current stream, for `start`; None on a CPU."""
        if self._device_type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def start(self, after: torch.cuda.Event | None = None) -> Callable[[], None]:
        """Start a sample of all tensors' bytes; on a GPU it follows the forward pass that was just launched.

        after: a `mark` from before that pass. The sample then runs beside the pass and costs no time; it sees writes
        from before the mark. Return a function that waits for the sample and raises ConfigError if bytes have changed.
        """
        wait = self._checksums.start(after)

        def finish() -> None:
            if not wait():
                self._raise_for_weights()

        return finish

    def _compare_state(self) -> None:
        """Raise for a change that matters. An equal number in another object, for example, does not."""
        now = read_state(self._model)
        check_state(self._model, now)
        now.volatile = self._state.volatile
        paths = changed_paths(self._state, now)
        if paths:
            more = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
            if any(path in self._state.tensors or path in now.tensors for path in paths):
                self._raise_for_weights(f": {paths[0]}{more}")
            raise ConfigError(f"the model has changed since the cache was opened: {paths[0]}{more}", hint=_HINT)
        self._state = now

    def _read_versions(self) -> list[int]:
        """Return the tensors' addresses, and torch's counts of writes to them."""
        numbers = [each.data_ptr() for each in self._whole]
        numbers += [each._version for each in self._counted]
        for each in self._split:  # torch counts writes through a DTensor and through its local part apart
            with torch.no_grad():  # else `local_part` makes a node of autograd's graph
                part = local_part(each)
            numbers += [part.data_ptr(), *(tensor._version for tensor in (each, part) if not tensor.is_inference())]
        return numbers

    def _raise_for_weights(self, where: str = "") -> None:
        raise ConfigError(f"the model's weights have changed since the cache was opened{where}", hint=_HINT)


def _joint_digest(digest: str, ranks: RankGroup) -> str:
    if ranks.size == 1:
        return digest
    return xxhash.xxh3_128_hexdigest(b"|".join(ranks.gather(digest.encode())))
