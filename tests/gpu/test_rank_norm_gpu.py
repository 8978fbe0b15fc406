"""Sums over ranks with their norms on one GPU: each rank is a stream, and its kernel waits for those of the others.

Nothing may load a module or take memory while a kernel waits: the driver would wait for it. So all kernels and graphs
run once with flags that let them pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tierkv.kernels import rank_norm
from tierkv.kernels.decoder import add_rms_norm
from tierkv.kernels.rank_norm import SharedParts, sum_add_rms_norm

WIDTH, ROWS, STEPS, PER_GRAPH = 4096, 8, 200, 4
EPSILON = 1e-6
COUNTS = (ROWS, 1, 3, 2)  # rows of the sums, in turn


@pytest.fixture(autouse=True)
def _fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_norm, "_MAX_POLLS", 1 << 23)


class Ranks:
    """Ranks on streams of one GPU, with their random parts and room for their results of STEPS sums."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        options = {"dtype": dtype, "device": "cuda"}
        self.size = size
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        count = SharedParts.num_bytes(ROWS, WIDTH, dtype, size)
        memory = [torch.zeros(count, dtype=torch.uint8, device="cuda") for _ in range(size)]
        addresses = [each.data_ptr() for each in memory]
        self.shared = [
            SharedParts(each, addresses, rank, rows=ROWS, width=WIDTH, dtype=dtype) for rank, each in enumerate(memory)
        ]
        self.weight = torch.randn(WIDTH, **options)
        self.parts = torch.randn(size, STEPS, ROWS, WIDTH, **options)
        self.inputs = torch.zeros(size, PER_GRAPH, ROWS, WIDTH, **options)  # of a graph
        self.residuals = torch.zeros(size, ROWS, WIDTH, **options)
        self.normed = torch.zeros(size, PER_GRAPH, ROWS, WIDTH, **options)
        self.totals = torch.zeros(size, PER_GRAPH, ROWS, WIDTH, **options)
        self.got = torch.zeros(2, size, STEPS, ROWS, WIDTH, **options)  # residuals, and their norms

    def begin(self) -> None:
        """Start anew: no rank has summed."""
        torch.cuda.synchronize()
        self.residuals.zero_()
        self.got.zero_()
        self.set_flags(0)

    def set_flags(self, epoch: int) -> None:
        """Let the ranks pass that have begun fewer sums."""
        torch.cuda.synchronize()
        for shared in self.shared:
            shared.flags.fill_(epoch)
            shared.flags[:, shared.rank] = 0
        torch.cuda.synchronize()

    def sum(self, rank: int, place: int) -> None:
        """Write a rank's part, as a matrix product would, and sum; on the current stream."""
        rows = COUNTS[place]
        shared, buffer = self.shared[rank], place % 2
        torch.add(self.inputs[rank, place, :rows], 0.0, out=shared.buffers[buffer, :rows])
        residual = self.residuals[rank, :rows]
        sum_add_rms_norm(shared, buffer, residual, self.weight, EPSILON, self.normed[rank, place, :rows])
        self.totals[rank, place, :rows].copy_(residual)

    def take(self, rank: int, steps: slice) -> None:
        """Give a rank's parts of some sums to its inputs."""
        self.inputs[rank].copy_(self.parts[rank, steps])

    def keep(self, rank: int, steps: slice) -> None:
        """Keep a rank's results."""
        self.got[0, rank, steps].copy_(self.totals[rank])
        self.got[1, rank, steps].copy_(self.normed[rank])

    def run_alone(self, rank: int) -> None:
        """Run everything of a rank but graphs once, with flags that let it pass."""
        self.set_flags(1 << 40)
        with torch.cuda.stream(self.streams[rank]):
            self.take(rank, slice(0, PER_GRAPH))
            for place in range(PER_GRAPH):
                self.sum(rank, place)
            self.keep(rank, slice(0, PER_GRAPH))
        torch.cuda.synchronize()

    def check(self) -> None:
        """Compare every sum and norm of every rank with the plain ones."""
        torch.cuda.synchronize()
        residual = torch.zeros_like(self.residuals[0])
        for step in range(STEPS):
            rows = COUNTS[step % PER_GRAPH]
            total = torch.zeros(rows, WIDTH, device="cuda")
            for rank in range(self.size):
                total += self.parts[rank, step, :rows].float()
            normed = torch.empty_like(residual[:rows])
            add_rms_norm(total.to(residual.dtype), residual[:rows], self.weight, EPSILON, normed)
            for rank in range(self.size):
                got, got_normed = self.got[:, rank, step, :rows]
                assert torch.equal(got, residual[:rows]), f"sum {step} of rank {rank}"
                torch.testing.assert_close(got_normed, normed, rtol=1e-2, atol=1e-2)
                assert torch.equal(got_normed, self.got[1, 0, step, :rows]), f"rank {rank} differs in sum {step}"


