"""The README's examples run as they stand, the first one on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_example_of_an_engine_finds_its_whole_blocks_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("0", "768"):
        exec(compile(examples()[1], "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() == expected


def test_the_library_example_runs_twice_and_hits_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    example = examples()[0].replace('"path/to/model"', "None")
    for expected in ("0.0", "0.875"):  # 7 whole blocks of 8; the last is partly filled and was not stored
        exec(compile(example, "README.md", "exec"), {})
        hit_rate = capsys.readouterr().out.strip().splitlines()[-1]
        assert hit_rate == expected
    assert (tmp_path / "state.tkv").stat().st_size > 1_000_000


def test_the_example_of_transfers_gets_its_bytes_back(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [each for each in examples() if "MemoryTransferManager" in each]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "cpu\nTrue True\n"
