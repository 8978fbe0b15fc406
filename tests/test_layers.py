"""Which module may import which: the table is ARCHITECTURE.md's drawing, the tests hold the code to it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = "tests/test_layers.py"
FOLDERS = ("storage", "kernels", "tools")  # in the root, imported as tierkv.storage and so on


# Bottom to top: a room, and the rooms below it that its modules may import. A module that lies loose in tierkv/ is a
# room of its own. Inside a room modules import each other as long as no cycle arises.
ROOMS = {
    "errors": "",
    "values": "errors",
    "index": "errors values",
    "policies": "errors values index",
    "background": "errors values",
    "storage": "errors values background",
    "metrics": "errors",
    "remote_tiers": "errors values background storage",
    "readers": "errors values background storage",
    "kernels": "errors storage",
    "movers": "errors values background storage kernels",
    "daemon": "errors values index policies background storage metrics remote_tiers readers",
    "ranks": "errors kernels",
    "config": "errors values policies storage remote_tiers",
    "transfer": "errors values index policies background storage remote_tiers readers movers daemon ranks config",
    "block_store": "errors values index background storage remote_tiers readers movers daemon config transfer",
    "requests": "errors values index background storage movers ranks transfer",
    "cache": "errors values policies background storage ranks config transfer requests",
    "scheduling": "errors values requests cache",
    "engine": "errors values background storage readers kernels movers ranks config requests cache scheduling",
    "profiling": "errors values policies storage metrics config transfer requests cache",
    "serving": "errors values metrics cache engine profiling",
    "integrations": "errors values storage metrics remote_tiers movers ranks block_store engine",
    "__init__": "errors values policies background storage movers ranks config block_store requests cache engine "
    "profiling",
    "tools": "errors values policies storage metrics remote_tiers daemon config engine profiling serving integrations "
    "__init__",
    "__main__": "tools",
}

# Rooms and modules that never load torch; one module of them does.
TORCH_FREE_ROOMS = {
    *("errors", "values", "index", "policies", "background", "storage", "metrics", "remote_tiers", "daemon", "config"),
    *("block_store", "readers"),
}
TORCH_MODULES = {"storage.hot"}
TORCH_FREE_MODULES = {
    *("movers.ready", "transfer.codec_choice", "transfer.recompute_or_load", "transfer.lookup"),
    *("transfer.daemon_connection", "transfer.daemon_connector"),
    *("engine.prompt_files", "engine.prompts", "engine.sparse.options", "ranks.group"),
    *("profiling.tracker", "profiling.prefixes", "profiling.measured", "profiling.advice", "profiling.recorder"),
    *("profiling.profiled_run", "profiling.profiler", "profiling.charts", "profiling.drawing"),
    *(
        "profiling.first_tokens",
        "profiling.report_html",
        "profiling.chrome_trace",
        "profiling.memory_report",
        "profiling.metrics",
        "profiling.remote_metrics",
    ),
    *("integrations", "integrations.weights", "integrations.rows", "integrations.vllm", "integrations.sglang"),
    *("integrations.vllm.configuration", "integrations.vllm.tier_identity", "integrations.sglang.identity"),
}
LATE_MODULES = {"tierkv.movers.engine_memory"}  # imported where an engine hands over tensors: it loads torch
HEAVY = ("torch", "transformers", "flash_attn", "flashinfer", "triton", "typer", "rich")


# --- The checker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrow:
    """One import of one of our modules; `target` is a full name such as tierkv.index.index, or as written."""

    target: str
    line: int
    in_function: bool


def room_of(module: str) -> str | None:
    """Return the room of a module; None if the table has none."""
    room = module.split(".")[0]
    return room if room in ROOMS else None


def modules_of(root: Path) -> dict[str, Path]:
    """Name every module of a tree: `index`, `storage.cold`, `integrations.vllm`, `__init__`."""
    found = {path.stem: path for path in (root / "tierkv").glob("*.py")}
    packages = [path for path in (root / "tierkv").glob("*/") if path.is_dir() and not path.is_symlink()]
    for folder in [*packages, *(root / name for name in FOLDERS)]:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            is_package = parts[-1] == "__init__" and folder.name not in FOLDERS
            found[".".join(parts[:-1] if is_package else parts)] = path
    return found


def arrows_of(tree: ast.AST, modules: dict[str, Path], in_function: bool = False) -> Iterator[Arrow]:
    """Yield every import of ours under `tree`, those for type checkers included."""
    for node in ast.iter_child_nodes(tree):
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for target in targets_of(node, modules):
            yield Arrow(target, node.lineno, inside)  # type: ignore[attr-defined]
        yield from arrows_of(node, modules, inside)


def targets_of(node: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if is_ours(alias.name))
    elif isinstance(node, ast.ImportFrom) and node.level:
        yield "." * node.level + (node.module or "")
    elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
        for alias in node.names:
            full_name = f"{node.module}.{alias.name}"
            base, module = (node.module or "").removeprefix("tierkv."), full_name.removeprefix("tierkv.")
            yield full_name if base in FOLDERS or module in modules else node.module or ""
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        yield from (name for name in names if isinstance(name, str) and is_ours(name))


def is_ours(name: str) -> bool:
    return name.split(".")[0] in {"tierkv", *FOLDERS}


def why_not(module: str, arrow: Arrow) -> str | None:
    """Say what is wrong with one import; None if it is allowed."""
    if arrow.target.startswith("."):
        return "a relative import: write the full name"
    if arrow.target.split(".")[0] in FOLDERS:
        return f"imports {arrow.target} as a top-level name: write tierkv.{arrow.target}"
    source = room_of(module)
    target = room_of(arrow.target.removeprefix("tierkv").removeprefix(".") or "__init__")
    if source is None:
        return None  # said once for the module, not for each of its imports
    if target is None:
        return f"imports {arrow.target}, which is in no room: add the room to the table of {TABLE}"
    # Kernels need triton, which only the extra `gpu` brings: modules that use kernels import them when there is a GPU.
    is_late = target == "kernels" or arrow.target in LATE_MODULES
    if arrow.in_function and source not in ("tools", "__main__") and not is_late:
        return f"imports {arrow.target} inside a function: import at the top, or move down what both need"
    if source == target or target in ROOMS[source].split():
        return None
    direction = "up" if list(ROOMS).index(target) > list(ROOMS).index(source) else "sideways"
    return f"imports {arrow.target}: an arrow {direction}, from {source} to {target}"


def faults_of(root: Path) -> list[str]:
    """Check a tree; one line for each fault, empty if the layers hold."""
    modules, faults, graph = modules_of(root), [], {}
    for module, path in sorted(modules.items()):
        name = path.relative_to(root)
        if path.stem == "__init__" and name.parts[0] in FOLDERS:
            faults.append(f"{name}: these folders carry no __init__.py")
            continue
        if room_of(module) is None:
            faults.append(f"{name}: in no room: add the room to the table of {TABLE}")
        arrows = list(arrows_of(ast.parse(path.read_text("utf-8")), modules))
        graph[module] = [arrow.target.removeprefix("tierkv.") for arrow in arrows]
        reasons = [(arrow.line, why_not(module, arrow)) for arrow in arrows]
        faults += dict.fromkeys(f"{name}:{line}: {reason}" for line, reason in reasons if reason)
    return faults + [f"a cycle: {' -> '.join(cycle)}" for cycle in cycles_of(graph)]


def cycles_of(graph: dict[str, list[str]]) -> list[list[str]]:
    """Find import cycles, as the path that leads back to its first module."""
    cycles: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in graph.get(module, []):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return cycles


IMPORT_WITH_BLOCKED = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

blocked, modules = json.loads(sys.stdin.read())
sys.meta_path.insert(0, Blocker())
failures = {}
for module in modules:
    try:
        importlib.import_module("tierkv." + module)
    except ImportError as exc:
        failures[module] = str(exc)
print(json.dumps(failures))
"""


