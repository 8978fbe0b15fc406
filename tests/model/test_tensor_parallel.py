"""A tiny model split over real processes: each rank keeps its slice, and all use the same tokens of it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from child_process import ENVIRONMENT, command
from places import Place
from rank_worker import NUM_NEW, block_size_of, dtype_of, prompt_of
from tiny_models import make_model
from transformers.distributed import DistributedConfig

from tierkv.engine.model_support import check_split
from tierkv.engine.models import split_model
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.ranks.group import OneRank
from tierkv.ranks.torch_ranks import TorchRanks

WORKER = Path(__file__).with_name("rank_worker.py")
TIMEOUT_S = 180
COLD = 2  # where it stands among the tiers

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two GPUs on this machine")
    ),
]


class Ranks:
    """Starts two ranks over one store, as often as need be."""

    size = 2

    def __init__(self, directory: Path, device: str) -> None:
        self.directory = directory
        self.device = device
        self.runs = 0

    def run(self, *actions: str) -> list[list[Any]]:
        """Let every rank do these actions, each ACTION:FAMILY; return what each saw, by action and rank."""
        processes = self.start(*actions)
        try:
            said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0] * self.size, "\n".join(map("".join, said))
        run = self.directory / str(self.runs)
        return [[np.load(run / f"{number}-{rank}.npz") for rank in range(self.size)] for number in range(len(actions))]

    def start(self, *actions: str) -> list[subprocess.Popen[str]]:
        """Start a process for every rank, with these actions."""
        self.runs += 1
        (self.directory / str(self.runs)).mkdir()
        options = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
        if self.device == "cpu":
            options["CUDA_VISIBLE_DEVICES"] = ""  # Transformers splits over the GPUs that it sees
        arguments = (self.size, self.directory, self.runs, self.device, *actions)
        return [
            subprocess.Popen(
                command(WORKER, rank, *arguments),
                env={**options, "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(self.size)
        ]

    def assert_answers(self, family: str, seen: list[Any]) -> None:
        """Check that all ranks chose the same tokens, and that their logits are the whole model's."""
        size = block_size_of(self.device)
        place = Place(self.device, dtype_of(self.device), size)
        model = make_model(family, block_size=size, device=self.device, dtype=place.dtype)
        prompt = prompt_of(self.device)
        for one in seen:
            assert one["token_ids"].tolist() == seen[0]["token_ids"].tolist()
            assert len(one["token_ids"]) == NUM_NEW
            tokens = [*prompt, *one["token_ids"].tolist()[:-1]]
            place.assert_logits(torch.from_numpy(one["logits"]), model, tokens, first=len(prompt) - 1)


def cached(seen: list[Any], tier: int) -> list[int]:
    return [int(one["cached"][tier]) for one in seen]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_split_model_restarts_from_disk_and_recomputes_together_what_one_rank_lost(
    tmp_path: Path, device: str
) -> None:
    ranks = Ranks(tmp_path, device)
    size, length = block_size_of(device), len(prompt_of(device))

    (first,) = ranks.run("generate:qwen3")
    assert [one["cached"].sum() for one in first] == [0, 0]
    assert [int(one["kv_heads"]) for one in first] == [1, 1]
    assert first[0]["namespace"] != first[1]["namespace"]

    restarted, _, damaged, mended = ranks.run("generate:qwen3", "damage_one:qwen3", "generate:qwen3", "generate:qwen3")
    assert cached(restarted, COLD) == [length - 1] * 2
    assert [one["cached"].sum() for one in damaged] == [size, size]
    assert "corrupt=1" in damaged[1]["reasons"]
    assert any(reason.startswith("other_rank=") for reason in damaged[0]["reasons"])
    assert cached(mended, COLD) == [length - 1] * 2
    for seen in (first, restarted, damaged, mended):
        ranks.assert_answers("qwen3", seen)


@pytest.mark.slow
def test_other_families_are_split_as_well_and_a_weight_of_one_rank_is_part_of_every_ranks_identity(
    tmp_path: Path,
) -> None:
    ranks = Ranks(tmp_path, "cpu")
    length = len(prompt_of("cpu"))
    families = ("llama", "gemma2", "qwen3_moe")
    twice = [f"generate:{family}" for family in families for _ in range(2)]
    *answers, changed, warmed = ranks.run(*twice, "change_the_last_rank:llama", "prefill:llama")
    for family, first, again in zip(families, answers[::2], answers[1::2], strict=True):
        assert cached(again, COLD) == [length - 1] * 2
        ranks.assert_answers(family, first)
        ranks.assert_answers(family, again)

    assert [bool(one["is_changed_here"]) for one in changed] == [False, True]
    assert [one["is_noticed"].tolist() for one in changed] == [[False, True], [True, True]]
    assert [one["computed"].tolist() for one in warmed] == [[length, 0]] * 2
    digests = [[str(one["weights"]) for one in seen] for seen in (answers[0], warmed)]
    assert digests[0][0] == digests[0][1] != digests[1][0] == digests[1][1]


@pytest.mark.slow
def test_fused_passes_of_a_split_model_are_its_own_and_find_what_plain_ones_stored(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "cpu")
    families = ("llama", "qwen3", "mistral")
    each = [f"{action}:{family}" for family in families for action in ("generate", "generate_fused", "generate")]
    answers = ranks.run(*each)
    for family, plain, fused, again in zip(families, answers[::3], answers[1::3], answers[2::3], strict=True):
        assert [one["cached"].sum() for one in plain] == [0, 0]
        assert cached(fused, COLD) == cached(again, COLD) == [len(prompt_of("cpu")) - 1] * 2
        assert [int(one["model_bytes"]) for one in fused] == [int(one["model_bytes"]) for one in plain]
        for seen in (plain, fused, again):
            ranks.assert_answers(family, seen)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (4, "llama of 4 heads")])
