"""README and the guides hold what they promise: Python runs, links lead somewhere, commands and options exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tierkv.engine.embedded_model import ready_embedded_model
from tierkv.tools.cli import COMMANDS, app, load_command

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")), *GUIDES]


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of these languages."""
    return [
        body for language, body in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL) if language in languages
    ]


def prose_of(text: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


PYTHON = [(path, number) for path in DOCUMENTS for number in range(len(blocks_of(path.read_text("utf-8"), "python")))]


@pytest.mark.parametrize(("path", "number"), PYTHON, ids=lambda value: str(getattr(value, "name", value)))
def test_each_python_block_runs(
    path: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, in one home: what the second run prints is in EXPECTED."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example.py", str(ready_embedded_model(tmp_path))])
    code = blocks_of(path.read_text("utf-8"), "python")[number].replace('"path/to/model"', "None")
    outputs = []
    for _ in range(2):
        exec(compile(code, f"{path.name}, block {number}", "exec"), {})
        outputs.append(capsys.readouterr().out.strip().splitlines())
    expected = next((lines for name, lines in EXPECTED.items() if name in code), None)
    assert expected is not None, "say in EXPECTED what the example prints"
    assert [lines[-1] for lines in outputs] == expected


GENERATED = re.findall(r"^GenerateStats.*$", (ROOT / "docs/transformers.md").read_text("utf-8"), flags=re.MULTILINE)
OF_ENGINES = {"--distributed-executor-backend", "--enable-metrics", "--page-size"}  # options of vLLM and SGLang

EXPECTED = {  # by a name that the example contains: the last line that each of two runs prints
    "Engine(runner)": [" 32 more tokens; 2 requests"] * 2,
    "sparse_tokens": ["0", "0"],
    "open_runner": ["0.0", "1.0"],  # 7 whole blocks, and a partial one
    "store.register": ["0 0", "4 0"],
    "persistent_cache": GENERATED,  # as docs/transformers.md shows it
    "print(*config.remote)": ["redis://cache.example:6379?ttl_s=86400"] * 2,
    "BlockLayout": ["0", "768"],
    "csr_block_table": ["[0, 19, 35] [12, 16]"] * 2,
    "MemoryTransferManager": ["True True", "True True"],
}


def links_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield file and anchor of every relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors_of(text: str) -> set[str]:
    """Name the headings of a document as GitHub's links do."""
    headings = re.findall(r"^#+ (.*)$", prose_of(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_each_relative_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for file, anchor in links_of(path.read_text("utf-8")):
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), file
        assert not anchor or anchor in anchors_of(target.read_text("utf-8")), f"{file}#{anchor}"


def test_the_readme_links_to_every_guide() -> None:
    linked = {file for file, _ in links_of((ROOT / "README.md").read_text("utf-8"))}
    assert {document_id(path) for path in GUIDES} <= linked


def shell_lines_of(text: str) -> list[str]:
    """Return what a reader would type: in a console block only the lines behind a `$`."""
    typed = [line for body in blocks_of(text, "bash") for line in body.splitlines()]
    lines = [line for body in blocks_of(text, "console") for line in body.splitlines()]
    typed += [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed + re.findall(r"`([^`\n]+)`", prose_of(text))


def commands_of(text: str) -> Iterator[str]:
    """Yield every call of `tierkv` in shell blocks and in inline code, comments and prompts stripped."""
    for code in shell_lines_of(text):
        for part in re.split(r"&&|;", code.split("  #")[0]):
            if part.strip().startswith("tierkv "):
                yield part.strip()


def whole_command() -> Any:
    """Return `tierkv` with all of its commands, which are otherwise imported when they are called."""
    command: Any = typer.main.get_command(app)
    command.commands = {name: load_command(name) for name in COMMANDS}
    return command


def faults_of(call: str) -> list[str]:
    """Say which subcommand or options of a call do not exist."""
    _, *words = re.sub(r'"[^"]*"', "TEXT", call).split()
    command = whole_command()
    path = []
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        path.append(words[0])
        command = command.commands.get(words.pop(0))
        if command is None:
            return [f"no command {' '.join(path)}"]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    return [f"no option {word} of {' '.join(path)}" for word in words if word.startswith("-") and word not in known]


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_each_command_and_option_exists(path: Path) -> None:
    assert [fault for call in commands_of(path.read_text("utf-8")) for fault in faults_of(call)] == []


def test_each_option_that_a_guide_names_alone_exists_somewhere() -> None:
    known, pending = {"--help"}, [whole_command()]
    while pending:
        command = pending.pop()
        known |= {name for parameter in command.params for name in parameter.opts}
        pending += getattr(command, "commands", {}).values()
    for path in DOCUMENTS:
        named = set(re.findall(r"`(--[a-z][a-z-]*)[^`\n]*`", prose_of(path.read_text("utf-8"))))
        assert named <= known | OF_ENGINES, path.name


def test_a_command_and_an_option_that_do_not_exist_are_found() -> None:
    assert faults_of("tierkv daemon begin") == ["no command daemon begin"]
    assert faults_of('tierkv run "-x --y" --compare --fast') == ["no option --fast of run"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_each_make_target_exists(path: Path) -> None:
    text = path.read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for call in shell_lines_of(text):
        found = re.match(r"make ([a-z][a-z -]*)", call.split("  #")[0])
        assert not found or set(found[1].split()) <= targets, call


def test_each_file_that_architecture_names_exists() -> None:
    for name in re.findall(r"`([\w./]+\.(?:py|txt))`", prose_of((ROOT / "ARCHITECTURE.md").read_text("utf-8"))):
        places = [ROOT / name, ROOT / "tierkv" / name]
        assert any(place.exists() for place in places), name
