"""Each test of a whole model runs at every place there is."""

from __future__ import annotations

import pytest
import torch
from places import Place

CPU = pytest.param(Place("cpu", torch.float32, 16), id="cpu-float32")
CUDA = pytest.param(
    Place("cuda", torch.bfloat16, 256),
    id="cuda-bfloat16",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
)


@pytest.fixture(params=[CPU, CUDA])
def place(request: pytest.FixtureRequest) -> Place:
    """Return each place that a test runs at."""
    found = request.param
    assert isinstance(found, Place)
    return found