def test_an_engine_of_ranks_serves_what_comes_to_the_first_one(tmp_path: Path, size: int, family: str) -> None:
    ranks = Ranks(tmp_path, "cpu")
    ranks.size = size
    (seen,) = ranks.run(f"serve:{family}")
    counts = [one["counts"].tolist() for one in seen]
    assert counts == counts[:1] * size, "every rank computes the same steps, and ends the same requests"
    assert seen[0]["reasons"].tolist() == ["cancelled", "deadline"]
    assert counts[0][4] > 0, "some were preempted"


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
def test_more_ranks_fuse_and_restart_together(tmp_path: Path, size: int) -> None:
    ranks = Ranks(tmp_path, "cpu")
    ranks.size = size
    family = f"llama of {size} heads"
    first, again = ranks.run(f"generate_fused:{family}", f"generate_fused:{family}")
    assert cached(again, COLD) == [len(prompt_of("cpu")) - 1] * size
    for seen in (first, again):
        ranks.assert_answers(family, seen)


@pytest.mark.slow
def test_what_a_split_model_stored_serves_the_same_model_loaded_in_slices(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # Transformers loads slices with it
    ranks = Ranks(tmp_path, "cpu")
    families = ("gemma2", "qwen3_moe")  # tied embeddings; experts, which a checkpoint has under other names
    each = [f"{action}:{family}" for family in families for action in ("generate", "load_in_slices", "generate")]
    answers = ranks.run(*each)
    for family, split, loaded, again in zip(families, answers[::3], answers[1::3], answers[2::3], strict=True):
        assert [int(one["model_bytes"]) for one in loaded] == [int(one["model_bytes"]) for one in split]
        assert cached(again, COLD) == [len(prompt_of("cpu")) - 1] * 2
        ranks.assert_answers(family, again)


def test_a_model_is_split_over_exactly_the_ranks_that_there_are() -> None:
    model = make_model("llama", block_size=16)
    two = TorchRanks(torch.distributed.HashStore(), rank=0, size=2)
    check_split(model, OneRank())
    with pytest.raises(ConfigError, match="split over 1 devices, but there are 2 ranks"):
        check_split(model, two)
    model._tp_size = 2
    check_split(model, two)
    with pytest.raises(ConfigError, match=r"split over 2 devices.*TorchRanks\.of_process_group"):
        check_split(model, OneRank())


def test_heads_that_cannot_be_split_are_refused() -> None:
    model = make_model("llama", block_size=16)
    model._tp_size = 4
    with pytest.raises(UnsupportedModelError, match="2 heads of K and V, which cannot be split over 4 ranks"):
        check_split(model, TorchRanks(torch.distributed.HashStore(), rank=0, size=4))


def test_splitting_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="no process group"):
        split_model(make_model("llama", block_size=16))


def test_a_model_that_transformers_cannot_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot split a loaded Linear"):
        split_model(torch.nn.Linear(1, 1))  # without the methods, as models of old versions are


@pytest.mark.parametrize(("tp_size", "mesh_size"), [(1, 2), (2, 4)])
def test_weights_that_are_split_in_another_way_too_are_refused(tp_size: int, mesh_size: int) -> None:
    model = make_model("llama", block_size=16)
    model._tp_size = tp_size
    model.lm_head.weight.placements = ()  # as weights have that FSDP holds
    model.lm_head.weight.device_mesh = SimpleNamespace(size=lambda: mesh_size)
    ranks = OneRank() if tp_size == 1 else TorchRanks(torch.distributed.HashStore(), rank=0, size=tp_size)
    with pytest.raises(UnsupportedModelError, match="not by tensor parallelism alone"):
        check_split(model, ranks)


def test_a_model_that_is_split_by_layers_is_refused() -> None:
    model = make_model("llama", block_size=16)
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(UnsupportedModelError, match="split by layers"):
        check_split(model, OneRank())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "family", "action"), [(2, "llama", "fail"), (4, "llama of 4 heads", "fail_serving")])
def test_a_rank_that_fails_in_a_step_and_lives_on_ends_the_others_in_bounded_time(
    tmp_path: Path, size: int, family: str, action: str
) -> None:
    ranks = Ranks(tmp_path, "cpu")
    ranks.size = size
    *others, failed = processes = ranks.start(f"{action}:{family}")
    try:
        assert failed.stdout is not None and failed.stdout.readline() == "failed: ValueError this rank broke\n"
        started = time.monotonic()
        said = ["".join(each.communicate(timeout=TIMEOUT_S)) for each in others]
        assert time.monotonic() - started < 60, "gloo's own limit is reached before"
        assert failed.poll() is None, "it lives"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert 70 in [each.returncode for each in others], "no rank ended itself"
    for each, text in zip(
        others, said, strict=True
    ):  # once a process has ended, gloo lets go of those that wait for it
        assert each.returncode in (1, 70), text
        assert f"rank {size - 1}: ValueError: this rank broke" in text
    if action == "fail_serving":
        assert "the reader was told: another rank has failed" in said[0]
