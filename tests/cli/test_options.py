"""How a command's dataclasses become its options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from tierkv.errors import ConfigError
from tierkv.tools.engine_options import ModelOptions
from tierkv.tools.options import spread


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
