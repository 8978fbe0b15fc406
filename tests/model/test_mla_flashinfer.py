"""FlashInfer's MLA is called as its sources read, in place; torch computes what it cannot."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from places import Place
from tiny_models import VOCABULARY
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.mla import attention as mla_attention
from tierkv.engine.mla import flashinfer as mla_flashinfer
from tierkv.engine.mla.flashinfer import MAX_SPAN, FlashInferMla, why_no_flashinfer
from tierkv.engine.mla.layers import mla_layers
from tierkv.engine.mla.model import LatentAttention, choose_mla
from tierkv.engine.model_support import probe_layout
from tierkv.ranks.group import OneRank
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout


class _Wrapper:
    """BatchMLAPagedAttentionWrapper, as flashinfer/mla.py and mla.cuh of 0.6.4 read.

    It multiplies page numbers with strides modulo `addressed` numbers: a test makes them fewer, to need no large pool.
    """

    addressed = 1 << 32
    made: ClassVar[list[_Wrapper]] = []

    def __init__(self, workspace: Tensor, *, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 128 << 20 and backend == "auto"
        self.planned: tuple[Any, ...] | None = None
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        assert q_data_type == kv_data_type == torch.float32, (
            "a GPU takes 16 bits; the stand-in what the test's pool has"
        )
        for each in (qo_indptr, kv_indptr, kv_indices, kv_len_arr):
            assert each.dtype == torch.int32 and each.dim() == 1 and each.is_contiguous()
        for each in (qo_indptr, kv_indptr, kv_len_arr):
            assert each.device.type == "cpu", "a device tensor is copied back: a wait"
        count = len(kv_len_arr)
        assert len(qo_indptr) == len(kv_indptr) == count + 1 and qo_indptr[0] == kv_indptr[0] == 0
        assert len(kv_indices) == kv_indptr[-1]
        assert torch.equal(kv_indptr.diff(), (kv_len_arr + page_size - 1) // page_size)
        assert causal or int(qo_indptr.diff().max()) == 1
        works = int((-(-qo_indptr.diff() * num_heads // 64)).sum())
        assert works <= 16384 - 1024, "FlashInfer would write beyond its buffer"
        self.planned = (qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, page_size, sm_scale)

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
        assert self.planned is not None
        starts, page_starts, indices, lengths, heads, size, scale = self.planned
        assert q_nope.shape == (int(starts[-1]), heads, 512) and q_pe.shape == (int(starts[-1]), heads, 64)
        assert ckv_cache.shape[1:] == (size, 512) and kpe_cache.shape[1:] == (size, 64)
        for each in (q_nope, q_pe, ckv_cache, kpe_cache):
            assert each.stride(-1) == 1, "the kernels read rows of 16 bytes"
            assert all(stride % 8 == 0 for stride in each.stride()[:-1]) and each.data_ptr() % 16 == 0
        out = torch.empty_like(q_nope)
        for row, length in enumerate(lengths.tolist()):
            pages = indices[int(page_starts[row]) : int(page_starts[row + 1])].long()
            latents = torch.cat((self._read(ckv_cache, pages), self._read(kpe_cache, pages)), dim=-1)[:length]
            first, last = int(starts[row]), int(starts[row + 1])
            for at in range(first, last):
                seen = latents[: length - (last - 1 - at)]
                scores = torch.cat((q_nope[at], q_pe[at]), dim=-1) @ seen.T * scale
                out[at] = scores.softmax(-1) @ seen[:, :512]
        return out

    def _read(self, cache: Tensor, pages: Tensor) -> Tensor:
        offsets = pages * cache.stride(0) % self.addressed
        parts = [
            cache.as_strided(cache.shape[1:], cache.stride()[1:], cache.storage_offset() + int(offset))
            for offset in offsets
        ]
        return torch.cat(parts)


LIBRARY = SimpleNamespace(BatchMLAPagedAttentionWrapper=_Wrapper)


@pytest.fixture
def wide_model() -> Any:
    """A DeepSeek model with the dims that FlashInfer's kernels are written for."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        first_k_dense_replace=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
    )
    return DeepseekV2ForCausalLM(config).eval()


