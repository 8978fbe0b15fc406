"""The identity of a model that lies in a folder: digests of its weights and of the files that say how to run them.

An engine gives a cache the model's path, and a path says nothing about bytes. `python -m tierkv.integrations.weights
FOLDER` prints the weights digest, so that it is computed once and then given to every engine as the option `weights`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tierkv.errors import ConfigError

__all__ = ["model_folder", "settings_digest", "weights_digest"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # the index decides which file a tensor is read from
_SETTINGS = (
    *("config.json", "params.json", "hf_quant_config.json", "quantize_config.json", "quantization_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "*.py"),
)
_THREADS = 4
_HINT = "give the option weights=: a digest or revision that changes whenever the weights do"


def weights_digest(folder: str | Path) -> str:
    """Return sha256, in hex, over the names and bytes of the safetensors files in a model's folder.

    The folder's path, times and other files do not matter, nor does a file that is a symbolic link. Reads all weights
    once, several files at a time. Raises ConfigError if there are none or a file cannot be read.
    """
    path = Path(folder)
    files = _matching(path, _WEIGHTS)
    if not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError(f"{path} has no *.safetensors file, so its weights have no digest", hint=_HINT)
    return _digest(files)


def settings_digest(folder: str | Path) -> str:
    """Return sha256, in hex, over the files that decide how a model's weights are run: configuration and own code.

    Not over the tokenizer: the keys of a cache are token ids. Raises ConfigError if a file cannot be read, or if there
    is no config.json or params.json.
    """
    files = _matching(Path(folder), _SETTINGS)
    if not {"config.json", "params.json"} & {file.name for file in files}:
        raise ConfigError(f"{folder} has no config.json, so the model's configuration has no digest")
    return _digest(files)


def model_folder(name: str | Path, revision: str | None = None, *, cache: str | Path | None = None) -> Path:
    """Return the folder of a model that is named by a path or by its name on the Hugging Face Hub.

    A name is looked up in the local cache of the Hub only; nothing is downloaded. cache: the folder of that cache, if
    it is not the usual one. Raises ConfigError if there is no such folder.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), revision=revision, cache_dir=cache, local_files_only=True))
    except (ImportError, OSError, ValueError) as exc:  # the Hub's own errors are OSError and ValueError
        raise ConfigError(f"the folder of the model {name} is not known", hint=_HINT) from exc


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", hint=_HINT)
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(found, key=lambda file: file.name)


def _digest(files: Sequence[Path]) -> str:
    """Hash each file on its own, so that several are read at a time, then the list of names and digests."""
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            digests = list(threads.map(_file_digest, files))
    except OSError as exc:
        raise ConfigError(f"a file of the model cannot be read: {exc}", hint=_HINT) from exc
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        name = file.name.encode(errors="surrogateescape")
        whole.update(len(name).to_bytes(4, "little") + name + digest)
    return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    memory = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(memory):
            digest.update(memory[:count])
    return digest.digest()


if __name__ == "__main__":
    sys.stdout.write(weights_digest(model_folder(sys.argv[1])) + "\n")
