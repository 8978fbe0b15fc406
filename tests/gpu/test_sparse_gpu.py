"""Sparse decode on a GPU: its kernels in CUDA graphs, and what the cache keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.attention import SequenceStep, build_batch
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.backends.protocol import PagedQuery, attend
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import Generation, GenerationOptions, Runner, open_runner
from tierkv.engine.sparse.attention import SparseAttention
from tierkv.engine.sparse.bounds import KeyBounds
from tierkv.engine.sparse.options import SparseDecode
from tierkv.storage.hot import HotPool
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout

BLOCK = 256
SPARSE = SparseDecode(budget=0.25, min_tokens=256, recent_tokens=64)
ALMOST_ALL = SparseDecode(budget=0.9, min_tokens=256, page_tokens=32)
"""Two passes whose numbers differ by a rounding may choose other pages: here those are the ones that matter least."""


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Runner]:
    model = make_model("llama", block_size=BLOCK, device="cuda", dtype=torch.bfloat16)
    config = CacheConfig(cold_path=folder, hot_bytes=256 << 20, warm_bytes=64 << 20, min_free_bytes=0)
    with open_runner(LoadedModel(model, None, "tiny"), config, **options) as runner:
        yield runner
        runner.cache.check()


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(runner: Runner, prompts: list[list[int]], count: int) -> list[Generation]:
    options = GenerationOptions(max_new_tokens=count, stop_ids=frozenset(), keep_logits=True)
    return runner.generate(prompts, options)


def assert_same_while_equal(got: Generation, want: Generation, most: float) -> None:
    """Compare logits until the first token that differs, which two bf16 logits that tie may make the second one.

    From there on both answer other texts. The second token is the first one that a sparse pass chooses.
    """
    assert got.logits is not None
    assert want.logits is not None
    pairs = zip(got.token_ids, want.token_ids, strict=True)
    equal = next((at for at, (a, b) in enumerate(pairs) if a != b), len(got.token_ids) - 1) + 1
    assert equal >= 2
    a, b = got.logits[:equal].double(), want.logits[:equal].double()
    assert float((a - b).norm() / b.norm()) < most


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_graphs_compute_what_eager_passes_do(tmp_path: Path, fuse: str) -> None:
    prompts = [tokens(count, seed=count) for count in (3000, 100, 2047)]  # one is exact, in the same passes
    errors: list[float] = []
    with opened(tmp_path, sparse=ALMOST_ALL, fuse=fuse) as runner:
        passes = runner._pass
        run, graphs = passes.run, passes.graphs
        assert graphs is not None

        def run_twice(steps: list[SequenceStep], token_ids: list[int]) -> torch.Tensor:
            """Compute each decode step again at the same state, eagerly."""
            got = run(steps, token_ids).clone()
            if all(step.num_new == 1 for step in steps):
                passes.graphs = None
                want = run(steps, token_ids)
                passes.graphs = graphs
                errors.extend(((got - want).norm(dim=-1) / want.norm(dim=-1)).tolist())
            return got

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "run", run_twice)
            generate(runner, prompts, 40)
        assert runner.sparse_tokens == 2 * 2 * 39
        assert any(shape.is_sparse for shape in graphs._graphs)
    # Of two pages of nearly equal weight either may be left out, and random keys make it matter which.
    assert len(errors) == 3 * 39
    assert max(errors[1::3]) < 5e-2, "all pages of the short sequence are read"
    assert sum(error < 5e-2 for error in errors) > 0.8 * len(errors)


def test_a_whole_budget_is_flash_attention(tmp_path: Path) -> None:
    prompt = tokens(3000, seed=1)
    with opened(tmp_path / "exact") as runner:
        (want,) = generate(runner, [prompt], 30)
    almost = SparseDecode(budget=0.99, min_tokens=256, page_tokens=32)  # leaves out the page of 94 that matters least
    with opened(tmp_path / "sparse", sparse=almost) as runner:
        (got,) = generate(runner, [prompt], 30)
        assert runner.sparse_tokens > 0
    assert_same_while_equal(got, want, 5e-2)


def test_nothing_that_is_decoded_sparsely_is_kept(tmp_path: Path) -> None:
    prompt = tokens(1000, seed=2)
    with opened(tmp_path, sparse=SPARSE) as runner:
        (got,) = generate(runner, [prompt], 300)
        runner.cache.flush()
        for tier in (None, Tier.HOT, Tier.WARM):
            if tier is not None:
                runner.cache.evict(tier)
            assert runner.cache.match([*prompt, *got.token_ids, 1]).num_cached_tokens == len(prompt)
        said = [*prompt, *got.token_ids, 7]
        (again,) = generate(runner, [said], 1)
    with opened(tmp_path / "exact") as runner:
        (want,) = generate(runner, [said], 1)
    assert again.logits is not None
    assert want.logits is not None
    assert float((again.logits - want.logits).norm() / want.logits.norm()) < 3e-2


@pytest.mark.parametrize(
    ("heads", "dim", "page", "options"),
    [
        (32, 128, 32, {}),
        (8, 128, 32, {"softcap": 20.0}),
        (32, 64, 16, {"sinks": True}),
        (8, 256, 64, {}),
        (32, 96, 256, {}),
    ],
    ids=str,
)
def test_kernels_attend_to_the_pages_that_torch_attends_to(
    heads: int, dim: int, page: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layout = BlockLayout.uniform(num_layers=2, block_size=BLOCK, kv_heads=8, head_dim=dim, dtype="bfloat16")
    counts = SparseDecode(budget=0.2, min_tokens=1, page_tokens=page).counts(BLOCK)
    past = [9000, 40, 2559, 2560]
    blocks = torch.randperm(80).tolist()
    steps = [
        SequenceStep(block_table=[blocks.pop() for _ in range(n // BLOCK + 1)], num_past=n, num_new=1) for n in past
    ]
    pool = HotPool(layout, 80, torch.device("cuda"))
    pool.blocks.normal_()
    query = torch.randn(len(past), heads, dim, dtype=torch.bfloat16, device="cuda") * 2
    found = []
    for device in ("cuda", "cpu"):
        if device == "cpu":
            on_cpu = HotPool(layout, 80, torch.device("cpu"))
            on_cpu.blocks.copy_(pool.blocks)
            pool, query = on_cpu, query.cpu()
        bounds = KeyBounds(pool, counts)
        bounds.update([(Private(), step) for step in steps])
        dense = make_attention("auto", torch.device(device))
        planner = SparseAttention(counts, bounds, dense)
        batch = build_batch(
            pool, steps, block_size=BLOCK, device=torch.device(device), attention=dense, decode_attention=planner
        )
        new = query[:, :8]
        sinks = torch.linspace(-1, 3, heads, device=device, dtype=torch.bfloat16) if "sinks" in options else None
        paged = PagedQuery(
            query=query,
            new_keys=new,
            new_values=new,
            keys=pool.key_cache(1),
            values=pool.value_cache(1),
            scale=dim**-0.5,
            softcap=options.get("softcap"),
            sinks=sinks,
            layer=1,
        )
        found.append(attend(paged, batch).double().cpu())
    errors = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)  # [sequences, heads]
    assert float(errors[1].max()) < 2e-2, "all pages of the short sequence are read"
    # Of two pages of nearly equal weight either may be read: a kernel's weights have 11 bits after the first one.
    assert float((errors < 2e-2).double().mean()) > 0.7
    assert float(errors.max()) < 0.7


class Private:
    """A sequence without registered blocks."""

    chain: tuple[bytes, ...] = ()

    def wait_all(self) -> None:
        """Do nothing: its K and V are there."""
