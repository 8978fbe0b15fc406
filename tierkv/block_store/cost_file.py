"""CostFile: keeps what loading and computing took beside the store, so that the next process need not measure it.

Without it the first request after a restart would load, however slow that is. The file is a hint: a missing, damaged or
foreign one costs measuring again, never an answer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path

from tierkv.block_store.load_or_compute import LoadOrCompute
from tierkv.errors import TierKVError
from tierkv.values.files import open_regular

__all__ = ["CostFile", "cost_path", "restore_costs"]

_log = logging.getLogger(__name__)

_MAX_BYTES = 64 << 10
_MAX_FILES = 64  # beside one store, of one namespace each
_SAVE_S = 30.0
_STALL_S = 5.0  # at the end, how long a disk may take for so small a file


def cost_path(folder: Path, name: str) -> Path:
    """Return the path of the cost file with this name beside a store."""
    return folder / f"costs-{name}.json"


def restore_costs(path: Path, costs: LoadOrCompute) -> None:
    """Record the costs in a file. Raises nothing: of a file that cannot be read, or is none of costs, nothing is taken.

    A FIFO in its place is not waited for, and at most 64 KiB are read.
    """
    try:
        fd = open_regular(path, follow_links=False)
        with os.fdopen(fd, "rb") as file:
            text = file.read(_MAX_BYTES)
        costs.restore(json.loads(text))
    except FileNotFoundError:
        pass
    except (OSError, TierKVError, ValueError, RecursionError) as exc:
        _log.info("the costs in %s are measured again: %s", path, exc)


class CostFile:
    """One process's costs of one namespace beside a store. A thread of its own saves them, since a disk may hang.

    folder: of the store. name: of the namespace, and of the process where another one of the engine has the same
    namespace: a file has one writer in an engine. is_kept: False only reads. save_s: how often changes are saved; the
    first costs of a kind are saved at once, because other processes may wait for them.
    """

    def __init__(
        self, folder: Path, name: str, costs: LoadOrCompute, *, is_kept: bool = True, save_s: float = _SAVE_S
    ) -> None:
        self._folder = folder
        self._path = cost_path(folder, name)
        self._costs = costs
        self._save_s = save_s
        self._has_ended = threading.Event()
        self._is_due = threading.Event()
        restore_costs(self._path, costs)
        self._saved = costs.measured()
        self._thread: threading.Thread | None = None
        if is_kept:
            costs.observe(self._is_due.set)
            self._thread = threading.Thread(target=self._keep, name="tierkv-costs", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Save what was measured. May be called twice. A disk that hangs keeps the thread, which holds nothing else."""
        self._has_ended.set()
        self._is_due.set()
        if self._thread:
            self._thread.join(_STALL_S)

    def _keep(self) -> None:
        while not self._has_ended.is_set():
            self._is_due.wait(self._save_s)
            self._is_due.clear()
            self._save()
        self._save()

    def _save(self) -> None:
        measured = self._costs.measured()
        if measured == self._saved:
            return
        draft = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            fd = open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follow_links=False)
            with os.fdopen(fd, "w") as file:
                json.dump(measured, file)
            draft.replace(self._path)
            self._saved = measured
            self._remove_old()
        except (OSError, TierKVError) as exc:
            _log.debug("the costs are not kept in %s: %s", self._path, exc)
            with contextlib.suppress(OSError):
                draft.unlink()

    def _remove_old(self) -> None:
        """Remove the files of the namespaces that were measured least recently."""
        files = sorted(self._folder.glob("costs-*.json"), key=lambda path: path.lstat().st_mtime)
        for path in files[:-_MAX_FILES]:
            path.unlink()
