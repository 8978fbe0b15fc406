"""Debug lines that say why blocks were not loaded. One place, so that all engines' lines read alike."""

from __future__ import annotations

import logging

from tierkv.storage.outcomes import MissReason

__all__ = ["are_logged", "log_lost", "log_misses", "log_recomputed"]

_log = logging.getLogger(__name__)


def are_logged() -> bool:
    """Return whether misses are logged: where the reason takes a lookup, only then is it looked up."""
    return _log.isEnabledFor(logging.DEBUG)


def log_misses(num_wanted: int, num_found: int, reason: MissReason | None) -> None:
    """Log how many leading blocks were found, and why the next one was not. The caller holds no lock."""
    if num_found < num_wanted:
        why = (reason or MissReason.ABSENT).value
        _log.debug("%d of %d blocks found, the next one is a miss: %s", num_found, num_wanted, why)


def log_lost(reason: MissReason) -> None:
    """Log why a block that was found cannot be loaded. The caller holds no lock."""
    _log.debug("a block that was found is a miss: %s", reason.value)


def log_recomputed(num_blocks: int) -> None:
    """Log that an engine computes blocks that were found, because that was measured to be faster."""
    if num_blocks:
        _log.debug("%d blocks that were found are misses: %s", num_blocks, MissReason.RECOMPUTED.value)
