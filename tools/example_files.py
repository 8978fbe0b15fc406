"""`tierkv examples`: the files that come with tierkv, to print or to copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import tierkv
from tierkv.errors import ConfigError
from tierkv.tools.options import AsJson, as_path
from tierkv.tools.terminal import open_console, print_json, visible

__all__ = ["EXAMPLES", "examples", "read_example"]

EXAMPLES = {
    "system_prompts.txt": "Six system prompts, to warm a cache with.",
    "grafana_dashboard.json": "A dashboard of caches, servers and daemons for Grafana over Prometheus.",
    "tierkv-daemon.service": "A systemd unit of the daemon; tierkv daemon unit prints it for this installation.",
    "openai_client.py": "A client of tierkv serve with the openai package.",
    "fastapi_app.py": "A FastAPI application of your own over the engine.",
    "demo_daemon.sh": "Two processes that share one warm cache.",
}


def examples(
    name: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="The file to print; without it, all are listed.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="DIRECTORY", help="Write the files there, which must not have them yet."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List, print or write the files that come with tierkv.

    Example: tierkv examples --write examples && tierkv warm examples/system_prompts.txt
    """
    names = [name] if name is not None else list(EXAMPLES)
    texts = {each: read_example(each) for each in names}
    if write is not None:
        _write(texts, write)
        if as_json:
            print_json({"directory": str(write), "files": names})
        else:
            print(f"wrote {', '.join(names)} into {visible(str(write))}")
    elif name is not None:
        print(texts[name], end="")
    elif as_json:
        print_json(EXAMPLES)
    else:
        table = Table("file", "what it is")
        for each, text in EXAMPLES.items():
            table.add_row(each, text)
        open_console().print(table)


def read_example(name: str) -> str:
    """Return the text of an example. Raises ConfigError for an unknown name."""
    if name not in EXAMPLES:
        raise ConfigError(f"there is no example {name[:40]!r}", hint="tierkv examples lists them")
    return (Path(tierkv.__file__).parent / "examples" / name).read_text("utf-8")


def _write(texts: dict[str, str], folder: Path) -> None:
    """Write files into a folder, which is made if need be. Raises ConfigError, with nothing written, if it has one."""
    for name in texts:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise ConfigError(f"{folder / name} exists", hint="name another directory, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with (folder / name).open("x", encoding="utf-8") as file:
            file.write(text)
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
