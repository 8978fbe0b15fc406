"""The embedded model: whole or not there, readable by others, made again where it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tierkv.engine import embedded_model
from tierkv.engine.embedded_files import find_embedded_model
from tierkv.engine.embedded_model import ready_embedded_model
from tierkv.engine.models import load_model
from tierkv.engine.token_texts import load_tokenizer
from tierkv.errors import ConfigError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tierkv-files.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache directory in which the model was made under a usual umask."""
    path = tmp_path_factory.mktemp("made")
    before = os.umask(0o022)
    try:
        ready_embedded_model(path / "tierkv")
    finally:
        os.umask(before)
    return path / "tierkv"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    return Path(shutil.copytree(made, tmp_path / "tierkv"))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, made: Path) -> Iterator[list[Path]]:
    """Return the list of directories that the model is written to; it is copied instead of computed."""
    written: list[Path] = []

    def write(path: Path) -> None:
        written.append(path)
        for name in os.listdir(made / "embedded-model-1"):
            if name != "tierkv-files.json":
                shutil.copyfile(made / "embedded-model-1" / name, path / name)

    monkeypatch.setattr(embedded_model, "write_embedded_model", write)
    return written  # type: ignore[return-value]


def test_the_files_are_as_readable_as_the_umask_allows(made: Path) -> None:
    path = ready_embedded_model(made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
    assert sorted(os.listdir(made)) == [path.name]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, remove, make_fifo])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_makes_the_model_anew(
    cache: Path, count: list[Path], name: str, damage: Callable[[Path], None]
) -> None:
    path = ready_embedded_model(cache)
    assert not count and find_embedded_model(cache) == path
    damage(path / name)
    assert find_embedded_model(cache) is None
    assert ready_embedded_model(cache) == path and len(count) == 1
    assert find_embedded_model(cache) == path and os.listdir(cache) == [path.name]


@pytest.mark.parametrize("text", ["[]", "{}", '{"config.json": 3}', '{"config.json": [99999999999, "0"]}', "\0"])
def test_a_manifest_that_says_nothing_of_use_makes_the_model_anew(cache: Path, count: list[Path], text: str) -> None:
    (cache / "embedded-model-1/tierkv-files.json").write_text(text)
    ready_embedded_model(cache)
    assert len(count) == 1


def test_what_stands_in_the_models_place_is_replaced(tmp_path: Path, count: list[Path]) -> None:
    (tmp_path / "embedded-model-1").write_text("a file")
    assert ready_embedded_model(tmp_path).is_dir()
    assert os.listdir(tmp_path) == ["embedded-model-1"]


def test_who_comes_second_uses_the_first_ones(
    made: Path, tmp_path: Path, count: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = embedded_model.write_embedded_model

    def be_late(path: Path) -> None:
        write(path)
        shutil.copytree(made / "embedded-model-1", tmp_path / "embedded-model-1")

    monkeypatch.setattr(embedded_model, "write_embedded_model", be_late)
    renamed: list[object] = []
    monkeypatch.setattr(os, "rename", lambda *places: renamed.append(places))
    path = ready_embedded_model(tmp_path)
    assert os.listdir(tmp_path) == [path.name] and not renamed


def test_a_write_that_fails_leaves_nothing_and_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        (path / "config.json").write_text("{}")
        raise ZeroDivisionError("No space left on device")  # as safetensors has an error of its own

    monkeypatch.setattr(embedded_model, "write_embedded_model", fail)
    with pytest.raises(ConfigError, match=r"neither read nor made.*embedded-model-1.*No space left"):
        ready_embedded_model(tmp_path)
    assert os.listdir(tmp_path) == []


def as_other_user(action: Callable[[], str]) -> str:
    """Return what an action says in a child of another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            said = action()
        except BaseException as exc:  # noqa: BLE001 - the parent looks at it
            said = f"{type(exc).__name__}: {exc}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def open_the_way(path: Path) -> None:
    for parent in (path, *path.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)


def test_another_user_reads_the_model(cache: Path, count: list[Path]) -> None:
    open_the_way(cache)
    assert as_other_user(lambda: str(ready_embedded_model(cache))) == str(cache / "embedded-model-1")


def test_another_user_who_cannot_read_the_model_makes_one_beside_it_or_is_told_the_file(
    made: Path, cache: Path, count: list[Path]
) -> None:
    open_the_way(cache)
    open_the_way(made)
    (cache / "embedded-model-1/model.safetensors").chmod(0o600)
    said = as_other_user(lambda: str(ready_embedded_model(cache)))
    assert said.startswith("ConfigError") and "model.safetensors: Permission denied" in said
    cache.chmod(0o777)
    own = as_other_user(lambda: str(ready_embedded_model(cache)))
    assert own == str(cache / "embedded-model-1-of-54321")
    (cache / "embedded-model-1").chmod(0o700)
    assert as_other_user(lambda: str(find_embedded_model(cache))) == own


def test_the_tokenizer_of_a_missing_or_damaged_model_is_none(cache: Path) -> None:
    assert load_tokenizer("", cache_dir=cache) is not None
    for name in ("a\0b", "\ud800", "x" * 5000, str(cache)):
        assert load_tokenizer(name, cache_dir=cache) is None
    cut(cache / "embedded-model-1/tokenizer.json")
    assert load_tokenizer("embedded", cache_dir=cache) is None
    assert load_tokenizer("embedded", cache_dir=None) is None


def change(**fields: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def remove_all(path: Path) -> None:
    for file in path.parent.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("config.json", cut, "not a valid JSON"),
        ("config.json", lambda path: path.write_text("[]"), "cannot load the model|model_type"),
        ("config.json", change(model_type=3), "model type `3`"),
        ("config.json", change(hidden_size="x"), "hidden_size"),
        ("config.json", change(hidden_size=128), "weights, .* the first, have not the shape"),
        ("config.json", change(num_hidden_layers=7, layer_types=None, max_window_layers=7), "are not in its files"),
        ("config.json", make_fifo, "no config.json|FIFO"),
        ("model.safetensors", cut, "header"),
        ("model.safetensors", remove, "no file named model.safetensors"),
        ("model.safetensors", make_fifo, "model.safetensors is a FIFO"),
        ("tokenizer.json", cut, "cannot load the model"),
        ("tokenizer.json", remove, "tokenizer"),
        ("tokenizer.json", remove_all, "knows no token"),
        ("tokenizer_config.json", lambda path: path.write_text("[]"), "cannot load the model"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(
    cache: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    damage(cache / "embedded-model-1" / name)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_model(str(cache / "embedded-model-1"), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no name"), ("a\0b", "not a path"), ("x" * 5000, "too long"), ("~nobody-of-this-name/x", "there is no user")],
)
def test_a_name_that_no_model_can_have_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_model(name)
