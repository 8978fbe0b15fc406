"""The sum over ranks with the add and the norm after it: one rank whose peers have begun, and processes that wait.

Ranks on streams of a GPU: tests/gpu/test_rank_norm_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

pytest.importorskip("triton")

from tierkv.errors import ShapeError
from tierkv.kernels import decoder, rank_norm
from tierkv.kernels.rank_norm import SharedParts, sum_add_rms_norm

ROWS = 4
EPSILON = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def memories(size: int, width: int, dtype: torch.dtype, device: str) -> list[SharedParts]:
    """Return the memory of `size` ranks, all of them of this process, with random parts."""
    count = SharedParts.num_bytes(ROWS, width, dtype, size)
    memory = [torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(size)]
    addresses = [each.data_ptr() for each in memory]
    ranks = [
        SharedParts(each, addresses, rank, rows=ROWS, width=width, dtype=dtype) for rank, each in enumerate(memory)
    ]
    for shared in ranks:
        shared.buffers.copy_(numbers(2, ROWS, width, dtype=dtype, device=device, seed=shared.rank))
    return ranks


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Return numbers whose sums are exact in 8 bits where the interpreter would cut bfloat16 off, random elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bfloat16:
        return torch.randint(-9, 10, shape, generator=generator).to(dtype).to(device)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def let_others_begin(shared: SharedParts, epoch: int) -> None:
    """Set the flags of the other ranks in the memory of this one, as if they had begun so many sums in each row."""
    own = shared.flags[:, shared.rank].clone()
    shared.flags.fill_(epoch)
    shared.flags[:, shared.rank] = own


def wanted(ranks: list[SharedParts], buffer: int, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new residual and its norm: a sum in float32 in the order of ranks, rounded, then the norm's kernel."""
    total = torch.zeros(residual.shape, dtype=torch.float32, device=residual.device)
    for shared in ranks:
        total += shared.buffers[buffer, : len(residual)].float()
    residual, normed = residual.clone(), torch.empty_like(residual)
    decoder.add_rms_norm(total.to(residual.dtype), residual, weight, EPSILON, normed)
    return residual, normed


def assert_same_norm(got: Tensor, want: Tensor) -> None:
    """Compare to the bit under the interpreter; compiled kernels may add the squares in another order."""
    if got.is_cuda:
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 64), (3, 96), (ROWS, 1024), (2, 1000)])
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 2), (3, 0)])
def test_a_sum_with_its_norm_is_the_sum_and_then_the_norm(
    device: str, dtype: torch.dtype, count: int, width: int, size: int, rank: int
) -> None:
    ranks = memories(size, width, dtype, device)
    residual, weight = (numbers(*shape, dtype=dtype, device=device, seed=9) for shape in ((count, width), (width,)))
    normed = torch.empty_like(residual)
    let_others_begin(ranks[rank], 1)
    want_residual, want_normed = wanted(ranks, 1, residual, weight)
    sum_add_rms_norm(ranks[rank], 1, residual, weight, EPSILON, normed)
    assert torch.equal(residual, want_residual)
    assert_same_norm(normed, want_normed)


def test_every_rank_has_the_same_bits(device: str) -> None:
    ranks = memories(4, 96, torch.float32, device)
    weight = numbers(96, dtype=torch.float32, device=device, seed=9)
    seen = []
    for shared in ranks:
        let_others_begin(shared, 1)
        residual = numbers(ROWS, 96, dtype=torch.float32, device=device, seed=8)
        normed = torch.empty_like(residual)
        sum_add_rms_norm(shared, 0, residual, weight, EPSILON, normed)
        seen.append((residual, normed))
    assert all(torch.equal(residual, seen[0][0]) and torch.equal(normed, seen[0][1]) for residual, normed in seen)


def test_each_sum_tells_the_others_its_number_in_its_rows(device: str) -> None:
    ranks = memories(3, 64, torch.float32, device)
    mine, weight = ranks[1], torch.ones(64, device=device)
    for epoch, count in enumerate((ROWS, 2, 1), 1):
        let_others_begin(mine, epoch)
        residual = torch.zeros(count, 64, device=device)
        sum_add_rms_norm(mine, epoch % 2, residual, weight, EPSILON, torch.empty_like(residual))
    for shared in ranks:
        assert shared.flags[:, 1].tolist() == [3, 2, 1, 1]
    for shared in (ranks[0], ranks[2]):
        assert not shared.flags[:, [0, 2]].any(), "flags of other ranks are theirs to write"