def run_python(code: str, root: Path, given: object = None) -> str:
    """Run code in a fresh interpreter that finds tierkv in `root`; return what it printed."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def failures_without_torch(modules: list[str], root: Path) -> dict[str, str]:
    """Import modules where torch and what needs it cannot be imported; say which of them fail, and why."""
    blocked = ["torch", "transformers", "flash_attn", "flashinfer", "triton"]
    failures: dict[str, str] = json.loads(run_python(IMPORT_WITH_BLOCKED, root, [blocked, modules]))
    return failures


def torch_free_modules(root: Path) -> list[str]:
    """Name the modules of a tree that the table promises to be importable without torch."""
    return sorted(
        module
        for module in modules_of(root)
        if module not in TORCH_MODULES and (room_of(module) in TORCH_FREE_ROOMS or module in TORCH_FREE_MODULES)
    )


# --- The code --------------------------------------------------------------------------------------------


def test_every_import_points_down() -> None:
    faults = faults_of(ROOT)
    assert not faults, "\n".join(faults)


def test_the_checker_sees_the_modules_that_git_sees() -> None:
    seen = modules_of(ROOT)
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = {ROOT / name for name in listed.stdout.split() if name.split("/")[0] in {"tierkv", *FOLDERS}}
    assert {"index.index", "daemon", "daemon.core", "storage.warm", "__init__"} <= set(seen)
    assert {path for path in tracked if path.exists()} <= set(seen.values())


def test_a_room_imports_only_rooms_that_stand_before_it_in_the_table() -> None:
    names = list(ROOMS)
    for position, below in enumerate(ROOMS.values()):
        assert set(below.split()) <= set(names[:position])


def test_the_drawing_in_architecture_shows_every_file_and_every_arrow() -> None:
    drawn, modules = drawing_of((ROOT / "ARCHITECTURE.md").read_text("utf-8")), modules_of(ROOT)
    files: dict[str, set[str]] = {room: set() for room in ROOMS}
    arrows: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, path in modules.items():
        room, _, name = module.partition(".")  # a file of an inner folder is drawn as `vllm/connector`
        is_file = path.stem != "__init__" and path.parent != ROOT / "tierkv"
        files[room] |= {name.replace(".", "/")} if is_file else set()
        for arrow in arrows_of(ast.parse(path.read_text("utf-8")), modules):
            arrows[room].add(arrow.target.removeprefix("tierkv").removeprefix(".").split(".")[0] or "__init__")
    assert {room: sorted(names) for room, (names, _) in drawn.items()} == {k: sorted(v) for k, v in files.items()}
    assert {room: below for room, (_, below) in drawn.items()} == {room: arrows[room] - {room} for room in ROOMS}


def test_the_table_allows_no_arrow_that_no_module_needs() -> None:
    drawn = drawing_of((ROOT / "ARCHITECTURE.md").read_text("utf-8"))
    assert {room: below for room, (_, below) in drawn.items()} == {k: set(v.split()) for k, v in ROOMS.items()}


def drawing_of(text: str) -> dict[str, tuple[list[str], set[str]]]:
    """Read ARCHITECTURE.md's drawing: of each room the files, and the rooms behind its arrow.

    A room begins at the left edge with its name, `/` behind it where it is a folder; the lines below it are indented.
    """
    drawing = text.split("```drawing\n")[1].split("```")[0]
    rooms: dict[str, tuple[list[str], set[str]]] = {}
    for line in filter(str.strip, drawing.splitlines()):
        if not line.startswith(" "):
            name, _, line = line.partition(" ")
            room = rooms[name.rstrip("/")] = ([], set())
        files, _, below = line.partition("→")
        room[0].extend(files.split() if not files.lstrip().startswith("#") else [])
        room[1].update(below.split())
    return rooms


def test_tests_never_import_the_folders_as_top_level_names() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{arrow.line}"
        for path in (ROOT / "tests").rglob("*.py")
        for arrow in arrows_of(ast.parse(path.read_text("utf-8")), {})
        if arrow.target.split(".")[0] in FOLDERS
    ]
    assert offenders == []


def test_no_two_test_files_have_the_same_name() -> None:
    """tests/ carries no __init__.py, so pytest imports each file by its bare name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_test_imports_from_a_conftest() -> None:
    """Which of several conftest.py a bare name finds depends on what else is collected."""
    sources = [path for path in (ROOT / "tests").rglob("*.py") if "conftest import" in path.read_text("utf-8")]
    assert [path.name for path in sources] == ["test_layers.py"]


