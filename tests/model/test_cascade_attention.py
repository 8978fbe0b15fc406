"""Reading a shared prefix once gives what reading it for every sequence gives."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from flash_reference import flash_reference
from places import Place

from tierkv.engine.attention import AttentionBatch, SequenceStep, build_batch
from tierkv.engine.attention_cascade import CascadeBatch, CascadeShape, attend_cascade, attend_with_flash, can_cascade
from tierkv.engine.backends.protocol import PagedQuery, attend
from tierkv.engine.cascade import SharedPrefix
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

SIZE = 256
DIM = 64

# Shared prefixes as (rows, blocks), and each sequence's tokens before the new one.
WHOLE = ([((0, 1, 2, 3), 2)], [2 * SIZE, 2 * SIZE + 7, 3 * SIZE - 1, 4 * SIZE + 30])
MOST = ([((0, 2, 3), 3)], [3 * SIZE + 1, 5, 3 * SIZE, 3 * SIZE + 99])
FEW = ([((1, 4), 1)], [9, SIZE + 9, 3 * SIZE, 40, 2 * SIZE + 1])
SEVERAL = (
    [((0, 3), 2), ((1, 4, 5), 1)],
    [2 * SIZE + 3, SIZE + 5, 0, 2 * SIZE, SIZE, 2 * SIZE + 1],
)
BATCHES = {"whole": WHOLE, "most": MOST, "few": FEW, "several": SEVERAL}


class Step:
    """One decode step over random K and V: sequences, some of which share leading blocks."""

    def __init__(
        self,
        groups: Sequence[tuple[tuple[int, ...], int]],
        past: list[int],
        place: Place,
        heads: int,
        **options: object,
    ) -> None:
        self.plan = [SharedPrefix(rows, blocks) for rows, blocks in groups]
        self.past = past
        device, kv_heads = torch.device(place.device), 2
        needed = [-(-(length + 1) // SIZE) for length in past]
        layout = BlockLayout.uniform(
            num_layers=2,
            block_size=SIZE,
            kv_heads=kv_heads,
            head_dim=DIM,
            dtype=str(place.dtype).removeprefix("torch."),
        )
        pool = HotPool(layout, sum(needed) + 1, device)
        generator = torch.Generator().manual_seed(1)
        pool.blocks.copy_(torch.randn(pool.blocks.shape, generator=generator))
        free = torch.randperm(pool.num_blocks, generator=generator).tolist()
        self.pool = pool
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        for group in self.plan:
            for row in group.rows[1:]:
                self.tables[row][: group.num_blocks] = self.tables[group.rows[0]][: group.num_blocks]
        steps = [SequenceStep(block_table=t, num_past=n, num_new=1) for t, n in zip(self.tables, past, strict=True)]
        self.batch: AttentionBatch = build_batch(pool, steps, block_size=SIZE, device=device, plan=self.plan)
        new = torch.randn(len(past), heads + 2 * kv_heads, DIM, generator=generator).to(device, place.dtype)
        query, key, value = new.split([heads, kv_heads, kv_heads], 1)
        self.paged = PagedQuery(
            query=query * 3,
            new_keys=key,
            new_values=value,
            keys=pool.key_cache(1),
            values=pool.value_cache(1),
            scale=0.125,
            **options,
        )

    def attend_plainly(self) -> torch.Tensor:
        """Write K and V of the new tokens and attend, each sequence for itself."""
        self.paged.keys[self.batch.block_ids, self.batch.offsets] = self.paged.new_keys
        self.paged.values[self.batch.block_ids, self.batch.offsets] = self.paged.new_values
        return attend(self.paged, self.batch)

    @property
    def cascade(self) -> CascadeBatch:
        assert self.batch.cascade is not None
        return self.batch.cascade


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare root mean squares: bfloat16 rounds each of the two passes and their merge."""
    error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    assert error <= (5e-3 if got.dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [2, 8])
def test_a_cascade_equals_the_plain_path(place: Place, batch: str, heads: int) -> None:
    step = Step(*BATCHES[batch], place, heads)
    assert can_cascade(step.paged)
    assert_close(attend_cascade(step.paged, step.cascade), step.attend_plainly())


@pytest.mark.parametrize("batch", BATCHES)
def test_sinks_take_part_in_the_softmax_once(place: Place, batch: str) -> None:
    sinks = torch.tensor([2.0, -1.0, 0.5, 4.0], device=place.device, dtype=place.dtype)
    step = Step(*BATCHES[batch], place, 4, sinks=sinks)
    assert_close(attend_cascade(step.paged, step.cascade), step.attend_plainly())


@pytest.mark.parametrize("batch", BATCHES)
def test_new_keys_and_values_are_written_where_the_plain_path_writes_them(place: Place, batch: str) -> None:
    plain, cascade = Step(*BATCHES[batch], place, 8), Step(*BATCHES[batch], place, 8)
    assert torch.equal(plain.pool.blocks, cascade.pool.blocks)
    plain.attend_plainly()
    attend_cascade(cascade.paged, cascade.cascade)
    assert torch.equal(plain.pool.blocks, cascade.pool.blocks)


def test_layers_with_a_window_attend_plainly(place: Place) -> None:
    assert not can_cascade(Step(*WHOLE, place, 4, window=300).paged)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [2, 8, 64])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_flash_attn_is_called_as_it_wants_to_be(
    monkeypatch: pytest.MonkeyPatch, batch: str, heads: int, softcap: float | None
) -> None:
    """The GPU's path, with flash-attn's function in plain torch."""
    if torch.cuda.is_available():
        pytest.skip("the real one is there")
    monkeypatch.setitem(sys.modules, "flash_attn", flash_reference())
    place = Place("cpu", torch.float32, SIZE)
    step = Step(*BATCHES[batch], place, heads, softcap=softcap)
    assert_close(attend_with_flash(step.paged, step.cascade), step.attend_plainly())


@pytest.mark.parametrize("batch", BATCHES)
def test_sizes_rounded_up_change_nothing(place: Place, batch: str) -> None:
    """As a CUDA graph has them: sequences, groups, members and blocks of which some are padding."""
    groups, past = BATCHES[batch]
    step = Step(groups, past, place, 4)
    exact = step.cascade.shape
    shape = CascadeShape(
        sequences=8,
        groups=exact.groups + 1 - exact.is_whole,
        members=8 if exact.is_whole else exact.members + 2,
        shared_blocks=exact.shared_blocks + 3,
        own_blocks=exact.own_blocks + 2,
        is_whole=exact.is_whole,
    )
    device = torch.device(place.device)
    padded = CascadeBatch(shape, block_size=SIZE, scratch_block=step.pool.scratch_block, device=device)
    padded.fill(step.plan, step.tables, [length + 1 for length in past])

    def fill_up(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(8 - len(past), *tensor.shape[1:])])

    paged = PagedQuery(
        query=fill_up(step.paged.query),
        new_keys=fill_up(step.paged.new_keys),
        new_values=fill_up(step.paged.new_values),
        keys=step.paged.keys,
        values=step.paged.values,
        scale=step.paged.scale,
    )
    got = attend_cascade(paged, padded)
    assert got.isfinite().all()
    assert_close(got[: len(past)], step.attend_plainly())
