"""Reads the state of a model off its modules: their tensors, settings, hooks and code."""

from __future__ import annotations

import enum
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from tierkv.engine.model_seam import Seam
from tierkv.engine.model_state import VOLATILE_FIELDS, ModelState

__all__ = ["is_of_known_package", "read_state"]

# Attributes of a module on which neither K nor V depends. The reader handles torch's own attributes one by one.
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
# PEFT's private names that belong to the identity. Other private names do not: a loaded checkpoint has more of them
# than the same model made in memory. They are compared while a runner is open, except on classes of Transformers and
# torch, which store bookkeeping there (`model.generate` stores the length of its cache).
_ADAPTER_NAMES = frozenset({"_active_adapter", "_disable_adapters"})

# Packages that load and run models: their hooks and functions may appear and disappear.
_KNOWN_PACKAGES = frozenset({"accelerate", "bitsandbytes", "peft", "torch", "transformers"})
# Packages of classes whose objects are compared by identity; their attributes are not read.
_OPAQUE_PACKAGES = frozenset(
    {"_thread", "asyncio", "concurrent", "io", "logging", "re", "threading", "torch", "weakref"}
)
_MAX_DEPTH = 4  # of objects inside objects

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, enum.Enum, range, slice)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, staticmethod, classmethod, property, type)


def read_state(model: nn.Module) -> ModelState:
    """Return the state of a model as it is now, in some microseconds per module."""
    reader = _Reader()
    reader.read_module("", model)
    reader.read_global_hooks()
    reader.state.remember()
    return reader.state


class _Names:
    """Yields the current values of some names of a Python namespace, each time it is iterated."""

    def __init__(self, names: Mapping[str, Any], wanted: Iterable[str]) -> None:
        self._names = names
        self._wanted = tuple(wanted)

    def __iter__(self) -> Iterator[object]:
        return map(self._names.get, self._wanted)


