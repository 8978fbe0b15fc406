"""Every help page: -h, an example that parses, units of every number; readable without colours and in 60 columns."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import typer

from tierkv.tools.cli import COMMANDS, load_command
from tierkv.tools.help_examples import EXAMPLES

Command = Callable[..., Any]
UNIT = re.compile(
    r"\b(tokens?|bytes|seconds|blocks|prompts?|requests|answers|connections|port|prefixes|rounds|percent(age)?|"
    r"0 to 1|90s|digits)\b",
    re.IGNORECASE,
)
WITHOUT_UNIT = {"temperature", "seed"}


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every command as it is typed, with its function."""
    for name, place in COMMANDS.items():
        found = getattr(import_module(f"tierkv.tools.{place.module}"), place.name)
        if isinstance(found, typer.Typer):
            for each in found.registered_commands:
                assert each.callback is not None
                yield f"{name} {each.name or each.callback.__name__.replace('_', '-')}", each.callback
        else:
            yield name, found


ALL = dict(functions())


@pytest.mark.parametrize("name", [*ALL, "daemon"])
def test_each_command_has_help_with_an_example(command: Command, name: str) -> None:
    short, long = command(*name.split(), "-h"), command(*name.split(), "--help")
    assert short.code == 0 and short.out == long.out and not short.err
    assert EXAMPLES[name], "say in tools/help_examples.py how it is called"
    shown = " ".join(short.out.split())
    for example in EXAMPLES[name]:
        assert " ".join(example.split()) in shown


@pytest.mark.parametrize(("name", "example"), [(name, each) for name in EXAMPLES for each in EXAMPLES[name]])
def test_each_example_names_options_that_exist(name: str, example: str) -> None:
    words = shlex.split(example.split("|")[-1])
    assert words[0] == "tierkv" and words[1] == name.split()[0]
    rest = words[1 + len(name.split()) :]
    target = load_command(words[1])
    if getattr(target, "commands", None):
        target = target.commands[words[2]]
    known = {option for parameter in target.params for option in parameter.opts}
    assert [word for word in rest if word.startswith("--") and word not in known] == []


def numbers_of(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Yield name and help of each parameter that is a number or a size."""
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        annotation = parameter.annotation
        if get_origin(annotation) is not Annotated:
            continue
        kind, *notes = get_args(annotation)
        text = next((each.help for each in notes if getattr(each, "help", None)), "") or ""
        kinds = {kind, *get_args(kind), *(inner for each in get_args(kind) for inner in get_args(each))}
        if kinds & {int, float} or re.search(r"\b\d+[MG]\b", text):
            yield name, text


@pytest.mark.parametrize("name", ALL)
def test_each_number_has_its_unit_in_the_help(name: str) -> None:
    found = dict(numbers_of(ALL[name]))
    assert [each for each, text in found.items() if each not in WITHOUT_UNIT and not UNIT.search(text)] == []


def test_the_search_for_numbers_finds_them() -> None:
    assert {"max_new_tokens", "temperature", "nth", "hot", "block_sizes"} <= set(dict(numbers_of(ALL["run"])))
    assert {"interval", "prefixes"} == set(dict(numbers_of(ALL["top"])))


def test_no_example_is_left_of_a_command_that_is_gone() -> None:
    assert EXAMPLES.keys() == {*ALL, *(name for name in COMMANDS if name not in ALL)}


def test_no_color_takes_the_colours_away(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-9])[;m]")
    with_colours = command("run", "-h").out
    assert coloured.search(with_colours), "else this test shows nothing"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(command("run", "-h").out)
    assert not coloured.search(command("daemon", "-h").out)


def test_a_command_of_a_group_is_found_by_its_own_name(command: Command) -> None:
    refused = command("status")
    assert (
        refused.code == 2 and refused.err == "tierkv: there is no command status, but there is tierkv daemon status\n"
    )
    assert "No such command 'wram'. Did you mean 'warm'" in command("wram").err
