"""Users and groups of the system by name and by number."""

from __future__ import annotations

import contextlib
import grp
import pwd

from tierkv.errors import ConfigError

__all__ = ["group_id", "group_name", "user_id", "user_name"]


def group_id(text: str) -> int:
    """Return the id of a group by its name or number. Raises ConfigError."""
    with contextlib.suppress(KeyError):
        return grp.getgrnam(text).gr_gid
    if text.isascii() and text.isdigit() and int(text) < 1 << 32:
        return int(text)
    raise ConfigError(f"there is no group {text}")


def user_id(user: object) -> int:
    """Return the id of a user by name or number. Raises ConfigError."""
    if not isinstance(user, str | int) or isinstance(user, bool):
        raise ConfigError(f"a user is a name or a number, not {user!r}")
    text = str(user)
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(text).pw_uid
    if text.isascii() and text.isdigit() and int(text) < 1 << 32:
        return int(text)
    raise ConfigError(f"there is no user {text}")


def user_name(uid: int) -> str:
    """Return the name of a user; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def group_name(gid: int) -> str:
    """Return the name of a group; the number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return str(gid)
