"""ManagedFlashAttention: exact under any budget that holds a piece, and honest about what it took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_model import CachedModel
from places import Place
from tiny_models import VOCABULARY, make_model
from torch import Tensor
from torch.nn import functional

from tierkv.engine.managed_attention import ManagedFlashAttention
from tierkv.errors import CapacityError, ConfigError, ShapeError
from tierkv.requests.block_control import BlockReport
from tierkv.values.block import Tier

HEADS, KV_HEADS, DIM = 8, 2, 64


@pytest.fixture
def cached(place: Place, tmp_path: Path) -> Iterator[CachedModel]:
    model = make_model("llama", block_size=place.block_size, device=place.device, dtype=place.dtype)
    with CachedModel(model, tmp_path, block_size=place.block_size, hot=16, warm=12) as found:
        yield found


@pytest.fixture
def attention(cached: CachedModel) -> Iterator[ManagedFlashAttention]:
    with ManagedFlashAttention(cached.cache) as found:
        yield found


def qkv(place: Place, queries: int, keys: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(batch, queries, HEADS, DIM), (batch, keys, KV_HEADS, DIM), (batch, keys, KV_HEADS, DIM)]
    q, k, v = (torch.randn(shape, generator=generator).to(place.device, place.dtype) for shape in shapes)
    return q * 3, k, v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention with the queries at the end, in float64."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.double().cpu().transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def assert_exact(got: Tensor, want: Tensor) -> None:
    error = (got.double().cpu() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error <= (5e-3 if got.dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(("queries", "keys", "batch"), [(1, 700, 2), (45, 700, 1), (300, 300, 2), (130, 400, 1)])
@pytest.mark.parametrize("share", [0.15, 0.4, 2.0, None])
def test_attention_is_exact_under_any_budget(
    place: Place,
    attention: ManagedFlashAttention,
    cpu_offload: bool,
    queries: int,
    keys: int,
    batch: int,
    share: float | None,
) -> None:
    q, k, v = qkv(place, queries, keys, batch)
    one = k.nbytes + v.nbytes + 8 * batch * queries * HEADS
    budget = None if share is None else max(int(share * one), 200_000)
    out, stats = attention.forward_with_control(q, k, v, memory_budget=budget, cpu_offload=cpu_offload, profile=True)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    assert_exact(out, plain(q, k, v))
    assert stats.seconds > 0 and stats.kv_bytes == k.nbytes + v.nbytes
    assert stats.budget_bytes == budget
    if budget is None:
        assert stats.pieces == 1
        return
    assert stats.peak_bytes <= budget
    if budget < k.nbytes + v.nbytes:
        assert stats.pieces > 1
    if stats.measured_peak_bytes is not None:  # the allocator rounds each tensor up to 512 bytes
        assert stats.measured_peak_bytes <= budget + 16 * 512


def test_offloaded_keys_and_values_stream_through_a_double_buffer(
    place: Place, attention: ManagedFlashAttention
) -> None:
    q, k, v = qkv(place, 64, 2048)
    _, stats = attention.forward_with_control(q, k, v, memory_budget=400_000, cpu_offload=True)
    assert stats.pieces > 4
    assert stats.key_tokens < 2048
    assert stats.bytes_to_device >= stats.kv_bytes  # every run of queries reads them
    assert stats.bytes_to_cpu == (stats.kv_bytes if place.device == "cuda" else 0)
    host_bytes = attention.inspect_cache_state().host_bytes
    assert host_bytes == (stats.kv_bytes if place.device == "cuda" else 0)
    _, resident = attention.forward_with_control(q, k, v, memory_budget=400_000)
    assert resident.bytes_to_device == resident.bytes_to_cpu == 0
    assert resident.peak_bytes < stats.peak_bytes


def test_calls_behind_each_other_do_not_mix_their_buffers(place: Place, attention: ManagedFlashAttention) -> None:
    calls = [qkv(place, 40 + i, 900 + 10 * i) for i in range(4)]
    outs = [attention.forward_with_control(*call, memory_budget=300_000, cpu_offload=True)[0] for call in calls]
    for call, out in zip(calls, outs, strict=True):
        assert_exact(out, plain(*call))


def test_keys_and_values_on_the_cpu_serve_a_query_on_the_device(place: Place, attention: ManagedFlashAttention) -> None:
    q, k, v = qkv(place, 50, 800)
    out, stats = attention.forward_with_control(q, k.cpu(), v.cpu(), memory_budget=300_000)
    assert_exact(out, plain(q, k, v))
    assert stats.bytes_to_cpu == 0


def test_a_budget_below_the_smallest_piece_is_refused(place: Place, attention: ManagedFlashAttention) -> None:
    with pytest.raises(CapacityError, match="at least"):
        attention.forward_with_control(*qkv(place, 64, 512), memory_budget=1000)


def test_tensors_that_do_not_fit_each_other_are_refused(place: Place, attention: ManagedFlashAttention) -> None:
    q, k, v = qkv(place, 8, 16)
    for bad in ((q, k, v[:, :8]), (q[:, :, :7], k, v), (k.repeat(1, 2, 4, 1), k, v), (q[0], k[0], v[0])):
        with pytest.raises(ShapeError):
            attention.forward_with_control(*(x.contiguous() for x in bad))
    with pytest.raises(ShapeError, match="dtype"):
        attention.forward_with_control(q.half(), k, v)
    with pytest.raises(ShapeError, match="contiguous"):
        attention.forward_with_control(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)


class Tracker:
    """Records its calls."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.purposes: set[str] = set()

    def register_allocation(self, tensor: Tensor, purpose: str, **metadata: Any) -> str:
        self.purposes.add(purpose)
        self.live[str(len(self.purposes) + len(self.live) + id(tensor))] = tensor.nbytes
        return next(reversed(self.live))

    def free_allocation(self, allocation_id: str) -> None:
        del self.live[allocation_id]