def with_flashinfer(model: Any, *, library: Any = LIBRARY) -> LatentAttention:
    latent = LatentAttention(model)
    layer = mla_layers(model)[0]
    _Wrapper.made = []
    latent.attention.kernel = FlashInferMla(
        library, device=torch.device("cpu"), dtype=model.dtype, heads=layer.heads, scale=layer.scale
    )
    return latent


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_logits(model: Any, latent: LatentAttention) -> None:
    """Prefill two prompts, decode beside a third one that prefills, decode all: each pass's logits are the model's."""
    layout = probe_layout(model, block_size=16, latent=latent)
    pool = HotPool(layout, 24, torch.device("cpu"))
    prompts = [tokens(n, seed=n) for n in (37, 16, 50)]
    tables = [list(range(23, 15, -1)), list(range(8, 16)), list(range(8))]
    held = [0, 0, 0]
    for news in ([37, 16, 0], [1, 1, 20], [1, 1, 30], [1, 1, 1]):
        rows = [row for row, new in enumerate(news) if new]
        for row in rows:
            prompts[row] += tokens(max(0, held[row] + news[row] - len(prompts[row])), seed=100 + held[row])
        steps = [SequenceStep(block_table=tables[row], num_past=held[row], num_new=news[row]) for row in rows]
        ids = [each for row in rows for each in prompts[row][held[row] : held[row] + news[row]]]
        batch = build_batch(pool, steps, block_size=16, device=torch.device("cpu"))
        with torch.inference_mode(), use_tierkv_attention(model), latent:
            logits = forward(model, torch.tensor(ids), batch)
        for row, got in zip(rows, logits.split([news[row] for row in rows]), strict=True):
            fed = prompts[row][: held[row] + news[row]]
            Place("cpu", torch.float32, 16).assert_logits(got, model, fed, first=held[row])
            held[row] += news[row]


def test_flashinfer_is_called_as_its_sources_want_and_reads_the_pool_in_place(wide_model: Any) -> None:
    latent = with_flashinfer(wide_model)
    with latent.attention.only("absorbed"):
        check_logits(wide_model, latent)
    kernel = latent.attention.kernel
    assert isinstance(kernel, FlashInferMla) and kernel.copied_passes == 0
    assert len(_Wrapper.made) == 1, "one wrapper and its buffers serve every pass"


def test_prompts_that_are_expanded_do_not_disturb_those_that_flashinfer_attends(
    wide_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_attention, "is_expanding_cheaper", lambda layer, num_new, length: num_new == 20)
    latent = with_flashinfer(wide_model)
    check_logits(wide_model, latent)
    assert latent.attention.expanded == 1 and latent.attention.absorbed > 4


def test_a_pass_with_more_work_than_a_plan_holds_is_planned_in_groups(
    wide_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_flashinfer, "_MAX_TILES", 2)
    latent = with_flashinfer(wide_model)
    with latent.attention.only("absorbed"):
        check_logits(wide_model, latent)
    assert len(_Wrapper.made) > 1


