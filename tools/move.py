"""`tierkv move`: a store goes to another directory, such as one on a larger disk."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

from tierkv.daemon.eviction_log import LOG_NAME
from tierkv.daemon.host import STORE_LOCK, read_lock_file
from tierkv.engine.embedded_files import places_of
from tierkv.errors import ConfigError, DaemonError, StoreError
from tierkv.storage.move_store import move_store
from tierkv.tools.options import AsJson, MinFree, as_path, parse_optional_size, spread
from tierkv.tools.stores import StoreOptions, open_existing
from tierkv.tools.terminal import print_json, visible

__all__ = ["move"]

_OWN_FILES = ("lock.mdb", "users.lock", "write.lock", STORE_LOCK, LOG_NAME)


@spread()
def move(
    target: Annotated[Path, typer.Argument(parser=as_path, metavar="DIRECTORY", help="New or empty directory.")],
    where: StoreOptions,
    min_free: MinFree = None,
    as_json: AsJson = False,
) -> None:
    """Move a store to another directory or disk. Every block is read back there before the old file is removed.

    Nothing else may use the store meanwhile: stop its daemon and its engines first.
    """
    if where.find_daemon() is not None:
        raise DaemonError("a daemon's store cannot be moved while it runs", hint="tierkv daemon stop ends it")
    path = where.path.absolute()
    target = target.absolute()
    if target == path or path in target.parents:
        raise ConfigError(f"{target} lies in the store {path}", hint="name another directory")
    if read_lock_file(path / STORE_LOCK)[0]:
        raise DaemonError(f"the store {path} belongs to a daemon", hint="tierkv daemon stop ends it")
    with open_existing(path, read_only=False) as store:
        blocks = move_store(store, target, min_free_bytes=parse_optional_size(min_free))
    left = _clear(path, target)
    if as_json:
        print_json({"blocks": blocks, "store": str(target), "left": [str(each) for each in left]})
        return
    print(visible(f"moved {blocks:,} blocks from {path} to {target}; name it with --store or TIERKV_STORE"))
    if left:
        print(visible(f"these files stay: {', '.join(map(str, left))}"))


def _clear(path: Path, target: Path) -> list[Path]:
    """Remove what belonged to the old store. The log of evictions goes along. Return the files that stay."""
    with contextlib.suppress(OSError, shutil.Error):
        if (path / LOG_NAME).is_file() and not (path / LOG_NAME).is_symlink():
            shutil.copyfile(path / LOG_NAME, target / LOG_NAME)
    names = [*_OWN_FILES, *(each.name for each in path.glob("costs-*.json"))]
    for name in names:
        with contextlib.suppress(OSError):
            (path / name).unlink()
    for model in places_of(path):  # of a user without a home; it is made again
        if not model.is_symlink():
            shutil.rmtree(model, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rmdir()
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise StoreError(f"{path} cannot be looked at: {exc.strerror}") from exc
