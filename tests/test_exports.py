"""What is public says so: `__all__`, a docstring for each module and name, and names that load lazily."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tierkv

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(
    path
    for folder in ("tierkv", "storage", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.startswith("_") and "tools" not in path.relative_to(ROOT).parts
)
COMMANDS = sorted((ROOT / "tools").glob("*.py"))
"""Run, not imported by users: docstrings, but no `__all__`."""


NEED_TORCH = {
    *("TierCache", "load_cache_state", "save_cache_state", "Sequence", "Match", "PrefetchHandle"),
    *("EvictedEverywhere", "LayoutReport", "ManagedFlashAttention", "MemoryController", "TorchRanks"),
    *("open_runner", "Runner", "Generation", "GenerationOptions", "SamplingOptions", "TokenEvent"),
    *("load_model", "split_model", "LoadedModel", "Engine", "EngineStats", "TokenStream"),
    *("MemoryTransferManager", "TransferHandle", "TransferOp"),
    *("CsrBlockTable", "csr_block_table", "page_view"),
}
WITHOUT_TORCH = {
    *("BlockStore", "BlockStoreConfig", "BlockKey", "BlockKeys", "Reservation", "Buffers", "Strided"),
    *("LoadOrCompute", "Origin", "digest_namespace"),
    *("__version__", "CacheConfig", "CacheStats", "Namespace", "BlockLayout", "Tier", "ColdStore", "SavedState"),
    *("TierKVError", "CapacityError", "ClosedError", "ConfigError", "CorruptBlockError", "DaemonError"),
    *(
        "DaemonGoneError",
        "FormatVersionError",
        "NamespaceMismatchError",
        "QueueFullError",
        "RankError",
        "ShapeError",
        "StoreBusyError",
    ),
    *("SparseDecode", "StoreError", "TransferCancelledError", "UnsupportedModelError"),
    *("CacheBlock", "EvictionPolicy", "make_policy", "Handle", "Priority", "RankGroup"),
    *("CacheObserver", "BlockEvent", "EventKind", "MemoryRegion", "RequestEvent", "Span"),
    *("MemoryProfiler", "MemoryReport", "MemoryTracker", "MemoryVisualizer", "MetricsServer", "serve_metrics"),
}


def module_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_names(tree: ast.Module) -> list[str] | None:
    """Read `__all__`; None if the module has none."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__" and isinstance(node, ast.Assign | ast.AnnAssign):
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


def defined_names(tree: ast.Module) -> set[str]:
    """Name what a module binds at its top level, also under `if` and `try`."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            pending += ast.iter_child_nodes(node)
    return names


def faults_of(text: str, *, needs_all: bool) -> list[str]:
    """Say what a module's public face lacks."""
    tree = ast.parse(text)
    faults = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    exported = public_names(tree)
    if exported is None and needs_all:
        faults.append("no __all__")
    faults += [f"__all__ names {name}, which is not defined" for name in set(exported or ()) - defined_names(tree)]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node):
            faults.append(f"{node.name} has no docstring")
    return faults


@pytest.mark.parametrize("path", LIBRARY, ids=module_id)
def test_a_library_module_states_what_is_public(path: Path) -> None:
    assert faults_of(path.read_text("utf-8"), needs_all=True) == []


@pytest.mark.parametrize("path", COMMANDS, ids=module_id)
def test_a_command_has_docstrings(path: Path) -> None:
    assert faults_of(path.read_text("utf-8"), needs_all=False) == []


def test_a_module_that_hides_its_face_is_found() -> None:
    assert faults_of("def f():\n    pass", needs_all=True) == [
        "the module has no docstring",
        "no __all__",
        "f has no docstring",
    ]
    assert faults_of('"""A."""\n__all__ = ["gone"]', needs_all=True) == ["__all__ names gone, which is not defined"]


def loaded_by(names: list[str]) -> list[str]:
    """Use names of tierkv in a fresh interpreter; return the modules that it then has."""
    code = f"import tierkv, sys; [getattr(tierkv, name) for name in {names!r}]; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_every_public_name_is_loaded_on_first_use() -> None:
    assert "tierkv.cache" in loaded_by(tierkv.__all__)


def test_values_are_loaded_without_torch() -> None:
    assert "torch" not in loaded_by(sorted(set(tierkv.__all__) - NEED_TORCH))


def test_the_public_names_are_these() -> None:
    """A name is added here, in docs/library.md and in the changelog when it becomes public; none goes unannounced."""
    assert set(tierkv.__all__) == WITHOUT_TORCH | NEED_TORCH


def test_the_guide_to_the_library_lists_every_public_name() -> None:
    guide = (ROOT / "docs" / "library.md").read_text("utf-8")
    listed = set(re.findall(r"`(\w+)`", guide.split("## Public names")[1]))
    assert set(tierkv.__all__) - {"__version__"} <= listed


def test_dir_lists_the_public_names_before_they_are_loaded() -> None:
    assert set(tierkv.__all__) <= set(dir(tierkv))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_ours'"):
        _ = tierkv.nothing_of_ours
