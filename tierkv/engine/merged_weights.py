"""Merges the weights of linear modules that have one input, so that one matrix product computes all of them.

The modules' own weights become views into the merged memory: nothing is stored twice, and the modules work as before.
Of a model that is split over several devices this device's parts are merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tierkv.engine.model_state import local_part

__all__ = ["MergedLinear", "WeightUsers", "merge_linears"]


class MergedLinear:
    """Linear modules computed as one: weight [sum of outputs, inputs], bias [sum of outputs] or None."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = weight
        self.bias: Tensor | None = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, sum of outputs] of x [T, inputs]."""
        return nn.functional.linear(x, self.weight, self.bias)


class WeightUsers:
    """Counts how many parameters of a model use a piece of memory."""

    def __init__(self, model: nn.Module) -> None:
        found = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        self._of_parameter = Counter(map(id, found))
        self._of_memory = Counter(_address(each) for each in {id(each): each for each in found}.values())

    def are_single(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether each parameter has one place in the model, and its address no other parameter."""
        return all(self._of_parameter[id(each)] == 1 and self._of_memory[_address(each)] == 1 for each in parameters)


def why_not(modules: Sequence[nn.Module], users: WeightUsers) -> str | None:
    """Return why modules cannot be merged; None if they can: plain linear modules of one dtype, tied to nothing."""
    parameters: list[Tensor] = []
    for module in modules:
        if type(module) is not nn.Linear:
            return f"it has a {type(module).__name__} where a plain Linear is expected"
        parameters += module.parameters()
    if len({module.bias is None for module in modules}) > 1:
        return "only some of its projections have a bias"
    if any(not _is_plain(each) or each.is_inference() or each.grad is not None for each in parameters):
        return "some of its weights are no plain parameters"
    if len({(each.dtype, each.device) for each in parameters}) > 1 or not parameters[0].dtype.is_floating_point:
        return "its weights have several dtypes or devices"
    if not users.are_single(parameters):
        return "some of its weights are tied"
    return None


def merge_linears(modules: Sequence[nn.Linear]) -> MergedLinear:
    """Make the weights of modules views into one tensor, unless they are already. `why_not` has said None.

    Of weights that share their memory with others the memory is used until those are gone.
    """
    weight = _merge([module.get_parameter("weight") for module in modules])
    biases = [each for module in modules for name, each in module.named_parameters() if name == "bias"]
    return MergedLinear(weight, _merge(biases) if biases else None)


def _merge(parts: Sequence[nn.Parameter]) -> Tensor:
    found = _merged_before(parts)
    if found is not None:
        return found
    merged = torch.cat(_local_parts(parts))
    start = 0
    for part, local in zip(parts, _local_parts(parts), strict=True):
        end = start + local.shape[0]
        if hasattr(part, "_local_tensor"):
            part._local_tensor = merged[start:end]  # a DTensor has no memory of its own, so no `data` to set
        else:
            part.data = merged[start:end]
        start = end
    return merged


def _merged_before(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Return the merged tensor of parts that lie one behind the other in one storage; None if they do not."""
    parts = _local_parts(parameters)
    first, storage = parts[0], parts[0].untyped_storage()
    address = first.data_ptr()
    for part in parts:
        is_next = part.data_ptr() == address and part.is_contiguous()
        if not is_next or part.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        address += part.numel() * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    whole.set_(storage, first.storage_offset(), (rows, *first.shape[1:]), first.stride())
    return whole


def _local_parts(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    with torch.no_grad():
        return [local_part(each.detach()) for each in parameters]


def _address(parameter: Tensor) -> int:
    with torch.no_grad():
        return local_part(parameter).data_ptr()


def _is_plain(parameter: Tensor) -> bool:
    """Return whether a parameter is one of torch's own, whole or split."""
    return type(parameter) is nn.Parameter or type(parameter).__module__ == "torch.distributed.tensor"
