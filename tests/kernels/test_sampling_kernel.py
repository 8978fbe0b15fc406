"""The kernel chooses what plain torch chooses, from the same settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tierkv.engine import draws
from tierkv.engine.sampling import Sampler, SamplingOptions
from tierkv.errors import ShapeError
from tierkv.kernels.sampling import COLUMNS, choose_tokens

# numpy, which interprets the kernel, warns of the infinities that a GPU computes with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MIXED = [
    SamplingOptions(),
    SamplingOptions(temperature=0.7, seed=1),
    SamplingOptions(temperature=1.3, top_k=5, seed=2, top_logprobs=0),
    SamplingOptions(temperature=1.0, top_p=0.7, seed=3),
    SamplingOptions(top_logprobs=0),
    SamplingOptions(temperature=2.0, top_k=40, top_p=0.5, seed=4, top_logprobs=3),
    SamplingOptions(temperature=1e-300, top_p=1e-300, seed=5),
    SamplingOptions(temperature=0.9, top_k=1, seed=6),
]


def settings_of(options: list[SamplingOptions], vocabulary: int, *, drawn: int = 0) -> torch.Tensor:
    rows = []
    for each in options:
        sampler = Sampler(each)
        sampler.num_drawn = drawn
        rows.append(np.frombuffer(sampler.settings(vocabulary), dtype=np.int32))
    return torch.from_numpy(np.stack(rows))


def by_kernel(logits: torch.Tensor, settings: torch.Tensor | None, device: str, **options: bool) -> torch.Tensor:
    out = torch.full((2, logits.shape[0]), -7, dtype=torch.int32, device=device)
    options = {"is_sampled": settings is not None, "has_logprobs": settings is not None} | options
    choose_tokens(logits.to(device), None if settings is None else settings.to(device), out, **options)
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 7, 500, 9000])
def test_the_kernel_chooses_what_torch_chooses(device: str, dtype: torch.dtype, vocabulary: int) -> None:
    assert COLUMNS == draws.COLUMNS
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(len(MIXED), vocabulary, generator=generator) * 3).to(dtype)
    for drawn in range(1 if vocabulary > 1000 else 4):
        settings = settings_of(MIXED, vocabulary, drawn=drawn)
        got, want = by_kernel(logits, settings, device), draws.choose_tokens(logits, settings.numpy())
        assert got[0].tolist() == want[0].tolist()
        torch.testing.assert_close(got[1].view(torch.float32), want[1].view(torch.float32), atol=1e-5, rtol=1e-5)
        assert (got[1] != 0).tolist() == [each.top_logprobs is not None and vocabulary > 1 for each in MIXED]


@pytest.mark.parametrize("value", [0.0, -3.5, -torch.inf])
def test_ties_of_a_greedy_row_go_to_the_lowest_id(device: str, value: float) -> None:
    logits = torch.full((2, 9000), value)
    logits[1, [77, 8500]] = 4.0
    for settings in (None, settings_of([SamplingOptions(), SamplingOptions()], 9000)):
        assert by_kernel(logits, settings, device)[0].tolist() == [0, 77]


def test_tokens_that_tie_with_the_last_kept_one_are_kept(device: str) -> None:
    logits = torch.full((1, 64), -5.0)
    logits[0, [3, 9, 40]] = 2.0
    for options in ({"top_k": 2}, {"top_p": 0.4}):
        found = set()
        for seed in range(16):
            settings = settings_of([SamplingOptions(temperature=1.0, seed=seed, **options)], 64)  # type: ignore[arg-type]
            found.add(int(by_kernel(logits, settings, device)[0]))
            assert int(draws.choose_tokens(logits, settings.numpy())[0]) in (3, 9, 40)
        assert found == {3, 9, 40}


def test_negative_and_subnormal_numbers_are_in_order(device: str) -> None:
    logits = torch.tensor([[-1e-39, 1e-39, -0.0, -7.0, -3e30, 2e-38, -torch.inf]])
    for top_k, kept in ((1, {5}), (2, {5, 1}), (5, {0, 1, 2, 3, 5}), (6, {0, 1, 2, 3, 4, 5})):
        found = set()
        for seed in range(25):
            settings = settings_of([SamplingOptions(temperature=1e33, top_k=top_k, seed=seed)], 7)
            found.add(int(by_kernel(logits, settings, device)[0]))
        assert found == kept


def test_what_does_not_fit_is_refused_before_a_launch(device: str) -> None:
    logits, out = torch.zeros(2, 8, device=device), torch.zeros(2, 2, dtype=torch.int32, device=device)
    for bad in (logits.double(), logits[0], logits.T.contiguous().T, logits[:, :0]):
        with pytest.raises(ShapeError):
            choose_tokens(bad, None, out, is_sampled=False, has_logprobs=False)
    with pytest.raises(ShapeError, match="need settings"):
        choose_tokens(logits, None, out, is_sampled=True, has_logprobs=False)
    with pytest.raises(ShapeError, match="out must be"):
        choose_tokens(logits, None, out[:, :1].contiguous(), is_sampled=False, has_logprobs=False)
    with pytest.raises(ShapeError, match="settings must be"):
        choose_tokens(logits, out, out, is_sampled=True, has_logprobs=False)
