"""The digest of a model's folder: it follows the bytes of the weights, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierkv.errors import ConfigError
from tierkv.integrations.weights import model_folder, settings_digest, weights_digest

FILES = {
    "model-00001-of-00002.safetensors": b"first" * 300_000,
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "config.json": b'{"rope_theta": 10000}',
    "tokenizer.json": b"{}",
}


def folder(root: Path, **changed: bytes | None) -> Path:
    root.mkdir(parents=True)
    for name, content in {**FILES, **changed}.items():
        if content is not None:
            (root / name).write_bytes(content)
    return root


def test_a_copy_of_the_folder_has_the_same_digests(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    assert weights_digest(one) == weights_digest(str(other))
    assert settings_digest(one) == settings_digest(other)
    assert len(weights_digest(one)) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"model-00001-of-00002.safetensors": b"first" * 299_999 + b"fIrst"},
        {"model-00002-of-00002.safetensors": b""},
        {"model-00002-of-00002.safetensors": None},
        {"model-00002-of-00002.safetensors": None, "model-00003-of-00002.safetensors": b"second"},
        {"model.safetensors.index.json": b'{"a": 1}'},
        {"extra.safetensors": b"more"},
    ],
)
def test_other_names_or_bytes_of_weights_are_other_weights(tmp_path: Path, changed: dict[str, bytes | None]) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", **changed)
    assert weights_digest(one) != weights_digest(other)
    assert settings_digest(one) == settings_digest(other)


@pytest.mark.parametrize(
    "changed",
    [{"config.json": b'{"rope_theta": 10001}'}, {"quantize_config.json": b"{}"}, {"modeling_own.py": b"pass"}],
)
def test_other_settings_are_another_model_with_equal_weights(tmp_path: Path, changed: dict[str, bytes | None]) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", **changed)
    assert weights_digest(one) == weights_digest(other)
    assert settings_digest(one) != settings_digest(other)


def test_the_tokenizer_and_the_kind_of_a_file_do_not_matter(tmp_path: Path) -> None:
    one = folder(tmp_path / "one")
    other = folder(tmp_path / "other", **{"tokenizer.json": b"other", "model-00002-of-00002.safetensors": None})
    (tmp_path / "blob").write_bytes(b"second")
    (other / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "blob")
    assert weights_digest(one) == weights_digest(other)
    assert settings_digest(one) == settings_digest(other)


def test_what_has_no_digest_is_refused_with_a_hint(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors file.*weights="):
        weights_digest(empty)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        settings_digest(empty)
    with pytest.raises(ConfigError, match="not a folder"):
        weights_digest(tmp_path / "nowhere")
    broken = folder(tmp_path / "broken")
    (broken / "zz.safetensors").symlink_to(tmp_path / "nowhere")
    assert weights_digest(broken) == weights_digest(folder(tmp_path / "other"))  # not a file: an engine cannot read it


def test_a_folder_is_found_by_its_path_and_an_unknown_name_is_refused(tmp_path: Path) -> None:
    assert model_folder(folder(tmp_path / "one")) == tmp_path / "one"
    with pytest.raises(ConfigError, match="no-owner/no-model is not known"):
        model_folder("no-owner/no-model")
