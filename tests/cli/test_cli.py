"""The command line, as a newcomer types it; in a process of its own only where that is the point."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
from one_command import Command, Printed

from tierkv import __main__
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import FORMAT_KEY
from tierkv.tools import cli, store_commands
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

PROMPTS = (
    "You are a careful assistant. " * 12
    + "Answer briefly.\n---\n"
    + "You are a careful assistant. " * 12
    + "Be kind.\n"
)


@pytest.fixture
def tierkv(command: Command, tmp_path: Path) -> Command:
    """Return a function that runs one command on a fresh store, beside a file of two prompts."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return command


def test_warming_twice_computes_nothing_the_second_time(tierkv: Command, tmp_path: Path) -> None:
    first = tierkv("warm", tmp_path / "prompts.txt", "--json").json()
    assert first["prompts"] == 2 and first["blocks_computed"] == 3 and first["blocks_reused"] == 0
    assert first["bytes_raw"] > first["bytes_stored"] > 0
    second = tierkv("warm", tmp_path / "prompts.txt", "--json").json()
    assert second["blocks_computed"] == 0 and second["blocks_reused"] == 3
    assert second["tokens"] == first["tokens"]


def test_a_hot_pool_too_small_for_a_prompt_is_refused(tierkv: Command, tmp_path: Path) -> None:
    assert_refused(tierkv("run", "x" * 600, "--hot", "2M", "--max-new-tokens", 1), "raise --hot")


def test_a_store_too_small_for_the_prompts_is_said(tierkv: Command, tmp_path: Path) -> None:
    result = tierkv("warm", tmp_path / "prompts.txt", "--cold", "1M", "--json")
    assert result.code == 2 and "blocks found no room in the store" in result.err


@pytest.mark.parametrize("option", ["--pin", "--dry-run"])
def test_a_prompt_too_large_for_the_hot_pool_is_named_and_the_others_are_warmed(
    tierkv: Command, tmp_path: Path, option: str
) -> None:
    (tmp_path / "prompts.txt").write_text("Be kind.\n---\n" + "This one is long. " * 100 + "\n---\n" + PROMPTS)
    result = tierkv("warm", tmp_path / "prompts.txt", "--hot", "4M", "--json", option)
    summary = json.loads(result.out)
    assert result.code == 2 and summary["too_large"] == [2] and summary["prompts"] == 3
    assert summary["blocks_computed"] == 4
    error = result.err.splitlines()[-1]
    assert "1 of 4 prompts" in error and 'number 2 ("This one is long. This one ...": 1,' in error
    table = tierkv("warm", tmp_path / "prompts.txt", "--hot", "4M", option)
    assert "too large, left out" in table.out and table.code == 2
    size = error.split("raise --hot to ")[1].split()[0]
    assert tierkv("warm", tmp_path / "prompts.txt", "--hot", size, "--json", option).json()["too_large"] == []


