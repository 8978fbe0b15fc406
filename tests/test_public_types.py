"""The wheel's types are complete: a type checker that reads tierkv as a library knows almost every symbol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.97
"""Share of the exported symbols whose type must be known, by `pyright --verifytypes --ignoreexternal`."""

pytest.importorskip("basedpyright", reason="of the extra dev; it carries pyright, and its node comes as a wheel")


def verified(package: Path) -> dict[str, object]:
    """Return pyright's report on a package with py.typed, as it lies in site-packages."""
    process = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "tierkv", "--ignoreexternal", "--outputjson"],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,  # 1 where any symbol is not complete
    )
    report: dict[str, object] = json.loads(process.stdout)["typeCompleteness"]
    return report


def problems_of(report: dict[str, object]) -> list[str]:
    """List what is missing, each place once."""
    return sorted(
        {
            f"{Path(each['file']).name}:{each['range']['start']['line'] + 1} {' '.join(each['message'].split())}"
            for symbol in report["symbols"]  # type: ignore[attr-defined]
            if symbol["isExported"]
            for each in symbol["diagnostics"]
            if each["severity"] == "error" and "range" in each
        }
    )


def site_with_tierkv(site: Path) -> Path:
    """Make a site-packages with tierkv as its wheel has it, and links to all other packages; return tierkv's folder."""
    site.mkdir()
    # Copied through the links: storage, kernels and tools are folders of the package.
    shutil.copytree(ROOT / "tierkv", site / "tierkv", ignore=shutil.ignore_patterns("__pycache__"))
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(packages).iterdir():
            if "tierkv" not in path.name and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return site / "tierkv"


def test_almost_every_exported_symbol_has_a_known_type(tmp_path: Path) -> None:
    report = verified(site_with_tierkv(tmp_path / "site"))
    score = report["completenessScore"]
    assert isinstance(score, float)
    assert score >= LEAST, f"{score:.1%} of the symbols are known:\n" + "\n".join(problems_of(report))