def test_no_tool_has_the_name_of_a_standard_module() -> None:
    """`python tools/some.py` puts tools/ first on the path: a tools/inspect.py would break every library."""
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} & sys.stdlib_module_names == set()


def test_the_control_plane_is_importable_without_torch() -> None:
    modules = torch_free_modules(ROOT)
    assert {"values.block", "index.index", "policies", "storage.warm"} <= set(modules)
    assert failures_without_torch(modules, ROOT) == {}


def test_importing_tierkv_loads_nothing_else_of_ours_and_nothing_heavy() -> None:
    loaded = json.loads(run_python("import tierkv, json, sys; print(json.dumps(list(sys.modules)))", ROOT))
    assert [name for name in loaded if name.split(".")[0] in HEAVY or name.startswith("tierkv.")] == []


# --- The checker, with violations planted ------------------------------------------------------------------


def plant(root: Path, files: dict[str, str]) -> Path:
    for name in ("tierkv", *FOLDERS):
        (root / name).mkdir()
    for name, text in {"tierkv/__init__.py": "", **files}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("tierkv/index/index.py", "from tierkv.cache import TierCache", "up, from index to cache"),
        ("tierkv/index/index.py", "import tierkv.cache", "up, from index to cache"),
        ("tierkv/index/index.py", "from tierkv import cache", "up, from index to cache"),
        ("tierkv/index/index.py", "from tierkv import TierCache", "up, from index to __init__"),
        ("tierkv/errors.py", "from tierkv.values.block import Tier", "up, from errors to values"),
        ("tierkv/index/index.py", "from tierkv.storage.cold import ColdStore", "up, from index to storage"),
        ("storage/cold.py", "from tierkv.index.index import Index", "sideways, from storage to index"),
        ("tierkv/movers/mover.py", "from tierkv.index.index import Index", "sideways, from movers to index"),
        ("tierkv/cache.py", "from tierkv.tools.cli import main", "up, from cache to tools"),
        ("tierkv/engine/runner.py", "from tierkv.tools.cli import main", "up, from engine to tools"),
        (
            "tierkv/values/block.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tierkv.index.index import Index",
            "block.py:3: imports tierkv.index.index: an arrow up",
        ),
        ("tierkv/cache.py", "def f():\n    from tierkv.index.index import Index", "inside a function"),
        (
            "tierkv/cache.py",
            "class A:\n    async def f(self):\n        import tierkv.index.index",
            "inside a function",
        ),
        ("tierkv/cache.py", "f = lambda: importlib.import_module('tierkv.index.index')", "inside a function"),
        ("tierkv/cache.py", "from .index import Index", "relative import"),
        ("tierkv/cache.py", "from storage.cold import ColdStore", "write tierkv.storage.cold"),
        ("tools/cli.py", "import storage", "write tierkv.storage"),
        (
            "tierkv/novelty.py",
            "",
            "novelty.py: in no room: add the room to the table of tests/test_layers.py",
        ),
        ("tierkv/cache.py", "from tierkv.novelty import News", "in no room"),
        ("kernels/__init__.py", "", "carry no __init__.py"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, fault: str) -> None:
    root = plant(tmp_path, {"tierkv/cache.py": "", file: text})
    faults = faults_of(root)
    assert len(faults) == 1
    assert file.rsplit("/", 1)[-1] in faults[0]
    assert fault in faults[0]


