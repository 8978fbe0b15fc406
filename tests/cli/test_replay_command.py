"""`tierkv replay` and `train-policy`, as one types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from one_command import run_command
from synthetic_traces import make_requests, write_trace

from tierkv.policies import policy_names


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.jsonl", make_requests("scans")[:200])


def test_one_object_has_every_policy_and_the_bound(trace: Path) -> None:
    code, out, _ = run_command("replay", trace, "--capacity", "5%", "--json")
    result = json.loads(out)
    assert code == 0 and sorted(result["policies"]) == sorted(policy_names())
    assert result["capacity_blocks"] == int(result["unique_blocks"] * 0.05)
    for policy in result["policies"].values():
        assert 0 < policy["hit_rate"] <= result["belady_hit_rate"] < 1
        assert policy["seconds_saved"] > 0


def test_capacities_may_be_blocks_or_percentages_and_several(trace: Path) -> None:
    _, out, err = run_command(
        "replay", trace, "--policy", "lru,s3-fifo", "--capacity", "100", "--capacity", "10%,20%", "--json"
    )
    result = json.loads(out)
    assert [point["capacity"] for point in result["curve"]] == ["100", "10%", "20%"]
    assert result["capacity_blocks"] == 100 and list(result["policies"]) == ["lru", "s3-fifo"]
    assert result["policies"] == result["curve"][0]["policies"]
    assert "Belady" in err  # the curve, drawn beside the result


def test_a_table_ranks_the_policies(trace: Path) -> None:
    code, out, _ = run_command("replay", trace, "--policy", "lru", "--policy", "hit-density")
    assert code == 0 and out.index("hit-density") < out.index("lru") < out.index("Belady, may bypass")


def test_a_plot_is_a_png_with_matplotlib_and_text_without(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    code, out, _ = run_command("replay", trace, "--policy", "lru", "--capacity", "5%,10%", "--plot", path)
    assert code == 0
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not path.exists() and "x Belady" in out
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_trained_policy_replays_under_its_file(trace: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    code, out, _ = run_command("train-policy", trace, "--out", model, "--json")
    assert code == 0 and json.loads(out)["log_loss"] < json.loads(out)["log_loss_constant"]
    first = model.read_bytes()
    code, out, _ = run_command("train-policy", trace, "--out", model)
    assert code == 0 and "log loss" in out and model.read_bytes() == first
    code, out, _ = run_command("replay", trace, "--policy", f"learned:{model}", "--json")
    assert code == 0 and json.loads(out)["policies"][f"learned:{model}"]["hit_rate"] > 0


def test_measured_prefills_change_the_seconds_and_not_the_hits(trace: Path) -> None:
    results = [
        json.loads(run_command("replay", trace, "--policy", "lru", *more, "--json")[1])["policies"]["lru"]
        for more in ((), ("--prefill", "1000:1,2000:2"))
    ]
    assert results[0]["hits"] == results[1]["hits"]
    assert results[1]["seconds_saved"] == pytest.approx(1000 * 0.001 * results[0]["hits"] * 0.512, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["replay", "missing.jsonl"], "No such file"),
        (["replay", "TRACE", "--capacity", "none"], "not a capacity"),
        (["replay", "TRACE", "--policy", "best"], "no eviction policy 'best'"),
        (["replay", "TRACE", "--policy", "learned:missing.json"], "missing.json"),
        (["replay", "TRACE", "--plot", "curve.svg"], "PNG"),
        (["replay", "TRACE", "--prefill", "fast"], "tokens:seconds"),
        (["replay", "TRACE", "--prefill", "10:1"], "two measurements"),
        (["train-policy", "TRACE", "--out", "no/such/folder.json"], "cannot write"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(trace: Path, arguments: list[str], reason: str) -> None:
    code, out, err = run_command(*(str(trace) if word == "TRACE" else word for word in arguments))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and not out and reason in lines[-1] and len(lines) == 1, err
