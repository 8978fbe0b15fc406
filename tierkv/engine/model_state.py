"""ModelState: all that decides a model's K and V beside its input, read off its modules.

That is more than parameters, buffers and the configuration. Tensors also lie in plain attributes (scales of a
quantised weight), numbers decide too (the scale of an adapter), names (which adapter is active), hooks and functions.
"""

from __future__ import annotations

import enum
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

__all__ = ["VOLATILE_FIELDS", "ModelState", "changed_paths", "is_of_known_package", "local_part", "read_state"]

# Fields of a configuration that decide neither K nor V: where it came from, how generation runs, how
# attention is implemented, over how many devices. dtype is the layout's, the slice the namespace's own.
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

# Attributes of a module that decide neither K nor V. torch's own are read one by one.
_OWN_OF_TORCH = frozenset(vars(nn.Module()))
_IGNORED = frozenset(
    {
        "_auto_class",
        "_is_hf_initialized",
        "_hf_peft_config_loaded",
        "all_tied_weights_keys",
        "generation_config",
        "gradient_checkpointing",
        "hf_device_map",
        "loss_type",
        "name_or_path",
        "peft_config",
        "warnings_issued",
    }
)
# What PEFT says by private names. Other private names are no identity: a checkpoint that was loaded has more of them
# than the same model made in memory. They are compared while a runner is open, but for those of Transformers and torch,
# which keep their books there: `model.generate` writes down how long its cache was.
_ADAPTER_NAMES = frozenset({"_active_adapter", "_disable_adapters"})

# Packages whose hooks and functions are part of how a model is loaded and run. They add and remove them as they like.
_KNOWN_PACKAGES = frozenset({"accelerate", "bitsandbytes", "peft", "torch", "transformers"})
# Classes whose objects are compared by identity and never looked into.
_OPAQUE_PACKAGES = frozenset(
    {"_thread", "asyncio", "concurrent", "io", "logging", "re", "threading", "torch", "weakref"}
)
_MAX_DEPTH = 4  # of objects inside objects

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, enum.Enum, range, slice)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, staticmethod, classmethod, property, type)


@dataclass(slots=True)
class ModelState:
    """What was read. Paths are as in `named_parameters`: model.layers.0.self_attn.scaling.

    settings: numbers, names and flags, as text; compared by value. identity: those of them that hold in every process.
    objects: what is compared by identity: tensors, functions, classes, hooks.
    tensors: every tensor, parameters and buffers under their own names.
    training: modules in train mode. hooks, forwards: forward hooks, and forwards that are not their class's own, by the
    place where they were found; those of the packages that load models do not count.
    moving: paths that a forward pass changes by itself; they count for nothing.
    """

    settings: dict[str, str] = field(default_factory=dict)
    identity: set[str] = field(default_factory=set)
    objects: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    hooks: dict[str, object] = field(default_factory=dict)
    forwards: dict[str, object] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()
    _views: list[Iterable[object]] = field(default_factory=list)
    _seen: tuple[object, ...] = ()

    def may_have_changed(self) -> bool:
        """Return whether any attribute of any module is another object than when the state was read.

        Cheap: one walk over the containers themselves, without a line of Python for each. Numbers that a tensor holds
        are not looked at.
        """
        now = tuple(chain.from_iterable(self._views))
        return len(now) != len(self._seen) or not all(map(is_, now, self._seen))

    def settle(self) -> None:
        """Remember what the containers hold now."""
        self._seen = tuple(chain.from_iterable(self._views))


def read_state(model: nn.Module) -> ModelState:
    """Return the state of a model as it is now. Some microseconds a module."""
    reader = _Reader()
    reader.read_module("", model)
    reader.read_global_hooks()
    reader.state.settle()
    return reader.state