def test_only_the_named_buffer_and_rows_are_read(device: str) -> None:
    ranks = memories(2, 64, torch.float32, device)
    weight = torch.ones(64, device=device)
    for epoch, buffer in enumerate((0, 1, 0, 1), 1):
        let_others_begin(ranks[0], epoch)
        for shared in ranks:
            shared.buffers.fill_(torch.nan)
            shared.buffers[buffer, :2] = numbers(2, 64, dtype=torch.float32, device=device, seed=epoch + shared.rank)
        residual = torch.ones(2, 64, device=device)
        want_residual, want_normed = wanted(ranks, buffer, residual, weight)
        normed = torch.empty_like(residual)
        sum_add_rms_norm(ranks[0], buffer, residual, weight, EPSILON, normed)
        assert torch.equal(residual, want_residual)
        assert_same_norm(normed, want_normed)


def test_a_rank_that_never_comes_does_not_give_a_wrong_sum(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("the CUDA error would end the process")
    monkeypatch.setattr(rank_norm, "_MAX_POLLS", 5)
    ranks = memories(2, 64, torch.float32, device)
    residual = torch.zeros(1, 64)
    with pytest.raises(Exception, match="inline_asm"):  # the interpreter has no trap to run
        sum_add_rms_norm(ranks[0], 0, residual, torch.ones(64), EPSILON, torch.empty_like(residual))
    assert not residual.any()


def test_ranks_that_wait_for_each_other_use_two_buffers_in_turn(device: str) -> None:
    if device == "cuda":
        pytest.skip("processes without a GPU run the interpreter")
    size, count = 2, SharedParts.num_bytes(ROWS, 64, torch.float32, 2)
    memory = [torch.zeros(count, dtype=torch.uint8).share_memory_() for _ in range(size)]
    multiprocessing.spawn(sum_as_a_rank, (memory,), nprocs=size)  # raises what a rank raises


def sum_as_a_rank(rank: int, memory: list[Tensor]) -> None:
    """Sum 150 times with other processes, of which each has this memory at other addresses."""
    addresses = [each.data_ptr() for each in memory]
    shared = SharedParts(memory[rank], addresses, rank, rows=ROWS, width=64, dtype=torch.float32)
    weight = torch.ones(64)
    for step in range(150):
        rows = (3, 1, ROWS)[step % 3]
        parts = [torch.full((rows, 64), float(step * 10 + peer)) for peer in range(len(memory))]
        shared.buffers[step % 2, :rows] = parts[rank]
        residual = torch.zeros(rows, 64)
        sum_add_rms_norm(shared, step % 2, residual, weight, EPSILON, torch.empty_like(residual))
        assert torch.equal(residual, sum(parts)), f"rank {rank}, sum {step}"


def test_what_does_not_fit_is_refused_before_a_launch(device: str) -> None:
    (shared, _) = memories(2, 64, torch.float32, device)
    right: dict[str, Any] = {
        "residual": torch.zeros(2, 64, device=device),
        "weight": torch.ones(64, device=device),
        "normed": torch.zeros(2, 64, device=device),
    }
    for wrong in (
        {"residual": torch.zeros(ROWS + 1, 64, device=device), "normed": torch.zeros(ROWS + 1, 64, device=device)},
        {"residual": torch.zeros(2, 32, device=device), "normed": torch.zeros(2, 32, device=device)},
        {"weight": torch.ones(32, device=device)},
        {"weight": torch.ones(64, device=device, dtype=torch.bfloat16)},
        {"normed": torch.zeros(64, 2, device=device).t()},
    ):
        with pytest.raises(ShapeError):
            sum_add_rms_norm(shared, 0, **{**right, **wrong}, epsilon=EPSILON)
    assert not shared.flags.any()
    with pytest.raises(ShapeError):
        SharedParts(torch.zeros(64, dtype=torch.uint8), [0, 0], 0, rows=1, width=64, dtype=torch.float32)
