"""Makes the attention backends of a device."""

from __future__ import annotations

from pathlib import Path

import torch

from tierkv.engine.backends.choice import AttentionChoice
from tierkv.engine.backends.flash import FlashBackend
from tierkv.engine.backends.flashinfer import FlashInferBackend, FlashInferWorkspace, flashinfer_limits
from tierkv.engine.backends.measured import load_table, packaged_table
from tierkv.engine.backends.torch_attention import TorchBackend
from tierkv.errors import ConfigError

__all__ = ["ATTENTION_NAMES", "make_attention"]

ATTENTION_NAMES = ("auto", "torch", "flash-attn", "flashinfer-fa2", "flashinfer-fa3")


def make_attention(
    name: str,
    device: torch.device,
    *,
    table: Path | None = None,
    num_layers: int = 0,
    waits: bool = False,
) -> AttentionChoice:
    """Return what chooses the attention backends on a device.

    name: "auto", or the backend that attends everything. table: a file of measured times; None takes the one that
    comes with tierkv for this device, if it has one. num_layers: of the model; 0: without a table and FlashInfer.
    waits: as AttentionChoice says. Raises ConfigError for an unknown name and for a file that is no table.
    """
    if name not in ATTENTION_NAMES:
        raise ConfigError(f"attention must be one of {', '.join(ATTENTION_NAMES)}, got {name!r}")
    measured = load_table(table) if table is not None else None
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return AttentionChoice([TorchBackend()], is_forced=name != "auto")
    if name == "flash-attn":
        return AttentionChoice([FlashBackend()], is_forced=True)
    if name == "auto" and not num_layers:
        return AttentionChoice([FlashBackend(), TorchBackend()])
    workspace = FlashInferWorkspace(device)
    fa2, fa3 = (
        FlashInferBackend(kernels, limits=flashinfer_limits(kernels, device), workspace=workspace)
        for kernels in ("fa2", "fa3")
    )
    if name != "auto":
        return AttentionChoice([fa2 if name == fa2.name else fa3], is_forced=True)
    return AttentionChoice(
        [FlashBackend(), fa2, TorchBackend()],
        faster=[fa2, fa3],
        table=measured or packaged_table(torch.cuda.get_device_name(device)),
        num_layers=num_layers,
        waits=waits,
    )
