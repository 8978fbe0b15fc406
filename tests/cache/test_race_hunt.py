"""The hunt that `make bench-gpu` runs for long on a GPU, in short: on whatever this machine has."""

from __future__ import annotations

import pytest
import torch

from benchmarks.race_hunt import hunt


@pytest.mark.parametrize("warm_codec", ["raw", "windows"])
def test_random_steps_of_several_threads_read_no_byte_that_is_not_their_own(warm_codec: str) -> None:
    found = hunt(num_steps=600, seed=1, warm_codec=warm_codec, device="cuda" if torch.cuda.is_available() else "cpu")
    assert not found.errors, found.errors[0]
    assert not found.wrong
    assert found.steps == 600 and found.checked_blocks > 100
