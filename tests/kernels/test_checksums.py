from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tierkv.engine.checksums import _by_memory, _KernelSampler
from tierkv.errors import ShapeError
from tierkv.kernels.checksums import LINE_BYTES, sum_lines

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def plain_sums(memory: torch.Tensor, word: int, *, phase: int, stride: int) -> int:
    """Return the sum of all sampled lines, by Python's whole numbers."""
    words = memory.view(WORDS[word]).tolist()
    line, total, mask = LINE_BYTES // word, 0, (1 << 64) - 1
    for place, found in enumerate(words):
        if (place // line) % stride == phase % stride:
            factor = ((place * 0x2545F4914F6CDD1D) & mask) ^ (place >> 7) | 1
            total = (total + found * factor) & mask
    return total


@pytest.mark.parametrize("word", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("size", "stride", "phase"), [(64, 1, 0), (1024, 1, 3), (5 * 1024 + 64, 2, 1), (7 * 1024, 7, 5)]
)
def test_a_sum_is_that_of_its_definition(device: torch.device, word: int, size: int, stride: int, phase: int) -> None:
    memory = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    pieces = torch.tensor([[memory.data_ptr()], [size // word], [stride], [0]], device=device)
    sums = torch.full((1,), -1, dtype=torch.int64, device=device)
    sum_lines(pieces, sums, phase=phase, word_bytes=word)
    assert int(sums) % (1 << 64) == plain_sums(memory.cpu(), word, phase=phase, stride=stride)


def test_every_word_of_every_tensor_is_in_the_sums_of_one_phase(device: torch.device) -> None:
    whole = torch.zeros(70_001, dtype=torch.uint8, device=device)
    memory = _by_memory([whole[:70_000].view(torch.int64), whole[70_000:], torch.zeros(3, 5, device=device).T])
    sampler = _KernelSampler(memory, 4)
    before = [sampler.start(phase)().copy() for phase in range(4)]
    for tensor, place in ((memory[0], 69_999), (memory[0], 4096), (memory[1], 0), (memory[2], 59)):
        tensor[place] += 1
        changed = [bool((sampler.start(phase)() != before[phase]).any()) for phase in range(4)]
        tensor[place] -= 1
        small = tensor.numel() <= LINE_BYTES
        assert sum(changed) == (4 if small else 1)


def test_bad_arguments_are_refused_before_anything_is_launched(device: torch.device) -> None:
    pieces, sums = torch.zeros(4, 2, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for bad in ((pieces[:3], sums, 8), (pieces, sums[:1], 8), (pieces, sums.int(), 8), (pieces, sums, 3)):
        with pytest.raises(ShapeError):
            sum_lines(bad[0], bad[1], phase=0, word_bytes=bad[2])