def changed_paths(before: ModelState, after: ModelState) -> list[str]:
    """Return the paths at which two states of a model differ, without those that a forward pass changes by itself."""
    settings, objects = before.settings, before.objects
    paths = [path for path, text in after.settings.items() if settings.get(path) != text]
    paths += [path for path, held in after.objects.items() if objects.get(path) is not held]
    paths += settings.keys() - after.settings.keys()
    paths += objects.keys() - after.objects.keys()
    moving = before.moving | after.moving
    return [path for path in dict.fromkeys(paths) if path not in moving]


def local_part(tensor: Tensor) -> Tensor:
    """Return what this device holds of a tensor that may be split over several, as a DTensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def is_of_known_package(function: object) -> bool:
    """Return whether a function, or the class of a callable object, is of a package that loads and runs models."""
    return _module_of(function).split(".")[0] in _KNOWN_PACKAGES


class _Names:
    """The values that names have in a namespace of Python whenever it is iterated."""

    def __init__(self, names: Mapping[str, Any], wanted: Iterable[str]) -> None:
        self._names = names
        self._wanted = tuple(wanted)

    def __iter__(self) -> Iterator[object]:
        return map(self._names.get, self._wanted)


class _Classes:
    """The classes of modules whenever it is iterated: `__class__` may be assigned."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __iter__(self) -> Iterator[object]:
        return map(type, self.modules)


