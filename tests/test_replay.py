"""The judge of the policies: traces, the best that is possible, and what the real index makes of them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_traces import HABITS, make_requests, write_trace

from benchmarks.policy_traffic import FAMILIES, HELD_OUT, make_trace
from tierkv.errors import ConfigError
from tierkv.policies import DEFAULT_POLICY, HitDensityPolicy, LearnedPolicy, LRUPolicy, make_policy, policy_names
from tierkv.policies.replay import replay_trace
from tierkv.policies.traces import Request, Trace, belady_hits, read_trace
from tierkv.policies.training import fit_model
from tierkv.values.prefill import MEASURED_PREFILL

pytestmark = pytest.mark.no_cover  # measuring it would take three times as long, and other tests cover the policies

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake_conversation.jsonl"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/traces")


def synthetic(tmp_path: Path, habit: str, seed: int = 0) -> Trace:
    return read_trace(write_trace(tmp_path / f"{habit}-{seed}.jsonl", make_requests(habit, seed)))


def hit_rate(trace: Trace, name: str, capacity: str) -> float:
    return replay_trace(trace, make_policy(name), trace.capacity(capacity), MEASURED_PREFILL).hit_rate


def plain_lru_hits(requests: Sequence[Request], capacity: int) -> int:
    """The reference: a dictionary in the order of last use, the last blocks of a prompt the oldest."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        hits += len(list(itertools.takewhile(cached.__contains__, request.blocks)))
        for block in reversed(request.blocks):
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return hits


