"""Where whole models are tested: on the CPU in float32, and in bfloat16 with flash-attn where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """device, dtype and block size of a test, and how far logits may be apart there."""

    device: str
    dtype: torch.dtype
    block_size: int

    def assert_close(self, got: Tensor, want: Tensor) -> None:
        """float32: 1e-4 at most, absolute, of logits of about 10. bfloat16: 3 % root mean square, relative."""
        got, want = got.double().cpu(), want.double().cpu()
        assert got.shape == want.shape
        if self.dtype == torch.float32:
            assert float((got - want).abs().max()) <= 1e-4
        else:
            error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
            assert error <= 0.03, f"relative error {error:.3f}"
