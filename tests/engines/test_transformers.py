"""`generate` with a persistent cache gives what plain `generate` gives, first, again, after a restart, and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from cold_blocks import damage_record
from generate_hunt import hunt
from generate_models import EOS, FAMILIES, VOCABULARY, make_generator
from small_caches import SIZE, one_thread, opened
from torch import Tensor

from tierkv.block_store.load_or_compute import Origin
from tierkv.integrations.transformers.rows import Uncached, check_request
from tierkv.storage.cold import ColdStore

__all__ = ["one_thread"]


def prompt(length: int, *, seed: int = 0) -> Tensor:
    """Return random tokens, [1, length], none of them the padding."""
    return torch.randint(6, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(*rows: Tensor) -> dict[str, Tensor]:
    """Return a batch of prompts with padding on the left."""
    length = max(row.shape[1] for row in rows)
    zeros = [torch.zeros(1, length - row.shape[1], dtype=torch.int64) for row in rows]
    ids = torch.cat([torch.cat([zero, row], dim=1) for zero, row in zip(zeros, rows, strict=True)])
    mask = torch.cat([torch.cat([zero, torch.ones_like(row)], dim=1) for zero, row in zip(zeros, rows, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


def plain(model: Any, seed: int = 0, **arguments: Any) -> Any:
    """Return what the model's own `generate` returns."""
    torch.manual_seed(seed)
    return type(model).generate(model, **with_mask(arguments))


def cached(model: Any, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**with_mask(arguments))