def best_hits(requests: list[tuple[int, ...]], capacity: int) -> int:
    """Try everything: after each use of a block any of the cached ones, itself included, may go."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for block in itertools.chain.from_iterable(requests):
        after: dict[frozenset[int], int] = {}
        for state, hits in states.items():
            held = state | {block}
            kept = [held] if len(held) <= capacity else [held - {gone} for gone in held]
            for choice in [*kept, state]:
                after[choice] = max(after.get(choice, 0), hits + (block in state))
        states = after
    return max(states.values())


def trie_requests(prompts: list[list[int]]) -> list[Request]:
    numbers: dict[tuple[int, ...], int] = {}
    return [
        Request(
            float(at),
            512 * len(prompt),
            tuple(numbers.setdefault(tuple(prompt[: end + 1]), len(numbers)) for end in range(len(prompt))),
        )
        for at, prompt in enumerate(prompts)
    ]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(1, 3))
@settings(deadline=None)
def test_belady_is_the_best_of_all_choices(prompts: list[list[int]], capacity: int) -> None:
    requests = trie_requests(prompts)
    assert belady_hits(requests, capacity) == best_hits([request.blocks for request in requests], capacity)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=25),
    st.integers(1, 10),
    st.sampled_from(policy_names()),
)
@settings(deadline=None, max_examples=60)
def test_no_policy_beats_the_bound(prompts: list[list[int]], capacity: int, name: str) -> None:
    requests = trie_requests(prompts)
    unique = len({block for request in requests for block in request.blocks})
    trace = Trace("random", 512, tuple(requests), unique)
    outcome = replay_trace(trace, make_policy(name), capacity, MEASURED_PREFILL)
    assert outcome.hits <= belady_hits(requests, capacity)


@pytest.mark.parametrize("habit", HABITS)
def test_lru_through_the_index_is_lru(tmp_path: Path, habit: str) -> None:
    trace = synthetic(tmp_path, habit)
    capacity = trace.capacity("10%")
    outcome = replay_trace(trace, LRUPolicy(), capacity, MEASURED_PREFILL)
    assert outcome.hits == plain_lru_hits(trace.requests, capacity)


NOISE = {"uniform": 0.05, "zipf": 0.02}
"""How far the default may be behind if few requests draw documents by chance; 1 % for the other habits."""


@pytest.mark.parametrize("capacity", ["1%", "10%"])
@pytest.mark.parametrize("habit", HABITS)
def test_the_default_does_not_lose_to_another_policy_whatever_the_habit(
    tmp_path: Path, habit: str, capacity: str
) -> None:
    trace = synthetic(tmp_path, habit)
    best = max(hit_rate(trace, name, capacity) for name in ("lru", "adaptive-lru", "cost-aware"))
    assert hit_rate(trace, DEFAULT_POLICY, capacity) >= best * (1 - NOISE.get(habit, 0.01))


@pytest.mark.slow
@pytest.mark.parametrize("family", HELD_OUT)
def test_the_default_does_not_lose_to_another_policy_on_longer_traces(family: str) -> None:
    """At one capacity and another seed; `benchmarks.policies` prints all families and capacities."""
    trace = make_trace(family, seed=5)
    best = max(hit_rate(trace, name, "2%") for name in ("lru", "adaptive-lru", "cost-aware"))
    assert hit_rate(trace, DEFAULT_POLICY, "2%") >= 0.99 * best


@pytest.mark.parametrize("family", [*FAMILIES, *HELD_OUT])
def test_a_generated_trace_is_the_same_for_the_same_seed(family: str) -> None:
    trace = make_trace(family, seed=3)
    assert trace == make_trace(family, seed=3)
    parents: dict[int, int] = {}
    for request in trace.requests:
        for parent, block in zip((-1, *request.blocks), request.blocks, strict=False):
            assert parents.setdefault(block, parent) == parent, "a block has one parent"
    assert len(parents) == trace.num_unique == max(parents) + 1


def test_another_seed_makes_another_trace() -> None:
    assert make_trace("rag", seed=3) != make_trace("rag", seed=4)


def test_a_default_that_never_forgot_would_find_measurably_less_once_habits_change(tmp_path: Path) -> None:
    trace = synthetic(tmp_path, "turnabout")
    fading, never = (
        replay_trace(trace, HitDensityPolicy(half_life=half_life), 900, MEASURED_PREFILL).hits
        for half_life in (1 << 9, 1 << 40)
    )
    assert fading > 1.1 * never


def test_the_default_learns_within_a_trace_that_reads_documents_once(tmp_path: Path) -> None:
    trace = synthetic(tmp_path, "scans", seed=1)
    bound = belady_hits(trace.requests, trace.capacity("10%")) / trace.num_blocks
    lru, default = hit_rate(trace, "lru", "10%"), hit_rate(trace, "hit-density", "10%")
    assert default - lru > (bound - lru) / 4


def test_hits_save_the_prefill_of_their_prefix() -> None:
    requests = trie_requests([[1, 2], [1, 2, 3], [1, 9]])
    outcome = replay_trace(Trace("three", 512, tuple(requests), 4), LRUPolicy(), 4, MEASURED_PREFILL)
    assert outcome.hits == 3 and outcome.blocks == 7
    assert outcome.seconds_saved == MEASURED_PREFILL.seconds(0, 1024) + MEASURED_PREFILL.seconds(0, 512)


def test_a_block_behind_a_missing_one_is_no_hit() -> None:
    requests = [Request(0.0, 1024, (0, 1)), Request(1.0, 1024, (2, 3)), Request(2.0, 1024, (0, 1))]
    for capacity, hits in ((1, 0), (3, 1), (4, 2)):
        assert replay_trace(Trace("t", 512, tuple(requests), 4), LRUPolicy(), capacity, MEASURED_PREFILL).hits == hits


# --- Training --------------------------------------------------------------------------------------------


def test_training_twice_gives_the_same_model(tmp_path: Path) -> None:
    trace = synthetic(tmp_path, "agents")
    assert fit_model(trace, seed=3) == fit_model(trace, seed=3)


def test_the_seed_changes_what_measures_the_fit(tmp_path: Path) -> None:
    trace = synthetic(tmp_path, "scans")
    assert fit_model(trace, seed=3)[1]["log_loss"] != fit_model(trace, seed=4)[1]["log_loss"]


def test_a_trained_policy_beats_lru_on_a_trace_it_has_not_seen(tmp_path: Path) -> None:
    model, summary = fit_model(synthetic(tmp_path, "scans"), seed=0)
    assert summary["log_loss"] < summary["log_loss_constant"]
    trace = synthetic(tmp_path, "scans", seed=1)
    outcome = replay_trace(trace, LearnedPolicy(model), trace.capacity("5%"), MEASURED_PREFILL)
    assert outcome.hit_rate > hit_rate(trace, "lru", "5%")


def test_a_trace_without_reuse_teaches_nothing() -> None:
    requests = trie_requests([[number] for number in range(200)])
    with pytest.raises(ConfigError, match="too few to learn from"):
        fit_model(Trace("once", 512, tuple(requests), 200), seed=0)


# --- Trace files -----------------------------------------------------------------------------------------


def test_the_last_block_has_the_tokens_that_are_left(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1500, "input_length": 700, "hash_ids": [7, 8]}\n\n{"hash_ids": [7]}\n')
    trace = read_trace(path)
    assert trace.requests == (Request(0.0, 512, (0,)), Request(1.5, 700, (0, 1)))


def test_a_length_that_does_not_fit_the_blocks_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9000, "hash_ids": [1, 2]}\n')
    assert read_trace(path).requests[0].num_tokens == 1024


def test_the_same_number_after_other_blocks_is_another_block(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [3, 2]}\n')
    trace = read_trace(path)
    assert trace.num_unique == 4 and trace.requests[0].blocks[1] != trace.requests[1].blocks[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "line 2: not a request"),
        ("[1]", "line 2: not a request"),
        ('{"timestamp": 0}', "line 2: not a request"),
        ('{"hash_ids": "abc"}', "line 2: hash_ids must be"),
        ('{"hash_ids": [1.5]}', "line 2: hash_ids must be"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(ConfigError, match=reason):
        read_trace(path)


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": []}\n')
    with pytest.raises(ConfigError, match="no request with blocks"):
        read_trace(path)


def test_a_capacity_is_a_number_of_blocks_or_a_share_of_the_unique_ones() -> None:
    trace = Trace("t", 512, (), 1000)
    assert [trace.capacity(text) for text in ("40", "10%", "0.5 %", "100%")] == [40, 100, 5, 1000]


@pytest.mark.parametrize("text", ["0", "-3", "0%", "101%", "many", "5.5", "", "nan%", "inf%"])
def test_what_is_no_capacity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a capacity"):
        Trace("t", 512, (), 1000).capacity(text)


# --- The shared trace ------------------------------------------------------------------------------------


@needs_shared
def test_the_references_of_the_shared_trace_are_reproduced() -> None:
    trace = read_trace(SHARED)
    shares = ("1%", "5%", "10%", "20%")
    lru = [plain_lru_hits(trace.requests, trace.capacity(share)) / trace.num_blocks for share in shares]
    belady = [belady_hits(trace.requests, trace.capacity(share)) / trace.num_blocks for share in shares]
    assert [round(rate, 4) for rate in lru] == [0.0525, 0.1958, 0.2789, 0.3453]
    assert [round(rate, 4) for rate in belady] == [0.2464, 0.3664, 0.3664, 0.3664]


@needs_shared
@pytest.mark.slow
def test_the_default_beats_lru_on_the_beginning_of_the_shared_trace() -> None:
    """A twelfth of it, to be quick; `tierkv replay` judges the whole."""
    whole = read_trace(SHARED)
    requests = whole.requests[: len(whole.requests) // 12]
    unique = len({block for request in requests for block in request.blocks})
    trace = replace(whole, requests=requests, num_unique=unique)
    hits = [block for request in requests for block in request.blocks]
    assert max(hits) < unique, "blocks are numbered in the order of their first use"
    for share in ("2%", "10%"):
        assert hit_rate(trace, "hit-density", share) > hit_rate(trace, "lru", share)
