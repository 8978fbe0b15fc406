"""The choice among attention backends in a runner on a GPU: compiled beside requests, then captured in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from tierkv import csr_block_table, page_view
from tierkv.config import CacheConfig
from tierkv.engine.backends.flashinfer import _GraphPlan
from tierkv.engine.backends.measured import AttentionTable, MeasuredPoint, save_table
from tierkv.engine.graph_inputs import GraphShape
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

PAST, NEW = 17 * 256, 10  # whole blocks, so that only the new tokens are computed
FASTER = MeasuredPoint(
    heads=4,
    kv_heads=2,
    head_dim=64,
    sequences=1,
    new=16,
    kv=4096,
    us={"flash-attn": 100.0, "flashinfer-fa2": 1.0},
    plan_us={"flashinfer-fa2": 1.0},
)


@contextmanager
def opened(folder: Path, attention: str, table: Path | None = None) -> Iterator[Runner]:
    model = make_model("llama", block_size=256, device="cuda", dtype=torch.bfloat16)
    config = CacheConfig(cold_path=folder, hot_bytes=256 << 20, warm_bytes=64 << 20, min_free_bytes=0)
    loaded = LoadedModel(model, None, "tiny")
    with open_runner(loaded, config, attention=attention, attention_table=table) as runner:
        yield runner


def logits_of(runner: Runner, number: int) -> torch.Tensor:
    """Return the logits of a request with a few new tokens behind a long prefix."""
    prompt = [i % 500 for i in range(PAST)] + [number + i for i in range(NEW)]
    options = GenerationOptions(max_new_tokens=1, keep_logits=True, store_partial=False)
    (answer,) = runner.generate([prompt], options)
    assert answer.logits is not None
    return answer.logits


def test_a_backend_is_compiled_beside_requests_and_then_in_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer")
    table = tmp_path / "table.json"
    save_table(AttentionTable(device=torch.cuda.get_device_name(), points=(FASTER,)), table)
    with opened(tmp_path / "flash", "flash-attn") as runner:
        wanted = [logits_of(runner, number) for number in range(6)]
    with opened(tmp_path / "auto", "auto", table) as runner:
        found = [logits_of(runner, 0), logits_of(runner, 1)]
        runner.wait_for_kernels()
        found += [logits_of(runner, number) for number in range(2, 6)]
        assert runner._pass.graphs is not None
        graph = runner._pass.graphs._graphs[GraphShape(1, 16, 32)]
        (plan,) = graph.inputs.batch.plans.values()
        assert isinstance(plan, _GraphPlan)
        runner.cache.check()
    for got, want in zip(found, wanted, strict=True):
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert float(error) <= 4e-2


@pytest.mark.parametrize("name", ["torch", "flashinfer-fa2", "flashinfer-fa3"])
def test_a_forced_backend_has_the_logits_of_flash_attn(name: str, tmp_path: Path) -> None:
    if name != "torch":
        pytest.importorskip("flashinfer")
    with opened(tmp_path / "flash", "flash-attn") as runner:
        wanted = [logits_of(runner, number) for number in range(4)]
    with opened(tmp_path / name, name) as runner:
        found = [logits_of(runner, number) for number in range(4)]
        assert runner._pass.graphs is not None
        assert bool(runner._pass.graphs._graphs) == (name != "torch")
        runner.cache.check()
    for got, want in zip(found, wanted, strict=True):
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert float(error) <= 4e-2


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [16, 256])
def test_flashinfer_reads_small_pages_of_the_pool_by_a_flat_table(page: int, layout: str) -> None:
    flashinfer = pytest.importorskip("flashinfer")
    shape = BlockLayout.uniform(num_layers=3, block_size=256, kv_heads=2, head_dim=128, dtype="bfloat16")
    pool = HotPool(shape, 9, torch.device("cuda"))
    pool.blocks.normal_()
    table = torch.tensor([[7, 3, 0], [5, 1, 8]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([300, 700], dtype=torch.int32, device="cuda")
    views = [page_view(each, page) for each in (pool.key_cache(1), pool.value_cache(1))]
    csr = csr_block_table(table, lengths, block_size=256, page_size=page, pages_per_block=views[0][1])
    query = torch.randn(2, 8, 128, dtype=torch.bfloat16, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda"), layout, backend="fa2"
    )
    last, starts = csr.kv_last_page_len.cpu(), csr.kv_indptr.cpu()
    wrapper.plan(
        torch.arange(3, dtype=torch.int32),
        *(starts, csr.kv_indices[: int(starts[-1])], last),
        *(8, 2, 128, page),
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    pages = [view.transpose(1, 2) if layout == "HND" else view for view, _ in views]
    found = wrapper.run(query, (pages[0], pages[1]))
    for row, length in enumerate(lengths.tolist()):
        blocks = table[row].long()
        keys, values = (
            each[blocks].flatten(0, 1)[:length].float().repeat_interleave(4, 1)
            for each in (pool.key_cache(1), pool.value_cache(1))
        )
        weights = (torch.einsum("hd,lhd->hl", query[row].float(), keys) * 128**-0.5).softmax(-1)
        want = torch.einsum("hl,lhd->hd", weights, values)
        error = (found[row].float() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert float(error) <= 5e-3
