"""The user's daemon, if one runs at the default place: commands use it without an option."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tierkv.daemon.client import DaemonClient
from tierkv.errors import ConfigError, DaemonError, DaemonGoneError
from tierkv.tools.options import default_socket
from tierkv.tools.terminal import note

__all__ = ["require_one", "running_daemon"]

_ANSWER_S = 1.0  # a daemon that takes longer is not used: the command must not wait for one that hangs


def running_daemon(store: Path, *, unless: Sequence[str] = ()) -> Path | None:
    """Return the socket of the user's daemon if one answers at the default place and keeps this store; else None.

    unless: options of the command that only its own tiers obey; with one of them the daemon is not used. One line on
    standard error says whether a daemon that runs is used, and why not. Takes a second at most; raises nothing.
    """
    try:
        path = default_socket(os.environ)
    except ConfigError:  # no home directory: no default place
        return None
    if not os.path.lexists(path):
        return None
    try:
        with DaemonClient(path, timeout_s=_ANSWER_S, connect_s=_ANSWER_S) as client:
            kept = client.welcome.store if client.welcome.has_cold else None
    except DaemonError as exc:
        cause = exc.__cause__
        if not (isinstance(exc, DaemonGoneError) and isinstance(cause, ConnectionRefusedError | FileNotFoundError)):
            note(f"{exc.args[0]}; no daemon is used (--no-daemon does not look for one)")
        return None  # a dead daemon's socket is no daemon
    if kept is None:
        note(f"the daemon at {path} keeps nothing on disk, and is not used (--socket {path} uses it)")
    elif os.path.realpath(kept) != os.path.realpath(store):
        note(f"the daemon at {path} has another store, {kept}, and is not used (--socket {path} uses it)")
    elif unless:
        note(f"the daemon at {path} is not used: {', '.join(unless)} is for tiers of this process's own")
    else:
        note(f"using the daemon at {path} (--no-daemon does not)")
        return path
    return None


def require_one(socket: Path | None, *, no_daemon: bool) -> None:
    """Raise ConfigError where a daemon's socket is named and no daemon is to be used."""
    if socket and no_daemon:
        raise ConfigError("name a daemon's socket or --no-daemon, not both")