def test_a_pool_beyond_32_bits_is_copied_page_by_page(wide_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels would read other blocks there: seen by leaving the copy out."""
    addressed = 8 * 2 * 16 * 576  # the first eight blocks
    monkeypatch.setattr(_Wrapper, "addressed", addressed)
    latent = with_flashinfer(wide_model)
    with latent.attention.only("absorbed"), pytest.raises(AssertionError):
        check_logits(wide_model, latent)
    monkeypatch.setattr(_Wrapper, "addressed", addressed)
    monkeypatch.setattr(mla_flashinfer, "MAX_SPAN", addressed)
    latent = with_flashinfer(wide_model)
    with latent.attention.only("absorbed"):
        monkeypatch.setattr(_Wrapper, "addressed", 1 << 32)  # the copy is small
        check_logits(wide_model, latent)
    kernel = latent.attention.kernel
    assert isinstance(kernel, FlashInferMla) and kernel.copied_passes == 4


def test_what_flashinfer_cannot_compute_is_left_to_torch(wide_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = mla_layers(wide_model)
    assert why_no_flashinfer(wide_model, layers) == "it needs CUDA"
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_no_flashinfer(on_gpu, layers) == "flashinfer is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    reason = why_no_flashinfer(on_gpu, layers)
    assert reason is not None and reason.startswith("it cannot be imported: ")
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", ModuleType("flashinfer.mla"))
    assert why_no_flashinfer(on_gpu, layers) is None
    on_gpu.dtype = torch.float32
    assert why_no_flashinfer(on_gpu, layers) == "it does not compute in torch.float32"
    on_gpu.dtype = torch.bfloat16
    layers[1].heads = 8
    assert why_no_flashinfer(on_gpu, layers) == "the layers' scales or heads differ"
    layers[1].rank = 256
    assert why_no_flashinfer(on_gpu, layers) == "it wants latents of 512 and 64 numbers"


class _Broken(_Wrapper):
    def plan(self, *args: Any) -> None:
        raise RuntimeError("nvcc is not installed")


class _Wrong(_Wrapper):
    def run(self, *args: Tensor) -> Tensor:
        return super().run(*args) * 1.2


@pytest.mark.parametrize("wrapper", [_Broken, _Wrong])
def test_a_flashinfer_that_fails_at_opening_is_replaced_by_torch_and_counted(
    wrapper: type, wide_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = SimpleNamespace(BatchMLAPagedAttentionWrapper=wrapper)
    layer = mla_layers(wide_model)[0]

    def kernel(model: Any, layers: Any) -> FlashInferMla:
        return FlashInferMla(library, device=torch.device("cpu"), dtype=model.dtype, heads=4, scale=layer.scale)

    monkeypatch.setattr("tierkv.engine.mla.model.why_no_flashinfer", lambda model, layers: None)
    monkeypatch.setattr("tierkv.engine.mla.model.flashinfer_kernel", kernel)
    choice = choose_mla(wide_model, "latent", block_size=16, ranks=OneRank())
    assert choice.latent is not None and choice.latent.kernel == "torch"
    assert choice.fallbacks == {"flashinfer": 1} and "by flashinfer is off" in caplog.text
    monkeypatch.setattr(library, "BatchMLAPagedAttentionWrapper", _Wrapper)
    right = choose_mla(wide_model, "auto", block_size=16, ranks=OneRank())
    assert right.latent is not None and right.latent.kernel == "flashinfer" and right.fallbacks == {}


def test_the_page_numbers_of_a_plan_are_those_of_the_block_tables() -> None:
    found: list[Tensor] = []

    class Noting(_Wrapper):
        def plan(self, qo: Tensor, kv: Tensor, indices: Tensor, *rest: Any) -> None:
            found.append(indices)

    library = SimpleNamespace(BatchMLAPagedAttentionWrapper=Noting)
    kernel = FlashInferMla(library, device=torch.device("cpu"), dtype=torch.float32, heads=4, scale=1.0)
    steps = [
        SequenceStep(block_table=[9, 4, 7], num_past=33, num_new=1),
        SequenceStep(block_table=[2, 6], num_past=0, num_new=16),
    ]
    layout = BlockLayout(block_size=16, dtype="float32", layers=(LayerLayout.of_latent(576),))
    pool = HotPool(layout, 10, torch.device("cpu"))
    batch = build_batch(pool, steps, block_size=16, device=torch.device("cpu"))
    kernel.plan(batch, [0, 1], 1)
    kernel.plan(batch, [1], 1)
    assert [each.tolist() for each in found] == [[9, 4, 7, 2], [2]]
    assert np.all([each.dtype == torch.int32 for each in found])
    kernel.plan(batch, [0, 1], MAX_SPAN + 1)
    assert found[2].tolist() == [0, 1, 2, 3] and kernel._copied is not None and kernel._copied.tolist() == [9, 4, 7, 2]
    kernel.plan(batch, [0, 1], MAX_SPAN)
    assert found[3].tolist() == [9, 4, 7, 2] and kernel._copied is None, "a smaller pool is read in place again"