def test_a_cycle_among_modules_that_share_a_star_is_found(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "tools/cli.py": "def main():\n    from tierkv.tools.warm import warm",
            "tools/warm.py": "import tierkv.tools.cli",
        },
    )
    assert faults_of(root) == ["a cycle: tools.cli -> tools.warm -> tools.cli"]


def test_arrows_that_point_down_are_allowed(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "tierkv/values/block.py": "from tierkv.errors import ConfigError",
            "tierkv/movers/mover.py": "from tierkv.storage.hot import HotPool\nfrom tierkv.kernels.gather import go",
            "tierkv/cache.py": "from tierkv.values import block\nfrom tierkv.requests.acquire import Acquire",
            "tools/cli.py": "from tierkv import TierCache\ndef f():\n    from tierkv.tools.warm import warm",
            "tools/warm.py": "import torch\nimport kernels_of_someone_else",
        },
    )
    assert faults_of(root) == []


def test_a_module_that_needs_torch_fails_where_torch_is_blocked(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "tierkv/index/index.py": "import torch.cuda",
            "tierkv/policies/__init__.py": "import tierkv.index.index",
            "tierkv/values/block.py": "import numpy",
            "tierkv/cache.py": "import torch",
        },
    )
    modules = torch_free_modules(root)
    assert modules == ["index.index", "policies", "values.block"]
    failures = failures_without_torch(modules, root)
    assert sorted(failures) == ["index.index", "policies"]
    assert "torch is blocked" in failures["policies"]
