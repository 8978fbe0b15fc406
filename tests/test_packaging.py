"""However tierkv is installed, its modules lie under tierkv, each once, and nowhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("storage", "kernels", "tools", "examples")
OF_ARCHIVE = ("docs", "tests", "benchmarks", "results")  # beside the packages, in the source archive alone
CORE_DEPENDENCIES = {"torch", "numpy", "xxhash", "lmdb", "zstandard", "msgspec", "typer", "rich"}

pytest.importorskip("setuptools", minversion="77", reason="packages are built with the setuptools that is there")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a clone holds, so that nothing is built inside the working tree; the path has a space."""
    copy = tmp_path_factory.mktemp("packaging") / "a clone"
    copy.mkdir()
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / name for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile")),
    ]:
        shutil.copy(path, copy / path.name)
    for name in ("tierkv", *FOLDERS, *OF_ARCHIVE):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(tree)], cwd=out)
    return only(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


def build(hook: str, source: Path, out: Path) -> Path:
    """Call one of setuptools' build hooks as a front end does; return the archive it made."""
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    run([sys.executable, "-c", code, str(out)], cwd=source)
    return only(path for path in out.iterdir() if path.suffix in {".whl", ".gz"})


def run(command: list[str], *, cwd: Path, python_path: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path:
        env["PYTHONPATH"] = str(python_path)
    process = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def only(found: object) -> Path:
    (path,) = list(found)  # type: ignore[call-overload]
    assert isinstance(path, Path)
    return path


def files_expected(root: Path) -> set[str]:
    """Name the files that a wheel of this tree must hold, metadata apart."""
    data = [root / "tierkv" / "serving" / "page", root / "tierkv" / "engine" / "backends" / "tables"]
    names = {"tierkv/py.typed", *(path.relative_to(root).as_posix() for folder in data for path in folder.iterdir())}
    names |= {f"tierkv/examples/{path.name}" for path in (root / "examples").iterdir() if path.is_file()}
    for folder in [root / "tierkv", *(root / name for name in FOLDERS)]:
        for path in folder.rglob("*.py"):
            inside = path.relative_to(root).as_posix()
            if folder.name == "tierkv" and inside.split("/")[1] in FOLDERS:
                continue  # through a link
            names.add(inside if folder.name == "tierkv" else f"tierkv/{inside}")
    return names


def wheel_faults(names: list[str], expected: set[str]) -> list[str]:
    """Compare the names in a wheel with those expected; one line for each difference."""
    payload = [name for name in names if ".dist-info/" not in name]
    return [
        *(f"twice: {name}" for name, count in Counter(payload).items() if count > 1),
        *(f"missing: {name}" for name in sorted(expected - set(payload))),
        *(f"not expected: {name}" for name in sorted(set(payload) - expected)),
    ]


def test_the_wheel_holds_each_file_once_under_tierkv(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "tierkv/storage/warm.py" in names
    assert wheel_faults(names, files_expected(ROOT)) == []


def test_a_leak_a_loss_and_a_duplicate_in_a_wheel_are_found() -> None:
    expected = {"tierkv/index/index.py", "tierkv/storage/warm.py"}
    names = ["tierkv/index/index.py", "tierkv/index/index.py", "storage/warm.py", "tierkv-0.1.0.dist-info/METADATA"]
    assert wheel_faults(names, expected) == [
        "twice: tierkv/index/index.py",
        "missing: tierkv/storage/warm.py",
        "not expected: storage/warm.py",
    ]


def test_the_wheel_made_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # the default from Python 3.14 on
        archive.extractall(tmp_path / "source")
    (tmp_path / "out").mkdir()
    second = build("build_wheel", only((tmp_path / "source").iterdir()), tmp_path / "out")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(second) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


SAMPLE = ["test_record.py", "test_metrics.py", "test_layers.py", "test_namespace.py"]
if find_spec("torch"):
    SAMPLE.append("cli/test_shipped_files.py")


def test_the_source_archive_has_documents_and_tests_that_run(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    source = only(path for path in tmp_path.iterdir())
    for name in ("README.md", "CHANGELOG.md", "ARCHITECTURE.md", "docs/daemon.md", "results/bench_cold_cpu.txt"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")]
    assert [path for path in tests if not (source / path).exists()] == []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in SAMPLE)]
    assert " passed" in run(command, cwd=source).splitlines()[-1]


def test_the_wheel_asks_for_the_core_dependencies_only_and_brings_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = only(Path(name).parent for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0].split("<")[0].strip() for line in required} == CORE_DEPENDENCIES
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "tierkv = tierkv.__main__:main" in entry_points


WITH_CUDA = {"gpu", "nvcomp"}  # as README says
OF_CUDA = {"torch", "triton", "flash-attn", "cuda-bindings", "nvidia-libnvcomp-cu13", "vllm", "sglang"}


def test_no_extra_but_two_brings_what_needs_cuda(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = only(Path(name).parent for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    extras: dict[str, set[str]] = {name: set() for name in metadata.get_all("Provides-Extra", [])}
    for line in metadata.get_all("Requires-Dist", []):
        if found := re.match(r"""([\w-]+).*extra == ["'](\w+)["']""", line):
            extras[found[2]].add(found[1].lower())
    assert {name for name, needs in extras.items() if needs & OF_CUDA} == {*WITH_CUDA, "dev"}, (
        "triton of dev has no CUDA"
    )
    assert {"hf", "report", "metrics", "serve", "redis", "objects"} <= {*extras}


WHERE = """
import json, tierkv, tierkv.index.index, tierkv.storage.warm
print(json.dumps([m.__file__ for m in (tierkv, tierkv.index.index, tierkv.storage.warm)] + [tierkv.__version__]))
"""


def where(root: Path, *, cwd: Path, prelude: str = "", python_path: Path | None = None) -> list[str]:
    """Import from elsewhere; return the modules' files relative to `root`, links resolved, and version."""
    flags = ["-S"] if prelude else []
    printed = run([sys.executable, *flags, "-c", prelude + WHERE], cwd=cwd, python_path=python_path)
    *files, version = json.loads(printed)
    return [*(Path(file).resolve().relative_to(root.resolve()).as_posix() for file in files), version]


def test_an_unpacked_wheel_is_imported_as_tierkv(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = where(tmp_path / "site", cwd=tmp_path, python_path=tmp_path / "site")
    assert found == ["tierkv/__init__.py", "tierkv/index/index.py", "tierkv/storage/warm.py", version_of(wheel)]


def test_a_plain_checkout_is_imported_as_tierkv(wheel: Path, tree: Path, tmp_path: Path) -> None:
    found = where(tree, cwd=tmp_path, python_path=tree)
    assert found == ["tierkv/__init__.py", "tierkv/index/index.py", "storage/warm.py", version_of(wheel)]


def test_an_editable_install_is_imported_as_tierkv(wheel: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(build("build_editable", tree, tmp_path / "out")) as archive:
        archive.extractall(tmp_path / "site")
    # First ours, then site-packages without its .pth files: another tierkv may be installed there.
    libraries = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    site = str(tmp_path / "site")
    prelude = f"import site, sys; site.addsitedir({site!r}); sys.path += {libraries!r}"
    found = where(tree, cwd=tmp_path, prelude=prelude)
    assert found == ["tierkv/__init__.py", "tierkv/index/index.py", "storage/warm.py", version_of(wheel)]


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_link_to_a_root_folder_is_a_link(name: str) -> None:
    link = ROOT / "tierkv" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.is_dir(), f"{name}/ is missing: git keeps no empty folder"


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_git_stores_the_links_as_links() -> None:
    lines = run(["git", "ls-files", "--stage", *(f"tierkv/{name}" for name in FOLDERS)], cwd=ROOT).splitlines()
    assert {line.split()[0] for line in lines} <= {"120000"}
    tracked = run(["git", "ls-files", "tierkv/index/index.py"], cwd=ROOT)
    assert len(lines) == (len(FOLDERS) if tracked else 0)