class _Reader:
    """Walks a model once and fills a state."""

    def __init__(self) -> None:
        self.state = ModelState()
        self._classes = _Classes()
        self.state._views.append(self._classes)
        self._met: dict[int, object] = {}  # what it names stays alive, so that no id is used twice

    def read_module(self, path: str, module: nn.Module) -> None:
        if self._has_met(module):
            return
        dot, place, views = f"{path}." if path else "", path or "the model", self.state._views
        inner = vars(module)
        self._classes.modules.append(module)
        views += [inner.values(), module._parameters.values(), module._buffers.values(), module._modules.values()]
        views += [module._forward_hooks.values(), module._forward_pre_hooks.values()]
        self.state.objects[f"{dot}__class__"] = type(module)
        self._add_setting(f"{dot}__class__.__qualname__", type(module).__qualname__, is_identity=True)
        self._add_setting(f"{dot}training", module.training, is_identity=False)
        if module.training:
            self.state.training.append(place)
        self._read_class(type(module))
        self._read_hooks(place, chain(module._forward_pre_hooks.values(), module._forward_hooks.values()))
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is None or self._has_met(tensor):  # tied: it counts under its first name, but for a replacement
                self.state.objects[dot + name] = tensor
            else:
                self._read_tensor(dot + name, tensor, is_identity=True, depth=0)
        has_adapters = hasattr(module, "adapter_layer_names")
        keeps_books = type(module).__module__.split(".")[0] in ("torch", "transformers")
        for name, value in list(inner.items()):
            if name in _OWN_OF_TORCH or name in _IGNORED:
                continue
            if name == "forward" and not is_of_known_package(value):
                self.state.forwards[f"{place}.{name}"] = value
            is_public = not name.startswith("_")
            if is_public or not keeps_books:
                is_identity = is_public or (has_adapters and name in _ADAPTER_NAMES)
                self._read_value(dot + name, value, is_identity=is_identity)
        self._read_packed(dot, module)
        for name, child in list(module._modules.items()):
            if child is not None:
                self.read_module(dot + name, child)

    def read_global_hooks(self) -> None:
        torch_module = nn.modules.module
        for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
            self.state._views.append(hooks.values())
            self._read_hooks("all modules", hooks.values())

    def _read_hooks(self, place: str, hooks: Iterable[object]) -> None:
        for hook in hooks:
            if not is_of_known_package(hook):
                path = f"the forward hook {_name_of(hook)} of {place}"
                self.state.hooks[path] = self.state.objects[path] = hook

    def _read_packed(self, dot: str, module: nn.Module) -> None:
        """Read what only a state dict gives: weights that are packed into an object of another language."""
        if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
            return
        found: dict[str, Any] = {}
        module._save_to_state_dict(found, "", True)
        for name, value in found.items():
            if name not in module._parameters and name not in module._buffers:
                self._read_value(f"{dot}state {name}", value, is_identity=True, is_made=True)

    def _read_value(self, path: str, value: Any, *, is_identity: bool, depth: int = 0, is_made: bool = False) -> None:
        """Read an attribute. is_made: it is made anew whenever it is asked for, so it is another object each time."""
        if isinstance(value, _SCALARS):
            self._add_setting(path, value, is_identity=is_identity)
        elif isinstance(value, Tensor):
            self._read_tensor(path, value, is_identity=is_identity, depth=depth, is_made=is_made)
        elif isinstance(value, nn.Module):
            self.read_module(path, value)
        elif isinstance(value, torch.device):
            return
        elif isinstance(value, _FUNCTIONS):
            self.state.objects[path] = value
            self._add_setting(f"{path}.__qualname__", _name_of(value), is_identity=is_identity)
        elif isinstance(value, _CONTAINERS):
            if depth > _MAX_DEPTH:
                return
            if not is_made:
                self.state._views.append(value.values() if isinstance(value, Mapping) else value)
            self._add_setting(f"{path}.__len__", len(value), is_identity=is_identity)
            for key, item in _items_of(value):
                self._read_value(f"{path}[{key!r}]", item, is_identity=is_identity, depth=depth + 1, is_made=is_made)
        else:
            self._read_object(path, value, is_identity=is_identity, depth=depth)

    def _read_object(self, path: str, value: Any, *, is_identity: bool, depth: int) -> None:
        """Read a plain object, such as the quantisation state of a weight; a configuration by its fields that count."""
        kind = type(value)
        is_config = hasattr(kind, "model_type") and hasattr(value, "to_dict")
        if not is_config:
            self.state.objects[path] = value
        if self._has_met(value) or depth > _MAX_DEPTH or kind.__module__.split(".")[0] in _OPAQUE_PACKAGES:
            return
        if hasattr(value, "__dict__"):
            fields = vars(value)
            self.state._views.append(fields.values())
        else:
            names = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())]
            fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
        for name, each in list(fields.items()):
            if is_config and (name in VOLATILE_FIELDS or name.startswith("_")):
                continue
            is_part = is_identity and not name.startswith("_") and not is_config  # which the namespace has by itself
            self._read_value(f"{path}.{name}", each, is_identity=is_part, depth=depth + 1)

    def _read_tensor(self, path: str, tensor: Tensor, *, is_identity: bool, depth: int, is_made: bool = False) -> None:
        if not is_made:
            self.state.objects[path] = tensor
        if tensor.is_quantized:
            self._add_setting(f"{path}.__repr__", _text_of_quantised(tensor), is_identity=is_identity)
            return
        if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "to_local"):  # made of others: torchao's
            names, context = tensor.__tensor_flatten__()
            self._add_setting(f"{path}.__context__", str(context), is_identity=is_identity)
            for name in names if depth <= _MAX_DEPTH else ():
                part = getattr(tensor, name)
                self._read_tensor(f"{path}.{name}", part, is_identity=is_identity, depth=depth + 1, is_made=is_made)
            return
        if is_identity or not is_made:
            self.state.tensors[path] = tensor
        if type(tensor) not in (Tensor, nn.Parameter) and not hasattr(tensor, "to_local"):
            self.state._views.append(vars(tensor).values())
            for name, value in list(vars(tensor).items()):
                if not name.startswith("_") and value is not tensor:
                    self._read_value(f"{path}.{name}", value, is_identity=is_identity, depth=depth + 1)

    def _read_class(self, kind: type) -> None:
        """Read the code of a module's class: its functions, and those that they call in their own file."""
        if self._has_met(kind):
            return
        for each in kind.__mro__:
            if each is object or (each is not kind and self._has_met(each)):
                continue
            if _is_of_library(each):  # its helpers are none of a model's business, its forward is
                names = [
                    name for name in ("forward", "__call__", "_call_impl", "_wrapped_call_impl") if name in vars(each)
                ]
                self.state._views.append(_Names(vars(each), names))
            else:
                names = [name for name in vars(each) if not name.startswith("__") or name == "__call__"]
                self.state._views.append(vars(each).values())
            for name in names:
                value, path = vars(each)[name], f"class {each.__qualname__}.{name}"
                if isinstance(value, _SCALARS):
                    self._add_setting(path, value, is_identity=False)
                elif isinstance(value, _FUNCTIONS):
                    self.state.objects[path] = value
                    if isinstance(value, FunctionType) and not _is_of_library(each):
                        self._read_calls(value)
        forward = getattr(kind, "forward", None)
        owners = tuple(f"{each.__qualname__}." for each in kind.__mro__)
        if forward is not None and not _name_of(forward).startswith(owners):
            path = f"class {kind.__qualname__}.forward"
            self._add_setting(f"{path}.__qualname__", _name_of(forward), is_identity=True)
            if not is_of_known_package(forward):
                self.state.forwards[path] = forward

    def _read_calls(self, function: FunctionType) -> None:
        """Read which functions a function finds in its globals, and which those of the same file find."""
        waiting: list[Any] = [function]
        while waiting:
            plain = inspect.unwrap(waiting.pop())
            if not isinstance(plain, FunctionType) or self._has_met(plain.__code__):
                continue
            found = {name: plain.__globals__.get(name) for name in plain.__code__.co_names}
            called = {name: each for name, each in found.items() if isinstance(each, FunctionType)}
            if called:
                self.state._views.append(_Names(plain.__globals__, called))
            for name, each in called.items():
                self.state.objects[f"function {plain.__module__}.{name}"] = each
                if each.__module__ == plain.__module__:
                    waiting.append(each)

    def _add_setting(self, path: str, value: Any, *, is_identity: bool) -> None:
        self.state.settings[path] = repr(value.item() if isinstance(value, np.generic) else value)
        if is_identity:
            self.state.identity.add(path)

    def _has_met(self, value: object) -> bool:
        """Return whether something has been read already, and note it."""
        has_met = id(value) in self._met
        self._met[id(value)] = value
        return has_met


