"""ModelState: everything in a model's modules that its K and V depend on, and how two states are compared.

That is more than parameters, buffers and the configuration: also tensors in plain attributes (scales of a quantised
weight), numbers (the scale of an adapter), names (of the active adapter), hooks and functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_

from torch import Tensor

__all__ = ["VOLATILE_FIELDS", "ModelState", "changed_paths", "local_part"]

# Fields of a configuration on which neither K nor V depends: its origin, how generation runs, how attention is
# implemented, the number of devices. The layout has the dtype, the namespace has the slice.
VOLATILE_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "distributed_config",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(slots=True)
class ModelState:
    """The state of a model, by paths as in `named_parameters`: model.layers.0.self_attn.scaling.

    settings: numbers, names and flags, as text; compared by value. identity: the paths among them that are the same in
    every process and enter the namespace. objects: tensors, functions, classes and hooks, compared by object identity.
    tensors: every tensor, parameters and buffers under their own names. training: modules in train mode.
    hooks, forwards: forward hooks and replaced forwards by their path, except those of packages that load models.
    volatile: paths that a forward pass changes by itself; they are ignored.
    views: the containers of all attributes, hooks and functions, iterated to see whether one is another object now.
    """

    settings: dict[str, str] = field(default_factory=dict)
    identity: set[str] = field(default_factory=set)
    objects: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    hooks: dict[str, object] = field(default_factory=dict)
    forwards: dict[str, object] = field(default_factory=dict)
    volatile: frozenset[str] = frozenset()
    views: list[Iterable[object]] = field(default_factory=list)
    _seen: tuple[object, ...] = ()

    def may_have_changed(self) -> bool:
        """Return whether any attribute of any module is another object than when the state was read.

        Cheap: C code iterates the containers. The contents of tensors are not compared.
        """
        now = tuple(chain.from_iterable(self.views))
        return len(now) != len(self._seen) or not all(map(is_, now, self._seen))

    def remember(self) -> None:
        """Record the containers' present content as unchanged."""
        self._seen = tuple(chain.from_iterable(self.views))


def changed_paths(before: ModelState, after: ModelState) -> list[str]:
    """Return the paths at which two states of a model differ, without the volatile ones."""
    settings, objects = before.settings, before.objects
    paths = [path for path, text in after.settings.items() if settings.get(path) != text]
    paths += [path for path, held in after.objects.items() if objects.get(path) is not held]
    paths += settings.keys() - after.settings.keys()
    paths += objects.keys() - after.objects.keys()
    volatile = before.volatile | after.volatile
    return [path for path in dict.fromkeys(paths) if path not in volatile]


def local_part(tensor: Tensor) -> Tensor:
    """Return this device's part of a tensor, which is split over several devices if it is a DTensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
