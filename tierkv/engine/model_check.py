"""ModelCheck: notices that a model is no longer the one whose K and V a cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tierkv.engine.checksums import Checksums
from tierkv.engine.gate import check_call, check_state
from tierkv.engine.model_state import ModelState, changed_paths, local_part, read_state
from tierkv.errors import ConfigError

__all__ = ["ModelCheck"]

_HINT = "open it anew"


class ModelCheck:
    """What a model was when its cache was opened, and whether it still is. Not thread-safe.

    state: what was read then, of which the namespace was made.
    """

    def __init__(self, model: Any, state: ModelState) -> None:
        self._model = model
        self._state = state
        self._device_type = torch.device(model.device).type
        self._dtype = torch.get_default_dtype()
        self._tensors = [tensor for path, tensor in state.tensors.items() if path not in state.moving]
        self._split = [tensor for tensor in self._tensors if hasattr(tensor, "to_local")]
        self._whole = [tensor for tensor in self._tensors if not hasattr(tensor, "to_local")]
        self._counted = [tensor for tensor in self._whole if not tensor.is_inference()]
        self._versions = self._read_versions()
        self._checksums = Checksums(self._tensors)
        state.settle()

    def look(self) -> None:
        """Raise ConfigError for any change but that of numbers in a tensor that are written past torch's own count.

        Seen so: other or replaced tensors, settings, adapters, modes, hooks and functions; writes that torch counts, of
        training, `load_state_dict` and other operations in place. UnsupportedModelError for a new forward hook.
        """
        check_call(self._device_type)
        if torch.get_default_dtype() != self._dtype:
            raise ConfigError(f"torch's default dtype has changed since the cache was opened, from {self._dtype}")
        if self._state.may_have_changed():
            self._compare_state()
        if self._read_versions() != self._versions:
            self._raise_for_weights()

    def mark(self) -> torch.cuda.Event | None:
        """Note on a GPU what its current stream has to do so far; see `start`."""
        if self._device_type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def start(self, after: torch.cuda.Event | None = None) -> Callable[[], None]:
        """Take a sample of all tensors' bytes, on a GPU after the pass that has just been launched.

        after: a `mark` from before that pass. The sample then runs beside the pass, at no cost of time, and sees what
        was written before the mark. Return a function that waits for the sample, and raises ConfigError where bytes
        have changed.
        """
        wait = self._checksums.start(after)

        def finish() -> None:
            if not wait():
                self._raise_for_weights()

        return finish

    def check_whole(self) -> None:
        """Look at everything, all bytes of all tensors too. Raises as `look` does."""
        self.look()
        if not self._checksums.is_same():
            self._raise_for_weights()

    def _compare_state(self) -> None:
        """Tell a change that counts from one that does not, such as an equal number in another object."""
        now = read_state(self._model)
        check_state(self._model, now)
        now.moving = self._state.moving
        paths = changed_paths(self._state, now)
        if paths:
            more = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
            if any(path in self._state.tensors or path in now.tensors for path in paths):
                self._raise_for_weights(f": {paths[0]}{more}")
            raise ConfigError(f"the model has changed since the cache was opened: {paths[0]}{more}", hint=_HINT)
        self._state = now

    def _read_versions(self) -> list[int]:
        """Return where the tensors lie and how often torch has seen them written to."""
        numbers = [each.data_ptr() for each in self._whole]
        numbers += [each._version for each in self._counted]
        for each in self._split:  # writes through a DTensor and through its local part count apart
            with torch.no_grad():  # or taking the part makes a node of autograd's graph
                part = local_part(each)
            numbers += [part.data_ptr(), *(tensor._version for tensor in (each, part) if not tensor.is_inference())]
        return numbers

    def _raise_for_weights(self, where: str = "") -> None:
        raise ConfigError(f"the model's weights have changed since the cache was opened{where}", hint=_HINT)