class _Classes:
    """Yields the current classes of modules, each time it is iterated: `__class__` may be assigned."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __iter__(self) -> Iterator[object]:
        return map(type, self.modules)


class _Reader:
    """Walks a model once and fills a state."""

    def __init__(self) -> None:
        self.state = ModelState()
        self._classes = _Classes()
        self.state.views.append(self._classes)
        self._seen: dict[int, object] = {}  # keeps its objects alive, so that no id is used twice

    def read_module(self, path: str, module: nn.Module) -> None:
        if self._is_seen(module):
            return
        dot, place, views = f"{path}." if path else "", path or "the model", self.state.views
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
            if tensor is None or self._is_seen(tensor):  # a tied tensor counts under its first name
                self.state.objects[dot + name] = tensor
            else:
                self._read_tensor(dot + name, tensor, is_identity=True, depth=0)
        has_adapters = hasattr(module, "adapter_layer_names")
        keeps_books = type(module).__module__.split(".")[0] in ("torch", "transformers")
        for name, value in list(inner.items()):
            if name in _OWN_OF_TORCH or name in _IGNORED or isinstance(value, Seam):
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
            self.state.views.append(hooks.values())
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
        """Read an attribute. is_made: each access makes a new object, so object identity says nothing."""
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
                self.state.views.append(value.values() if isinstance(value, Mapping) else value)
            self._add_setting(f"{path}.__len__", len(value), is_identity=is_identity)
            for key, item in _items_of(value):
                self._read_value(f"{path}[{key!r}]", item, is_identity=is_identity, depth=depth + 1, is_made=is_made)
        else:
            self._read_object(path, value, is_identity=is_identity, depth=depth)

    def _read_object(self, path: str, value: Any, *, is_identity: bool, depth: int) -> None:
        """Read a plain object, such as the quantisation state of a weight; of a configuration the relevant fields."""
        kind = type(value)
        is_config = hasattr(kind, "model_type") and hasattr(value, "to_dict")
        if not is_config:
            self.state.objects[path] = value
        if self._is_seen(value) or depth > _MAX_DEPTH or kind.__module__.split(".")[0] in _OPAQUE_PACKAGES:
            return
        if hasattr(value, "__dict__"):
            fields = vars(value)
            self.state.views.append(fields.values())
        else:
            names = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())]
            fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
        for name, each in list(fields.items()):
            if is_config and (name in VOLATILE_FIELDS or name.startswith("_")):
                continue
            is_part = (
                is_identity and not name.startswith("_") and not is_config
            )  # the namespace has the configuration already
            self._read_value(f"{path}.{name}", each, is_identity=is_part, depth=depth + 1)

    def _read_tensor(self, path: str, tensor: Tensor, *, is_identity: bool, depth: int, is_made: bool = False) -> None:
        if not is_made:
            self.state.objects[path] = tensor
        if tensor.is_quantized:
            self._add_setting(f"{path}.__repr__", _text_of_quantised(tensor), is_identity=is_identity)
            return
        if hasattr(tensor, "__tensor_flatten__") and not hasattr(
            tensor, "to_local"
        ):  # made of other tensors, as torchao's
            names, context = tensor.__tensor_flatten__()
            self._add_setting(f"{path}.__context__", str(context), is_identity=is_identity)
            for name in names if depth <= _MAX_DEPTH else ():
                part = getattr(tensor, name)
                self._read_tensor(f"{path}.{name}", part, is_identity=is_identity, depth=depth + 1, is_made=is_made)
            return
        if is_identity or not is_made:
            self.state.tensors[path] = tensor
        if type(tensor) not in (Tensor, nn.Parameter) and not hasattr(tensor, "to_local"):
            self.state.views.append(vars(tensor).values())
            for name, value in list(vars(tensor).items()):
                if not name.startswith("_") and value is not tensor:
                    self._read_value(f"{path}.{name}", value, is_identity=is_identity, depth=depth + 1)

    def _read_class(self, kind: type) -> None:
        """Read the code of a module's class: its functions, and the functions of the same file that they call."""
        if self._is_seen(kind):
            return
        for each in kind.__mro__:
            if each is object or (each is not kind and self._is_seen(each)):
                continue
            if _is_of_library(each):  # only its forward matters
                names = [
                    name for name in ("forward", "__call__", "_call_impl", "_wrapped_call_impl") if name in vars(each)
                ]
                self.state.views.append(_Names(vars(each), names))
            else:
                names = [name for name in vars(each) if not name.startswith("__") or name == "__call__"]
                self.state.views.append(vars(each).values())
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
        """Read the functions that a function calls through its globals, and in turn those of the same file."""
        pending: list[Any] = [function]
        while pending:
            plain = inspect.unwrap(pending.pop())
            if not isinstance(plain, FunctionType) or self._is_seen(plain.__code__):
                continue
            found = {name: plain.__globals__.get(name) for name in plain.__code__.co_names}
            called = {name: each for name, each in found.items() if isinstance(each, FunctionType)}
            if called:
                self.state.views.append(_Names(plain.__globals__, called))
            for name, each in called.items():
                self.state.objects[f"function {plain.__module__}.{name}"] = each
                if each.__module__ == plain.__module__:
                    pending.append(each)

    def _add_setting(self, path: str, value: Any, *, is_identity: bool) -> None:
        self.state.settings[path] = repr(value.item() if isinstance(value, np.generic) else value)
        if is_identity:
            self.state.identity.add(path)

    def _is_seen(self, value: object) -> bool:
        """Return whether an object has been read already, and record that it has."""
        is_seen = id(value) in self._seen
        self._seen[id(value)] = value
        return is_seen


def _is_of_library(kind: type) -> bool:
    """Return whether a class is torch's, or from a part of Transformers that is not a model."""
    module = kind.__module__
    return module.split(".")[0] == "torch" or (
        module.startswith("transformers.") and not module.startswith("transformers.models.")
    )


def _items_of(container: Any) -> list[tuple[Any, Any]]:
    """Return a container's items with their keys or indices; sets are sorted first."""
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
    """Return the content of torch's quantised tensor as text: such tensors are small and are not sampled."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scales: Any = (tensor.q_scale(), tensor.q_zero_point())
    else:
        scales = (tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist())
    numbers = xxhash.xxh3_128_hexdigest(tensor.int_repr().contiguous().cpu().numpy().data)
    return f"{tensor.dtype}|{tuple(tensor.shape)}|{scales}|{numbers}"


def is_of_known_package(function: object) -> bool:
    """Return whether a function, or a callable object's class, is from a package that loads and runs models."""
    return _module_of(function).split(".")[0] in _KNOWN_PACKAGES