def test_a_tracker_hears_of_every_buffer_and_of_its_end(place: Place, cached: CachedModel) -> None:
    tracker = Tracker()
    with ManagedFlashAttention(cached.cache, memory_tracker=tracker) as attention:
        attention.forward_with_control(*qkv(place, 64, 1024), memory_budget=300_000, cpu_offload=True)
    assert "attention stream buffer" in tracker.purposes and "attention sums" in tracker.purposes
    assert tracker.live == {}


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_block_that_is_not_free_is_shown(
    place: Place, cached: CachedModel, attention: ManagedFlashAttention
) -> None:
    size = place.block_size
    sequences, _ = cached.start([tokens(2 * size + 3, seed=1)])
    state = attention.inspect_cache_state()
    (table,) = [sequence.block_table for sequence in sequences]
    blocks = {block.block_id: block for block in state.blocks}
    assert set(blocks) == set(table)
    assert state.free_blocks == 16 - 3
    assert [blocks[i].num_tokens for i in table] == [size, size, 0]
    assert [blocks[i].depth for i in table[:2]] == [0, 1]
    assert blocks[table[2]].block_hash is None
    assert all(blocks[i].reference_count >= 1 for i in table)
    cached.release(sequences)
    assert {block.block_id for block in attention.inspect_cache_state().blocks} == set(table[:2])


def test_blocks_are_evicted_pinned_and_offloaded_by_their_ids(
    place: Place, cached: CachedModel, attention: ManagedFlashAttention
) -> None:
    size = place.block_size
    sequences, _ = cached.start([tokens(3 * size + 1, seed=1), tokens(2 * size + 1, seed=2)])
    (a, b, c, _), (d, e, own) = (list(sequence.block_table) for sequence in sequences)

    def manage(**asked: list[int]) -> BlockReport:
        report = attention.manual_cache_management(**asked)
        assert isinstance(report, BlockReport)
        cached.cache.check()
        return report

    assert "use it" in manage(evict_blocks=[a]).refused[a]
    cached.release(sequences)
    assert "continue it" in manage(evict_blocks=[b]).refused[b]
    assert manage(pin_blocks=[c]).pinned == (c,)
    report = manage(evict_blocks=[c, own])
    assert (report.evicted, "pinned" in report.refused[c], "nothing" in report.refused[own]) == ((), True, True)
    cached.cache.blocks.unpin([c])
    assert manage(evict_blocks=[b, c]).evicted == (b, c)  # children first, whatever the order asked
    assert manage(offload_blocks=[d, e]).offloaded == (d, e)
    found = cached.cache.match(tokens(2 * size + 1, seed=2))
    assert found.blocks[Tier.HOT] == 0 and found.num_cached_tokens == 2 * size + 1
    with pytest.raises(ConfigError, match="no block"):
        manage(evict_blocks=[99])


def test_offloaded_blocks_come_back_as_they_were(
    place: Place, cached: CachedModel, attention: ManagedFlashAttention
) -> None:
    prompt = tokens(2 * place.block_size + 1, seed=3)
    sequences, _ = cached.start([prompt])
    table = sequences[0].block_table[:2]
    before = cached.cache.hot.blocks[table].clone()
    cached.release(sequences)
    attention.manual_cache_management(offload_blocks=table)
    sequences, _ = cached.start([[*prompt, 5]])
    sequences[0].wait_all()
    assert torch.equal(cached.cache.hot.blocks[sequences[0].block_table[:2]], before)
    cached.release(sequences)


def test_a_memory_controller_manages_in_the_caches_place(cached: CachedModel) -> None:
    class Controller:
        def manual_cache_management(
            self, evict_blocks: object = None, pin_blocks: object = None, offload_blocks: object = None
        ) -> object:
            return evict_blocks, pin_blocks, offload_blocks

    attention = ManagedFlashAttention(cached.cache, memory_controller=Controller())
    assert attention.manual_cache_management([1], offload_blocks=[2]) == ([1], None, [2])
