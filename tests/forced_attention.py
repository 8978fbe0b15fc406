"""Runs tests with one attention backend forced: TIERKV_TEST_ATTENTION=flashinfer-fa2 pytest tests/engine tests/model.

On a machine with a GPU the backend attends everything that is on the GPU. Elsewhere it is tierkv's backend over a
stand-in for the module of FlashInfer or flash-attn in plain torch, which takes every dtype and head dim.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from fake_flashinfer import fake_flashinfer
from flash_reference import flash_reference

import tierkv.engine.attention
import tierkv.engine.runner
from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.factory import ATTENTION_NAMES, make_attention
from tierkv.engine.backends.flash import FlashBackend
from tierkv.engine.backends.flashinfer import FlashInferBackend, FlashInferLimits, FlashInferWorkspace
from tierkv.engine.backends.protocol import Batch, LayerShape

__all__ = ["FORCED", "FORCED_BY", "force_attention", "install_stand_ins", "on_cpu"]

FORCED_BY = "TIERKV_TEST_ATTENTION"
FORCED = os.environ.get(FORCED_BY, "")

_ON_CPU = FlashInferLimits(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    head_dims=None,
)


class _FlashOnCpu(FlashBackend):
    def why_not(self, layer: LayerShape, batch: Batch | None = None) -> str | None:
        return None if layer.k_dim == layer.v_dim else "K and V have different dims"


def install_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Let `import flashinfer` and `import flash_attn` find the stand-ins."""
    patch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    patch.setitem(sys.modules, "flash_attn", flash_reference())


def on_cpu(name: str) -> AttentionChoice:
    """Return a choice that is forced to a backend on the CPU; the stand-ins must be installed."""
    if name == "flash-attn":
        return AttentionChoice([_FlashOnCpu()], is_forced=True)
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
    if not has_gpu:
        install_stand_ins(patch)

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
