"""Checks that every launcher makes."""

from __future__ import annotations

from torch import Tensor

from tierkv.errors import ShapeError

__all__ = ["require", "require_contiguous"]


def require(condition: bool, message: str) -> None:
    """Raise ShapeError with the message unless the condition holds."""
    if not condition:
        raise ShapeError(message)


def require_contiguous(**tensors: Tensor) -> None:
    """Raise ShapeError naming the first tensor that is not contiguous."""
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