def test_a_prompt_beyond_the_models_context_is_named_and_the_others_are_warmed(tierkv: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Be kind.\n---\n" + "x" * 66_000)
    result = tierkv("warm", tmp_path / "prompts.txt", "--json")
    assert result.code == 2 and json.loads(result.out)["too_large"] == [2]
    assert "over the model's context of 65,536 tokens" in result.err


def test_an_interrupted_command_ends_with_130_in_silence(tierkv: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_commands, "open_existing", interrupt)
    result = tierkv("verify")
    assert (result.code, result.out, result.err) == (130, "", "")


@pytest.mark.parametrize("arguments", [["stats"], ["stats", "--json"]])
def test_output_that_cannot_be_written_is_one_line(tierkv: Command, embedded_cache: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(embedded_cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        ColdStore(Path(os.environ["TIERKV_STORE"]), quota_bytes=64 << 20, min_free_bytes=0),
        open("/dev/full", "w") as full,
    ):
        command = [sys.executable, "-m", "tierkv", *arguments]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "tierkv: the output cannot be written: No space left on device\n")


def test_ctrl_c_is_heard_before_the_command_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        __main__.main()
    assert exit_info.value.code == 130


def test_a_dry_run_says_what_would_be_computed_and_computes_nothing(tierkv: Command, tmp_path: Path) -> None:
    for _ in range(2):
        assert tierkv("warm", tmp_path / "prompts.txt", "--dry-run", "--json").json()["blocks_computed"] == 3
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    assert tierkv("warm", tmp_path / "prompts.txt", "--dry-run", "--json").json()["blocks_computed"] == 0


def test_a_run_finds_the_warmed_prompt_and_answers_the_same(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    result = tierkv(
        "run", "Hello!", "--system", tmp_path / "prompts.txt", "--nth", 2, "--max-new-tokens", 6, "--compare", "--json"
    ).json()
    assert result["same_tokens"] is True and result["max_logit_diff"] < 1e-3
    assert result["cached_tokens"]["cold"] >= result["prompt_tokens"] - 60
    assert len(result["token_ids"]) <= 6 and isinstance(result["text"], str)
    assert result["ttft_s"] > 0 and result["recompute_ttft_s"] > 0


def test_a_process_of_its_own_answers_from_the_store(tierkv: Command, tmp_path: Path, embedded_cache: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    command = [sys.executable, "-c", "from tierkv.tools.cli import main; main()"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(embedded_cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["run", "Hi", "--system", str(tmp_path / "prompts.txt"), "--max-new-tokens", "2", "--json"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cached_tokens"]["cold"] > 300


def test_without_cache_nothing_is_found_and_nothing_kept(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    before = tierkv("stats", "--json").json()["blocks"]
    result = tierkv(
        "run", "Hi", "--system", tmp_path / "prompts.txt", "--no-cache", "--max-new-tokens", 2, "--json"
    ).json()
    assert sum(result["cached_tokens"].values()) == 0
    assert tierkv("stats", "--json").json()["blocks"] == before


def test_pinned_prompts_are_marked(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--pin", "--json")
    assert all(prefix["pinned"] for prefix in tierkv("inspect", "--json").json()["prefixes"])


def test_inspect_says_why_namespaces_do_not_mix(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    for option, value, field in (
        ("--dtype", "bfloat16", "dtype"),
        ("--block-size", "64", "block_size"),
        ("--salt", "tenant", "salt"),
        ("--codec", "lossy-int8", "lossy_codec"),
    ):
        assert tierkv("warm", tmp_path / "prompts.txt", option, value, "--json").json()["blocks_reused"] == 0
        found = tierkv("inspect", "--json").json()["namespaces"]
        plain = (n for n in found if n["dtype"] == "float32" and n["block_size"] == 256 and not n["salt"])
        base = next(n for n in plain if "lossy_codec" not in n)
        assert any(field in n["differs_in"] for n in found if n is not base) or field in base["differs_in"]
    assert tierkv("warm", tmp_path / "prompts.txt", "--json").json()["blocks_computed"] == 0


def test_inspect_lists_prefixes_with_their_text(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    prefixes = tierkv("inspect", "--json").json()["prefixes"]
    assert len(prefixes) == 2 and all("You are a careful" in prefix["text"] for prefix in prefixes)
    assert all(prefix["shared_blocks"] == 1 and prefix["tier"] == "cold" for prefix in prefixes)
    assert re.search(r"blocks +shared", tierkv("inspect").out) and re.search(r" 2 +1 +", tierkv("inspect").out)


def test_inspect_prints_what_keeps_two_namespaces_apart(tierkv: Command, tmp_path: Path) -> None:
    for size in (256, 64):
        tierkv("warm", tmp_path / "prompts.txt", "--block-size", size, "--json")
    assert "it differs in block_size" in " ".join(tierkv("inspect").out.split())


def test_inspect_says_which_rank_of_a_split_model_a_namespace_is(tierkv: Command, tmp_path: Path) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=16, kv_heads=1, head_dim=8, dtype="float32")
    with ColdStore(tmp_path / "store", quota_bytes=64 << 20, min_free_bytes=0) as store:
        for rank in range(2):
            store.open_namespace(Namespace(weights="w", layout=layout, tp_rank=rank, tp_size=2, name="big"))
    shown = " ".join(tierkv("inspect").out.split())
    assert "big, rank 0 of 2" in shown and "big, rank 1 of 2" in shown and "it differs in tp_rank" in shown


def test_a_lossy_codec_is_a_namespace_of_its_own_and_halves_the_bytes(tierkv: Command, tmp_path: Path) -> None:
    exact = tierkv("warm", tmp_path / "prompts.txt", "--json").json()
    lossy = tierkv("warm", tmp_path / "prompts.txt", "--codec", "lossy-int8", "--json").json()
    assert lossy["blocks_computed"] == exact["blocks_computed"]
    assert lossy["bytes_stored"] < 0.5 * exact["bytes_stored"]
    assert "it differs in lossy_codec" in " ".join(tierkv("inspect").out.split())
    assert tierkv("verify", "--json").json()["sound"]
    assert tierkv("warm", tmp_path / "prompts.txt", "--codec", "gzip").code == 2


def test_a_saved_store_loads_into_another(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    saved = tierkv("save", tmp_path / "state.tkv", "--json").json()
    assert saved["blocks"] == 3
    loaded = tierkv("load", tmp_path / "state.tkv", "--store", tmp_path / "other", "--json").json()
    assert loaded == {"blocks": 3, "blocks_stored": 3, "blocks_existing": 0, "blocks_evicted": 0}
    again = tierkv("warm", tmp_path / "prompts.txt", "--store", tmp_path / "other", "--json").json()
    assert again["blocks_computed"] == 0


def assert_refused(result: Printed, reason: str) -> None:
    """Exit code 2, one line on standard error that says why, nothing on standard output."""
    assert result.code == 2, result.out + result.err
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1 and reason in lines[0], result.err
    assert not result.out


def test_bad_prompt_files_are_refused(tierkv: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n---\n")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    assert_refused(tierkv("warm", tmp_path / "missing.txt"), "No such file")
    assert_refused(tierkv("warm", tmp_path / "empty.txt"), "no prompt")
    assert_refused(tierkv("warm", tmp_path / "binary.txt"), "binary")
    assert not (tmp_path / "store").exists()


def test_unknown_and_unsupported_models_are_refused(tierkv: Command, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    assert_refused(tierkv("warm", tmp_path / "prompts.txt", "--model", "no-such/model"), "cannot load the model")
    assert_refused(tierkv("warm", tmp_path / "prompts.txt", "--model", tmp_path), "no config.json")
    mamba = tmp_path / "mamba"
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(mamba)
    embedded = next((Path(os.environ["XDG_CACHE_HOME"]) / "tierkv").glob("embedded-model-*"))
    for file in embedded.glob("tokenizer*"):
        shutil.copy(file, mamba)
    assert_refused(tierkv("warm", tmp_path / "prompts.txt", "--model", mamba), "cannot be cached by prefix")
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_used_is_refused(tierkv: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert_refused(tierkv("warm", tmp_path / "prompts.txt", "--store", tmp_path / "file"), str(tmp_path / "file"))
    assert_refused(tierkv("warm", tmp_path / "prompts.txt", "--store", "/proc/tierkv"), "/proc/tierkv")
    assert_refused(tierkv("stats", "--store", tmp_path / "nothing"), "there is no store")


def test_a_store_of_a_newer_format_is_refused_and_kept(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    with lmdb.open(str(tmp_path / "store"), max_dbs=8, map_size=1 << 30) as env, env.begin(write=True) as txn:
        txn.put(FORMAT_KEY, b"99", db=env.open_db(b"meta", txn=txn))
    before = (tmp_path / "store" / "data.mdb").read_bytes()
    assert_refused(tierkv("warm", tmp_path / "prompts.txt"), "format")
    assert (tmp_path / "store" / "data.mdb").read_bytes() == before


def test_a_truncated_state_file_is_refused_and_the_store_kept(tierkv: Command, tmp_path: Path) -> None:
    tierkv("warm", tmp_path / "prompts.txt", "--json")
    tierkv("save", tmp_path / "state.tkv", "--json")
    state = (tmp_path / "state.tkv").read_bytes()
    for length in (0, 5, 100, 5000, len(state) - 1):
        (tmp_path / "cut.tkv").write_bytes(state[:length])
        assert_refused(tierkv("load", tmp_path / "cut.tkv"), "cut.tkv")
    assert tierkv("stats", "--json").json()["blocks"] == 3


@pytest.mark.parametrize("words", [["warm"], ["daemon", "start", "--warm-file"]])
def test_two_block_sizes_in_one_command_are_refused(tierkv: Command, tmp_path: Path, words: list[str]) -> None:
    result = tierkv(*words, tmp_path / "prompts.txt", "--block-size", 64, "--block-size", 256)
    assert_refused(result, "one block size")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["frobnicate"], "No such command"),
        (["warm"], "Missing argument"),
        (["warm", "x.txt", "--cold", "much"], "not a size"),
        (["run", ""], "prompt is empty"),
        (["run", "x", "--temperature", "-1"], "temperature"),
        (["run", "x", "--temperature", "nan"], "temperature"),
        (["run", "x", "--seed", str(1 << 64)], "seed"),
        (["run", "x", "--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["run", "x", "--max-new-tokens", "70000"], "lower --max-new-tokens"),
        (["run", "x", "--block-size", "1000000000"], "lower --block-size"),
        (["run", "x", "--block-size", "60000"], "raise --warm, or lower --block-size"),
        (["run", "x", "--device", "meta"], "say cpu or cuda"),
        (["run", "x", "--cold", "999999999T"], "too large a size"),
        (["run", "x", "--cold", "999999T"], "cannot be opened"),
        (["run", "x", "--warm", "999999T"], "lower --warm"),
        (["run", "x", "--hot", "999999T"], "lower --hot"),
        (["run", "x", "--store", "/dev/null"], "choose another --store"),
        (["run", "x", "--store", "a\udcff"], "cannot be opened"),  # what is no UTF-8 arrives like this
        (["load", "."], "a directory"),
    ],
)
def test_words_that_make_no_command_are_refused(
    tierkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(tierkv(*arguments), reason)


def test_json_nested_too_deep_is_refused(tierkv: Command, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert_refused(tierkv("warm", tmp_path / "deep.jsonl"), "not JSON")


@pytest.mark.parametrize("option", [("--temperature", "1e-320"), ("--salt", "\udcff"), ("--seed", "-1")])
def test_odd_values_that_mean_something_work(tierkv: Command, option: tuple[str, str]) -> None:
    greedy = tierkv("run", "x", "--max-new-tokens", 2, "--json").json()["token_ids"]
    assert tierkv("run", "x", "--max-new-tokens", 2, "--json", *option).json()["token_ids"] == greedy
