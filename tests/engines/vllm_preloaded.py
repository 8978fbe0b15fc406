"""What every life of a vLLM engine imports, so that the process from which lives are forked has it already."""

from __future__ import annotations

import os
from importlib import import_module

from vllm_life import SETTINGS

os.environ.update(SETTINGS)  # vLLM reads some of them while it is imported

for name in (
    *("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "vllm.v1.kv_offload.tiering.spec"),
    *("tierkv.integrations.vllm.connector", "tierkv.integrations.vllm.tier"),
):
    import_module(name)
