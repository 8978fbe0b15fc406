"""Runs tests with one attention backend forced: TIERKV_TEST_ATTENTION=flashinfer-fa2 pytest tests/engine tests/model.

On a machine with a GPU the backend attends everything that is on the GPU. Elsewhere "flashinfer-fa2" and
"flashinfer-fa3" are tierkv's backends over a stand-in for FlashInfer's module in plain torch, which takes every dtype
and head dim.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from fake_flashinfer import fake_flashinfer

import tierkv.engine.attention
import tierkv.engine.runner
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import ATTENTION_NAMES, make_attention
from tierkv.engine.backends.flashinfer import FlashInferBackend, FlashInferLimits, FlashInferWorkspace

__all__ = ["FORCED", "FORCED_BY", "force_attention", "on_cpu"]

FORCED_BY = "TIERKV_TEST_ATTENTION"
FORCED = os.environ.get(FORCED_BY, "")

_ON_CPU = FlashInferLimits(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    head_dims=None,
)


def on_cpu(name: str) -> AttentionChoice:
    """Return a choice that is forced to a backend on the CPU; for FlashInfer's, the stand-in must be installed."""
    if not name.startswith("flashinfer-"):
        return make_attention(name, torch.device("cpu"))
    workspace = FlashInferWorkspace(torch.device("cpu"), 1 << 10)
    backend = FlashInferBackend(name.removeprefix("flashinfer-"), limits=_ON_CPU, workspace=workspace)
    return AttentionChoice([backend], is_forced=True)


def force_attention(patch: pytest.MonkeyPatch, forced: str) -> None:
    """Force a backend wherever none was asked for."""
    if forced not in ATTENTION_NAMES[1:]:
        pytest.exit(f"{FORCED_BY}={forced} is none of {', '.join(ATTENTION_NAMES[1:])}", returncode=4)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and forced == "flash-attn":
        pytest.exit(f"{FORCED_BY}={forced} needs a GPU", returncode=4)
    if not has_gpu and forced.startswith("flashinfer-"):
        patch.setitem(sys.modules, "flashinfer", fake_flashinfer())

    def make(
        name: str, device: torch.device, *, table: Path | None = None, num_layers: int = 0, waits: bool = False
    ) -> AttentionChoice:
        if name == "auto" and device.type == "cuda":
            name = forced
        elif name == "auto" and not has_gpu:
            return on_cpu(forced)
        return make_attention(name, device, table=table, num_layers=num_layers, waits=waits)

    for module in (tierkv.engine.runner, tierkv.engine.attention):
        patch.setattr(module, "make_attention", make)
