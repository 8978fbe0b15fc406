"""What every test gets: no network, no GPU where there is none, no files outside its own folders."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a test forks a process
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, and attention imports one

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the machines with GPUs need not have it
    pass
else:
    settings.register_profile("tierkv", deadline=None, print_blob=True)
    settings.load_profile("tierkv")


ROOT = Path(__file__).resolve().parent.parent
for _folder in ("storage", "kernels", "tools", "examples"):  # a source archive has no symbolic links
    if not (ROOT / "tierkv" / _folder).exists() and (ROOT / _folder).is_dir():
        (ROOT / "tierkv" / _folder).symlink_to(f"../{_folder}")


class _NoTorch:
    """Skips what imports torch where there is none: the control plane and the commands work without it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            pytest.skip("needs torch", allow_module_level=True)


if importlib.util.find_spec("torch") is None:
    sys.meta_path.insert(0, _NoTorch())  # type: ignore[arg-type]

GPU_FOLDER = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/gpu, and skip what is marked where there is no CUDA device."""
    for item in items:
        if item.path.is_relative_to(GPU_FOLDER):
            item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where a test wants it: it takes a second or two

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _forced_attention() -> Iterator[None]:
    """Force the attention backend that TIERKV_TEST_ATTENTION names."""
    if not os.environ.get("TIERKV_TEST_ATTENTION"):
        yield
        return
    from forced_attention import FORCED, force_attention  # it loads torch

    with pytest.MonkeyPatch.context() as patch:
        force_attention(patch, FORCED)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the default store out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