def _is_of_library(kind: type) -> bool:
    """Return whether a class is torch's, or a part of Transformers that is no model."""
    module = kind.__module__
    return module.split(".")[0] == "torch" or (
        module.startswith("transformers.") and not module.startswith("transformers.models.")
    )


def _items_of(container: Any) -> list[tuple[Any, Any]]:
    """Return what a container holds with the keys, the numbers, or in sets the sorted places of it."""
    if isinstance(container, Mapping):
        return list(container.items())
    is_set = isinstance(container, set | frozenset)
    return list(enumerate(sorted(container, key=repr) if is_set else container))


def _plain_function(function: Any) -> Any:
    return _plain_function(function.func) if isinstance(function, partial) else function


def _module_of(function: Any) -> str:
    plain = _plain_function(function)
    return str(getattr(plain, "__module__", None) or type(plain).__module__)


def _name_of(function: Any) -> str:
    plain = _plain_function(function)
    name = str(getattr(plain, "__qualname__", None) or type(plain).__qualname__)
    return f"{name}{function.args}{function.keywords}" if isinstance(function, partial) else name


def _text_of_quantised(tensor: Tensor) -> str:
    """Return what a quantised tensor of torch's holds, as text: it is rarely large, and never sampled."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scales: Any = (tensor.q_scale(), tensor.q_zero_point())
    else:
        scales = (tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist())
    numbers = xxhash.xxh3_128_hexdigest(tensor.int_repr().contiguous().cpu().numpy().data)
    return f"{tensor.dtype}|{tuple(tensor.shape)}|{scales}|{numbers}"
