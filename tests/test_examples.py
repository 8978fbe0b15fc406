"""The examples in the docstrings of the most used public names run, each by itself, beside one small open cache."""

from __future__ import annotations

import doctest
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tierkv
from tierkv import BlockLayout, CacheConfig, Namespace, TierCache

NAMES = [name for name in tierkv.__all__ if ">>>" in (inspect.getdoc(getattr(tierkv, name)) or "")]
NEED_A_MODEL = {"load_model", "open_runner", "Engine", "TokenStream"}

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
NAMESPACE = Namespace(weights="a digest", layout=LAYOUT)
TOKEN_IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What an example may use without making it: all public names, and a cache with two blocks of `token_ids`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = CacheConfig(cold_path=tmp_path / "cold", block_size=4, hot_bytes=1 << 20, warm_bytes=1 << 20)
    with TierCache(config, namespace=NAMESPACE) as cache:
        sequence = cache.acquire(TOKEN_IDS)
        cache.commit(sequence, sequence.num_tokens)
        cache.release(sequence)
        cache.flush()
        yield {
            **{name: getattr(tierkv, name) for name in tierkv.__all__},
            "torch": torch,
            "Path": Path,
            "cache": cache,
            "token_ids": TOKEN_IDS,
            "namespace": NAMESPACE,
            "config": CacheConfig(cold_path="store", block_size=4, hot_bytes=1 << 20, warm_bytes=1 << 20),
        }


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_docstring_runs(name: str, names: dict[str, object]) -> None:
    if name in NEED_A_MODEL:
        pytest.importorskip("transformers")
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(names[name]) or "", names, name, None, 0)
    out: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=out.append, clear_globs=False)
    assert not failed, "".join(out)


def test_at_least_twenty_public_names_have_an_example() -> None:
    assert len(NAMES) >= 20
    assert {"TierCache", "CacheConfig", "open_runner", "load_model", "Sequence", "Match"} <= set(NAMES)


def test_an_example_that_prints_something_else_is_found() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: os.fspath(text)).failed == 1
