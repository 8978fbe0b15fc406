"""Kernels run natively where there is a GPU, and under Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the kernels are imported


@pytest.fixture
def device() -> str:
    """Return where the kernels of this machine run."""
    return "cuda" if HAS_GPU else "cpu"
