"""The digest of weights on a GPU, which threads copy in pieces, is that of the same weights in memory."""

from __future__ import annotations

import pytest
import torch

from tierkv.engine.weights_digest import weights_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_a_gpu_have_the_digest_of_those_in_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(3000, 4000), torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(9)]).to(dtype)
    model[1].weight = torch.nn.Parameter(torch.randn(5, 7, dtype=dtype).t())  # not contiguous
    want = weights_digest(model)
    model.cuda()
    for _ in range(20):
        assert weights_digest(model) == want
    with torch.no_grad():
        model[0].weight[3999, 2999] += 1
        assert weights_digest(model) != want, "a write that was just launched is seen"
