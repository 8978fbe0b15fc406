"""How a command's dataclasses become its options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

from tierkv.engine.backends.measured import AttentionTable, save_table
from tierkv.engine.sparse.options import SparseDecode
from tierkv.errors import ConfigError
from tierkv.tools import engines
from tierkv.tools.engine_options import EngineOptions, ModelOptions
from tierkv.tools.engines import _measured_here
from tierkv.tools.options import named_attention, spread

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Two options and an argument."""

    file: Annotated[str, typer.Argument()]
    store: Annotated[str | None, typer.Option()] = None
    device: str = "cpu"


def test_each_field_of_a_dataclass_is_an_option_and_the_command_gets_the_dataclass() -> None:
    @spread()
    def command(place: Place, size: int, as_json: bool = False) -> None:
        """Do it."""
        seen.append((place, size, as_json))

    seen: list[object] = []
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["file", "store", "device", "size", "as_json"]
    empty = inspect.Parameter.empty
    assert [each.default for each in parameters.values()] == [empty, None, "cpu", empty, False]
    command(file="a", size=3, store="s")
    assert seen == [(Place(file="a", store="s"), 3, False)]


def test_a_field_that_is_left_out_keeps_its_default() -> None:
    @spread(without=["device"])
    def command(place: Place) -> None:
        assert place.device == "cpu"

    assert list(inspect.signature(command).parameters) == ["file", "store"]
    command(file="a")


def test_a_command_has_one_block_size() -> None:
    assert ModelOptions().block_size == 256
    assert ModelOptions(block_sizes=[16, 16]).block_size == 16
    with pytest.raises(ConfigError, match="one command has one block size, got 16 and 32"):
        ModelOptions(block_sizes=[16, 32])


@pytest.mark.parametrize(
    ("given", "environment", "name"),
    [
        (None, {}, "auto"),
        (None, {"TIERKV_ATTENTION": ""}, "auto"),
        (None, {"TIERKV_ATTENTION": "torch"}, "torch"),
        ("auto", {"TIERKV_ATTENTION": "torch"}, "auto"),
    ],
)
def test_an_option_comes_before_the_environment(given: str | None, environment: dict[str, str], name: str) -> None:
    assert named_attention(given, environment) == name


def test_a_command_attends_by_the_backend_that_it_is_given(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--max-new-tokens", 2, "--no-daemon", "--device", "cpu", "--json"]
    plain = json.loads(command("run", "Hello", *options).out)
    named = json.loads(command("run", "Hello", *options, "--attention", "torch").out)
    assert named["text"] == plain["text"]
    unknown = command("run", "Hello", *options, "--attention", "sdpa")
    assert unknown.code == 2
    assert "attention must be one of auto, torch, flash-attn, flashinfer-fa2, flashinfer-fa3, got 'sdpa'" in unknown.err
    monkeypatch.setenv("TIERKV_ATTENTION", "flash-attn")
    absent = command("run", "Hello", *options)
    assert absent.code == 2
    assert "the attention backend that is forced does not serve this model" in absent.err


def test_sparse_decode_is_off_unless_a_share_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    @contextmanager
    def record(*_: Any, sparse: SparseDecode | None, **__: Any) -> Iterator[None]:
        opened.append(sparse)
        yield None

    monkeypatch.setattr(engines, "open_runner", record)
    for share in (None, 0.1):
        options = EngineOptions(sparse_decode=share, no_daemon=True, device="cpu")
        with engines.open_engine(options, options.config()):
            pass
    assert opened == [None, SparseDecode(budget=0.1)]
    wrong = command("run", "Hello", "--no-daemon", "--sparse-decode", "1.5")
    assert wrong.code == 2
    assert "the budget of sparse decode must be from 0.001 to 1, got 1.5" in wrong.err


def test_a_gpus_table_is_looked_for_in_the_users_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    assert _measured_here(torch.device("cpu")) is None
    assert _measured_here(torch.device("cuda")) is None
    path = tmp_path / "tierkv" / "attention" / "nvidia_h200.json"
    path.parent.mkdir(parents=True)
    save_table(AttentionTable(device="NVIDIA H200", points=()), path)
    assert _measured_here(torch.device("cuda")) == path
    for text in ("{}", '{"version": 99, "device": "NVIDIA H200", "points": []}'):
        path.write_text(text)
        assert _measured_here(torch.device("cuda")) is None, "no command fails for a file that its user did not name"
    assert caplog.text.count("without the times measured here") == 2