@pytest.fixture(params=[(2, torch.bfloat16), (2, torch.float16), (2, torch.float32), (4, torch.bfloat16)], ids=str)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    torch.manual_seed(0)
    size, dtype = request.param
    opened = Ranks(size, dtype)
    for rank in range(size):
        opened.run_alone(rank)
    yield opened
    torch.cuda.synchronize()


def steps_of(turn: int) -> slice:
    return slice(turn * PER_GRAPH, (turn + 1) * PER_GRAPH)


def test_ranks_that_wait_for_each_other_have_the_sums(ranks: Ranks) -> None:
    ranks.begin()
    for turn in range(STEPS // PER_GRAPH):
        order = range(ranks.size) if turn % 2 else reversed(range(ranks.size))  # each is first, and last
        for rank in order:
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.take(rank, steps_of(turn))
                for place in range(PER_GRAPH):
                    ranks.sum(rank, place)
                ranks.keep(rank, steps_of(turn))
    ranks.check()


def test_replayed_graphs_have_the_sums(ranks: Ranks) -> None:
    graphs = []
    for rank in range(ranks.size):
        ranks.set_flags(1 << 40)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=ranks.streams[rank]):
            for place in range(PER_GRAPH):
                ranks.sum(rank, place)
        with torch.cuda.stream(ranks.streams[rank]):
            graph.replay()
        torch.cuda.synchronize()
        graphs.append(graph)
    ranks.begin()
    for turn in range(STEPS // PER_GRAPH):
        order = range(ranks.size) if turn % 2 else reversed(range(ranks.size))
        for rank in order:
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.take(rank, steps_of(turn))
                graphs[rank].replay()
                ranks.keep(rank, steps_of(turn))
    ranks.check()


def test_a_graph_and_launches_take_turns(ranks: Ranks) -> None:
    graph, rank = torch.cuda.CUDAGraph(), ranks.size - 1
    ranks.set_flags(1 << 40)
    with torch.cuda.graph(graph, stream=ranks.streams[rank]):
        for place in range(PER_GRAPH):
            ranks.sum(rank, place)
    with torch.cuda.stream(ranks.streams[rank]):
        graph.replay()
    ranks.begin()
    for turn in range(STEPS // PER_GRAPH):
        for each in range(ranks.size):
            with torch.cuda.stream(ranks.streams[each]):
                ranks.take(each, steps_of(turn))
                if each == rank and turn % 3:
                    graph.replay()
                else:
                    for place in range(PER_GRAPH):
                        ranks.sum(each, place)
                ranks.keep(each, steps_of(turn))
    ranks.check()


def test_a_sum_of_no_rows_launches_nothing(ranks: Ranks) -> None:
    ranks.begin()
    empty: Tensor = ranks.residuals[0, :0]
    sum_add_rms_norm(ranks.shared[0], 0, empty, ranks.weight, EPSILON, torch.empty_like(empty))
    torch.cuda.synchronize()
    assert not ranks.shared[0].flags.any()
