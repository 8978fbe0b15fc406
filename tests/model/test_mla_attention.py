"""Attention over latents against its definition, in both ways, and through FlashInfer's call as its sources read it."""

from __future__ import annotations

import math
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

from tierkv.engine import mla_attention, mla_flashinfer
from tierkv.engine.attention import SequenceStep, build_batch, forward, use_tierkv_attention
from tierkv.engine.mla_attention import MlaAttention, is_expanding_cheaper
from tierkv.engine.mla_flashinfer import MAX_SPAN, FlashInferMla, why_no_flashinfer
from tierkv.engine.mla_layers import MlaInput, mla_layers
from tierkv.engine.mla_model import LatentAttention, choose_mla
from tierkv.engine.model_support import probe_layout
from tierkv.errors import ShapeError
from tierkv.ranks.group import OneRank
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout, LayerLayout

HEADS, RANK, NOPE, ROPE, V = 3, 40, 24, 16, 32
SIZE = 8


def a_layer(**dims: int) -> Any:
    """A layer of random float64 weights; only its projections of the latent are used."""
    found = {"index": 1, "heads": HEADS, "rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "v_dim": V} | dims
    layer = SimpleNamespace(**found, latent_dim=found["rank"] + found["rope_dim"], scale=0.3)
    generator = torch.Generator().manual_seed(1)
    shape = (found["heads"], found["nope_dim"] + found["v_dim"], found["rank"])
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    layer.key_weight, layer.value_weight = weight[:, : layer.nope_dim], weight[:, layer.nope_dim :]
    return layer


def defined(layer: Any, query: Tensor, query_rope: Tensor, latents: Tensor) -> Tensor:
    """Causal attention of the last tokens over expanded K and V, head by head and query by query."""
    out = query.new_empty(query.shape[0], layer.heads, layer.v_dim)
    past = latents.shape[0] - query.shape[0]
    for head in range(layer.heads):
        keys = torch.cat((latents[:, : layer.rank] @ layer.key_weight[head].T, latents[:, layer.rank :]), dim=-1)
        values = latents[:, : layer.rank] @ layer.value_weight[head].T
        for at in range(query.shape[0]):
            whole = torch.cat((query[at, head], query_rope[at, head]))
            weights = torch.softmax(keys[: past + at + 1] @ whole * layer.scale, dim=0)
            out[at, head] = weights @ values[: past + at + 1]
    return out


LENGTHS = [(0, 5), (3, 1), (8, 8), (21, 1), (15, 9), (0, 1), (30, 20)]  # of past and new tokens


@pytest.fixture
def step() -> dict[str, Any]:
    """A packed pass of several sequences over a pool that has their past, and what it should give."""
    layer = a_layer()
    layout = BlockLayout(block_size=SIZE, dtype="float64", layers=(LayerLayout.of_latent(RANK + ROPE),) * 2)
    pool = HotPool(layout, 40, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    free = torch.randperm(40, generator=generator).tolist()
    pool.blocks.fill_(math.nan)  # what no token has written must not be read
    steps, news, wanted = [], [], []
    for past, new in LENGTHS:
        table = [free.pop() for _ in range(-(-(past + new) // SIZE))]
        latents = torch.randn(past + new, layer.latent_dim, dtype=torch.float64, generator=generator)
        for at in range(past):
            pool.key_cache(1)[table[at // SIZE], at % SIZE, 0] = latents[at]
        query = torch.randn(new, HEADS, NOPE, dtype=torch.float64, generator=generator)
        rope = torch.randn(new, HEADS, ROPE, dtype=torch.float64, generator=generator)
        steps.append(SequenceStep(block_table=table, num_past=past, num_new=new))
        news.append((query, rope, latents[past:]))
        wanted.append(defined(layer, query, rope, latents))
    query, rope, latent = (torch.cat(each) for each in zip(*news, strict=True))
    batch = build_batch(pool, steps, block_size=SIZE, device=torch.device("cpu"))
    new = MlaInput(query=query, query_rope=rope, latent=latent)
    return {"layer": layer, "new": new, "pool": pool, "batch": batch, "wanted": torch.cat(wanted)}


@pytest.mark.parametrize("way", ["absorbed", "expanded", "the cheaper"])
def test_both_ways_are_the_definition(step: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MlaAttention()
    attention.always = None if way == "the cheaper" else way
    monkeypatch.setattr(mla_attention, "is_expanding_cheaper", lambda layer, num_new, length: num_new > 5)
    got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
    torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)
    counts = {"absorbed": (7, 0), "expanded": (0, 7), "the cheaper": (4, 3)}
    assert (attention.absorbed, attention.expanded) == counts[way]


def test_heads_are_expanded_a_few_at_a_time(step: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_attention, "_EXPANDED_BYTES", 1)
    attention = MlaAttention()
    with attention.only("expanded"):
        got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
    torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)


def test_the_path_of_a_gpu_without_a_library_is_the_definition(
    step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_attention, "_attend_latents", mla_attention._attend_wide)
    monkeypatch.setattr(mla_attention, "_attend_cpu", mla_attention._attend_gpu)
    for score_bytes in (1 << 20, 1):
        monkeypatch.setattr(mla_attention, "_SCORE_BYTES", score_bytes)
        for way in ("absorbed", "expanded"):
            attention = MlaAttention()
            attention.always = way
            got = attention.attend(step["layer"], step["new"], step["pool"], step["batch"])
            torch.testing.assert_close(got, step["wanted"], rtol=1e-9, atol=1e-9)


def test_values_wider_than_keys_are_attended_too() -> None:
    layer = a_layer(nope_dim=4, v_dim=64)
    generator = torch.Generator().manual_seed(4)
    query, rope, latents = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((5, HEADS, 4), (5, HEADS, ROPE), (11, RANK + ROPE))
    )
    out = torch.empty(5, HEADS, 64, dtype=torch.float64)
    new = MlaInput(query=query, query_rope=rope, latent=latents[6:])
    mla_attention._attend_expanded(layer, new, slice(5), latents, out)
    torch.testing.assert_close(out, defined(layer, query, rope, latents), rtol=1e-9, atol=1e-9)


def test_a_cache_of_another_layout_is_refused(step: dict[str, Any]) -> None:
    step["layer"].latent_dim += 1
    with pytest.raises(ShapeError):
        MlaAttention().attend(step["layer"], step["new"], step["pool"], step["batch"])


@pytest.mark.parametrize(
    ("num_new", "length", "is_expanded"),
    [
        (1, 8192, False),
        (32, 8192, False),
        (128, 32768, False),
        (256, 32768, True),
        (8192, 8192, True),
        (31, 31, False),
        (32, 32, True),
    ],
)
def test_the_arithmetic_decides_with_deepseeks_dims(num_new: int, length: int, is_expanded: bool) -> None:
    layer = SimpleNamespace(rank=512, rope_dim=64, nope_dim=128, v_dim=128)
    assert is_expanding_cheaper(layer, num_new, length) == is_expanded  # type: ignore[arg-type]


# --- FlashInfer's call: a stand-in that reads pages as the kernels of 0.6.4 do ----------------------------------------


class _Wrapper:
    """BatchMLAPagedAttentionWrapper, as flashinfer/mla.py and mla.cuh of 0.6.4 read.

    Page numbers are multiplied with strides in `bits` of 32 bits, which tests make fewer to need no large pool.
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


class _LateLoad:
    """A load whose bytes of a layer arrive when that layer waits for them."""

    def __init__(self, source: HotPool, target: HotPool) -> None:
        self.waited: list[int] = []
        self._source, self._target = source, target

    def wait_layer(self, layer: int) -> None:
        self.waited.append(layer)
        self._target.key_cache(layer)[:] = self._source.key_cache(layer)


def test_each_layer_waits_for_its_cached_latents(wide_model: Any) -> None:
    latent = LatentAttention(wide_model)
    layout = probe_layout(wide_model, block_size=16, latent=latent)
    prompt = tokens(40, seed=1)
    computed, loaded = (HotPool(layout, 3, torch.device("cpu")) for _ in range(2))
    loaded.blocks.fill_(math.nan)
    load = _LateLoad(computed, loaded)
    with torch.inference_mode(), use_tierkv_attention(wide_model), latent:
        for pool, past, new in ((computed, 0, 32), (loaded, 32, 8)):
            step = SequenceStep(
                block_table=[2, 0, 1], num_past=past, num_new=new, loads=load if pool is loaded else None
            )
            batch = build_batch(pool, [step], block_size=16, device=torch.device("cpu"))
            logits = forward(wide_model, torch.tensor(prompt[past : past + new]), batch)
    Place("cpu", torch.float32, 16).assert_logits(logits, wide_model, prompt, first=32)
    assert load.waited == [0, 1]


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

    monkeypatch.setattr("tierkv.engine.mla_model.why_no_flashinfer", lambda model, layers: None)
    monkeypatch.setattr("tierkv.engine.mla_model.flashinfer_kernel", kernel)
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
