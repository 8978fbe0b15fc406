"""Pieces of rows between two memories: each byte where it belongs, and no other byte changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tierkv.movers import batch_copy
from tierkv.movers.batch_copy import Piece, copy_pieces

ROWS, ROW_BYTES = 6, 4096
PIECES = [
    Piece(0, 5, 4096),
    Piece(3, 1, 100, 8, 2000),
    Piece(3, 2, 1000, 3000, 0),
    Piece(5, 2, 1, 4095, 4095),
]


def memory(device: str, *, row_bytes: int = ROW_BYTES + 64) -> torch.Tensor:
    """Return rows of random bytes with a gap behind each, page-locked if they are to meet a GPU."""
    rows = torch.randint(0, 256, (ROWS, row_bytes), dtype=torch.uint8)
    if device == "cuda":
        return rows.cuda()[:, :ROW_BYTES]
    return (rows.pin_memory() if torch.cuda.is_available() else rows)[:, :ROW_BYTES]


def expected(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    wanted, given = target.cpu().clone(), source.cpu()
    for row, other, length, start, other_start in PIECES:
        wanted[row, start : start + length] = given[other, other_start : other_start + length]
    return wanted


DEVICES = [("cpu", "cpu")] + [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")] * torch.cuda.is_available()


@pytest.mark.parametrize("is_default_stream", [True, False])
@pytest.mark.parametrize(("to", "of"), DEVICES)
def test_pieces_arrive_where_they_belong_and_nothing_else_changes(to: str, of: str, is_default_stream: bool) -> None:
    target, source = memory(to), memory(of)
    wanted = expected(target, source)
    is_cuda = "cuda" in (to, of)
    if is_cuda:
        torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if is_cuda and not is_default_stream else None):
        copy_pieces(target, source, PIECES)
    if is_cuda:
        torch.cuda.synchronize()
    assert torch.equal(target.cpu(), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_the_runtime_is_asked_for_nothing_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RefusingRuntime()
    find: Callable[[], RefusingRuntime] = lambda: runtime  # noqa: E731
    monkeypatch.setattr(batch_copy, "_batches", find)
    copy_pieces(memory("cuda"), memory("cpu"), PIECES)  # the default stream takes no batches
    assert runtime.asked == 0


class RefusingRuntime:
    """A CUDA runtime that knows batches and takes none."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_cleared = False

    class cudaMemcpyAttributes:  # noqa: N801
        """As CUDA names it."""

    class cudaMemcpySrcAccessOrder:  # noqa: N801
        """As CUDA names it."""

        cudaMemcpySrcAccessOrderStream = 1  # noqa: N815

    def cudaMemcpyBatchAsync(self, *arguments: object) -> tuple[int]:
        """Refuse."""
        self.asked += 1
        return (801,)

    def cudaGetLastError(self) -> None:
        """Forget the refusal."""
        self.is_cleared = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_where_a_batch_is_refused_the_pieces_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RefusingRuntime()
    find: Callable[[], RefusingRuntime] = lambda: runtime  # noqa: E731
    monkeypatch.setattr(batch_copy, "_batches", find)
    target, source = memory("cuda"), memory("cpu")
    wanted = expected(target, source)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        copy_pieces(target, source, PIECES)
    torch.cuda.synchronize()
    assert (runtime.asked, runtime.is_cleared) == (1, True)
    assert torch.equal(target.cpu(), wanted)