def with_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with a mask: without one Transformers takes every token 0, generated or not, as padding."""
    ids = arguments.get("input_ids")
    mask = {} if ids is None else {"attention_mask": torch.ones_like(ids)}
    return {"max_new_tokens": 12, **mask, **arguments}


@pytest.fixture
def model() -> Any:
    return make_generator("llama")


LONG, SHORT = prompt(60), torch.cat([prompt(60)[:, :33], prompt(4, seed=1)], dim=1)
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"input_ids": LONG, "do_sample": False},
    "sampled": {"input_ids": LONG, "do_sample": True, "temperature": 1.5},
    "beams": {"input_ids": LONG, "do_sample": False, "num_beams": 3},
    "sampled beams": {"input_ids": LONG, "do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "several sequences": {"input_ids": LONG, "do_sample": True, "num_return_sequences": 3},
    "padding": {**padded(LONG, SHORT, prompt(41, seed=2)), "do_sample": False},
    "padding and beams": {**padded(LONG, SHORT), "do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "an end": {**padded(LONG, SHORT), "do_sample": True, "eos_token_id": [EOS, *range(20, 40)], "pad_token_id": 0},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generate_is_plain_generate_first_again_restarted_and_damaged(family: str, tmp_path: Path) -> None:
    model = make_generator(family)
    want = {name: plain(model, max_new_tokens=12, **request) for name, request in REQUESTS.items()}
    for life in ("first", "restarted", "damaged"):
        with opened(model, tmp_path / "store") as cache:
            for turn in ("first", "again"):
                before = cache.stats()
                for name, request in REQUESTS.items():
                    got = cached(model, max_new_tokens=12, **request)
                    assert torch.equal(got, want[name]), f"{family}: {name}, {life}, {turn}"
                now = cache.stats()
                hits = now.num_hit_calls - before.num_hit_calls
                assert hits >= len(REQUESTS) - 2 if life == "first" and turn == "first" else hits == len(REQUESTS)
            assert not now.uncached
            keys = cache.store.keys(LONG[0].tolist())
        if life == "restarted":
            with ColdStore(tmp_path / "store") as cold:
                damage_record(cold, keys[4].block_hash, offset=300)
        if life == "damaged":
            assert now.num_loaded_tokens
    with opened(model, tmp_path / "store") as cache:
        assert cache.store.contains(keys) == len(keys)  # the damaged block was saved anew


def test_a_prefill_in_parts_goes_on_after_the_prefix(model: Any, tmp_path: Path) -> None:
    options = {**padded(LONG, SHORT), "prefill_chunk_size": 7}
    with opened(model, tmp_path / "store") as cache:
        for _ in range(2):
            assert torch.equal(cached(model, **options), plain(model, **options))
        # Older versions of Transformers prefill all parts, the cached ones too: then the call is plain.
        assert cache.stats().num_hit_calls == 1 or cache.stats().uncached == {"a prefill that tierkv does not know": 1}


def test_a_damaged_block_costs_its_tokens_and_no_answer(model: Any, tmp_path: Path) -> None:
    want = plain(model, input_ids=LONG, max_new_tokens=8)
    with opened(model, tmp_path / "store") as cache:
        cached(model, input_ids=LONG, max_new_tokens=8)
        keys = cache.store.keys(LONG[0].tolist())
    with ColdStore(tmp_path / "store") as cold:
        damage_record(cold, keys[4].block_hash, offset=300)
    with opened(model, tmp_path / "store") as cache:
        assert torch.equal(cached(model, input_ids=LONG, max_new_tokens=8), want)
        assert cache.stats().num_loaded_tokens == 4 * SIZE
        assert torch.equal(cached(model, input_ids=LONG, max_new_tokens=8), want)
        assert cache.stats().num_loaded_tokens == 4 * SIZE + 56


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_was_generated_is_kept(family: str, tmp_path: Path) -> None:
    model = make_generator(family)
    with opened(model, tmp_path / "store") as cache:
        first = cached(model, input_ids=LONG, max_new_tokens=40)
        second = torch.cat([first, prompt(5, seed=9)], dim=1)
        want = plain(model, input_ids=second, max_new_tokens=10)
        before = cache.stats().num_loaded_tokens
        assert torch.equal(cached(model, input_ids=second, max_new_tokens=10), want)
        assert cache.stats().num_loaded_tokens - before == 96  # of 100 tokens the last has no K and V
        assert cache.stats().num_saved_blocks == 99 // SIZE + (114 // SIZE - 96 // SIZE)


def test_of_beams_the_returned_sequences_are_kept(model: Any, tmp_path: Path) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 24, "do_sample": False}
    with opened(model, tmp_path / "store") as cache:
        found = cached(model, input_ids=LONG, **options)
        for sequence in found:
            keys = cache.store.keys(sequence[:-1].tolist())
            assert cache.store.contains(keys) >= len(keys) - 1
            follow = torch.cat([sequence[None], prompt(3)], dim=1)
            assert torch.equal(cached(model, input_ids=follow), plain(model, input_ids=follow))


def test_at_least_one_token_is_computed(model: Any, tmp_path: Path) -> None:
    exact = prompt(4 * SIZE)
    with opened(model, tmp_path / "store") as cache:
        for _ in range(2):
            got = cached(model, input_ids=exact, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        stats = cache.stats()
        assert (stats.num_loaded_tokens, stats.num_computed_tokens) == (4 * SIZE - 1, 4 * SIZE + 1)
    want = plain(model, input_ids=exact, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert torch.allclose(got.logits[0], want.logits[0], atol=1e-4)


def test_rows_that_share_a_prefix_read_it_once(model: Any, tmp_path: Path) -> None:
    batch = padded(LONG, SHORT, LONG)
    with opened(model, tmp_path / "store") as cache:
        cached(model, **batch, max_new_tokens=2)
    with opened(model, tmp_path / "store") as cache:
        assert torch.equal(cached(model, **batch, max_new_tokens=2), plain(model, **batch, max_new_tokens=2))
        stats = cache.store.stats()
        assert cache.stats().num_loaded_tokens == 55 + 32  # slots up to 55: the short row has 23 slots of padding
        assert stats.hits == 7


def test_a_prefix_is_computed_where_that_was_faster(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "store", compute_or_load=True) as cache:
        want = cached(model, input_ids=LONG, max_new_tokens=4)
        choice = cache._cached.blocks.choice
        for tokens in (8, 16, 32, 64):
            choice.record_compute(tokens, 1e-6 * tokens)
            choice.record_load(tokens // SIZE, origin=Origin.WARM, seconds=10.0)
        assert torch.equal(cached(model, input_ids=LONG, max_new_tokens=4), want)
        stats = cache.stats()
        assert (stats.num_computed_by_choice, stats.num_hit_calls) == (1, 0)


def test_outputs_of_all_kinds_are_those_of_plain_generate(model: Any, tmp_path: Path) -> None:
    options = {
        **padded(LONG, SHORT),
        "max_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    want = plain(model, **options)
    with opened(model, tmp_path / "store") as cache:
        for _ in range(2):
            got = cached(model, **options)
        assert cache.stats().num_hit_calls == 1
    assert type(got) is type(want) and got.keys() == want.keys()
    for name in ("scores", "logits"):
        for one, other in zip(getattr(got, name), getattr(want, name), strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    kept = next(got[name] for name in ("cache", "past_key_values") if name in got)
    assert "update" not in vars(kept.layers[0]) and "reorder_cache" not in vars(kept)
    assert kept.get_seq_length() == 64
    following = torch.cat([got.sequences, prompt(3).expand(2, -1)], dim=1)
    mask = torch.cat([options["attention_mask"], torch.ones(2, 8, dtype=torch.int64)], dim=1)
    name = "cache" if "cache" in got else "past_key_values"
    continued = cached(model, input_ids=following, attention_mask=mask, max_new_tokens=4, **{name: kept})
    assert torch.equal(continued, plain(model, input_ids=following, attention_mask=mask, max_new_tokens=4))


# --- What is not cached --------------------------------------------------------------------------------


def _own_cache(model: Any) -> dict[str, Any]:
    from transformers import DynamicCache

    return {"input_ids": LONG, "past_key_values": DynamicCache(config=model.config)}


PLAIN_CALLS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "inputs_embeds": (lambda m: {"inputs_embeds": m.get_input_embeddings()(LONG)}, "the argument inputs_embeds"),
    "positions": (
        lambda m: {"input_ids": LONG, "position_ids": torch.arange(60)[None] + 3},
        "positions that do not count from 0",
    ),
    "padding on the right": (
        lambda m: {"input_ids": LONG, "attention_mask": (torch.arange(60)[None] < 50).long()},
        "an attention mask with gaps, or padding on the right",
    ),
    "gaps": (
        lambda m: {"input_ids": LONG, "attention_mask": (torch.arange(60)[None] != 9).long()},
        "an attention mask with gaps, or padding on the right",
    ),
    "static cache": (
        lambda m: {"input_ids": LONG, "cache_implementation": "static"},
        "a cache of type StaticCache",
    ),
    "no cache": (lambda m: {"input_ids": LONG, "use_cache": False}, "generate without a cache"),
    "hidden states": (
        lambda m: {"input_ids": LONG, "output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states: it shows every token of the prompt",
    ),
    "own cache": (_own_cache, "the caller's own cache"),
    "prompt lookup": (lambda m: {"input_ids": LONG, "prompt_lookup_num_tokens": 3}, "no prefill that tierkv knows"),
    "assistant": (
        lambda m: {"input_ids": LONG, "assistant_model": make_generator("llama")},
        "the argument assistant_model",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(PLAIN_CALLS))
def test_what_is_not_supported_is_plain_generate_and_counted(name: str, model: Any, tmp_path: Path) -> None:
    arguments, reason = PLAIN_CALLS[name]
    want = plain(model, **arguments(model), max_new_tokens=6, do_sample=False)
    with opened(model, tmp_path / "store") as cache:
        cached(model, input_ids=LONG, max_new_tokens=6)  # so that there were something to load
        before = cache.stats()
        got = cached(model, **arguments(model), max_new_tokens=6, do_sample=False)
        after = cache.stats()
    if not isinstance(want, Tensor):
        assert all(
            torch.equal(a, b)
            for one, other in zip(got.hidden_states, want.hidden_states, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)
    assert after.uncached == {reason: 1}
    assert (after.num_loaded_tokens, after.num_saved_blocks) == (before.num_loaded_tokens, before.num_saved_blocks)


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "mm_token_type_ids", "input_features"])
def test_inputs_beside_tokens_are_not_cached(name: str, model: Any) -> None:
    from transformers import DynamicCache, GenerationConfig

    arguments = {"cache": DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    assert check_request(model, GenerationConfig(), arguments) == "cache"
    with pytest.raises(Uncached, match=f"the argument {name}"):
        check_request(model, GenerationConfig(), {**arguments, name: torch.zeros(1, 60)})


def test_a_custom_generate_is_plain(model: Any, tmp_path: Path) -> None:
    def generate(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return input_ids

    with opened(model, tmp_path / "store") as cache:
        assert torch.equal(model.generate(LONG, custom_generate=generate, max_new_tokens=4), LONG)
        assert cache.stats().uncached == {"the argument custom_generate": 1}


def test_an_error_of_generate_is_raised_and_nothing_is_kept(model: Any, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(_: Any, __: Any) -> Tensor:
        raise Stop

    with opened(model, tmp_path / "store") as cache:
        with pytest.raises(Stop):
            model.generate(LONG, logits_processor=[stop], max_new_tokens=4)
        assert cache.stats().num_saved_blocks == 0 and not cache.stats().uncached
        assert torch.equal(cached(model, input_ids=LONG), plain(model, input_ids=LONG))


def test_a_processor_that_writes_to_the_tokens_does_not_mislead_the_cache(model: Any, tmp_path: Path) -> None:
    def overwrite(input_ids: Tensor, scores: Tensor) -> Tensor:
        input_ids[:, -1] = 7  # after K and V of another token were computed
        return scores

    with opened(model, tmp_path / "store") as cache:
        model.generate(LONG, logits_processor=[overwrite], max_new_tokens=30)
        follow = torch.cat([LONG[:, :-1], torch.full((1, 28), 7)], dim=1)
        assert torch.equal(cached(model, input_ids=follow), plain(model, input_ids=follow))
        assert cache.stats().num_loaded_tokens <= 56


def test_threads_may_generate_with_one_model(model: Any, tmp_path: Path) -> None:
    prompts = [torch.cat([LONG, prompt(7, seed=seed)], dim=1) for seed in range(4)]
    want = [plain(model, input_ids=ids, max_new_tokens=10) for ids in prompts]
    wrong: list[int] = []

    def work(at: int) -> None:
        for _ in range(4):
            if not torch.equal(model.generate(prompts[at], max_new_tokens=10), want[at]):
                wrong.append(at)

    with opened(model, tmp_path / "store") as cache:
        threads = [Thread(target=work, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.stats().num_calls == 16 and cache.stats().num_hit_calls >= 12
    assert not wrong


def test_the_memory_alone_is_a_cache_too(model: Any) -> None:
    with opened(model, None) as cache:
        for _ in range(2):
            assert torch.equal(cached(model, input_ids=LONG), plain(model, input_ids=LONG))
        assert cache.stats().num_hit_calls == 1


def test_random_requests_get_the_answers_of_plain_generate(tmp_path: Path) -> None:
    counts = hunt(tmp_path, 200)
    assert counts["hit calls"] > 130 and counts["compared blocks"] > 200
