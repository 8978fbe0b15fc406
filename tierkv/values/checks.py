"""Checks of a caller's arguments, with errors that name the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real

from tierkv.errors import ConfigError

__all__ = ["check_count", "check_flag", "check_seconds", "check_share"]

_MOST_NUMBER = 1 << 62
_MOST_SECONDS = 1e9
"""30 years; the system's calls accept more."""


def check_seconds(name: str, value: object, *, may_be_zero: bool = True) -> float:
    """Return a time in seconds. Raises ConfigError unless it is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number of seconds, got {value!r}")
    seconds = float(value)
    if not math.isfinite(seconds) or seconds > _MOST_SECONDS:
        raise ConfigError(f"{name} must be a finite number of seconds, at most {_MOST_SECONDS:.0e}, got {value!r}")
    if seconds < 0 or (seconds == 0 and not may_be_zero):
        raise ConfigError(f"{name} must {'not be negative' if may_be_zero else 'be positive'}, got {value!r}")
    return seconds


def check_count(name: str, value: object, *, least: int | None = 0, hint: str | None = None) -> int:
    """Return a whole number. Raises ConfigError for any other value, a bool included, and for one out of bounds.

    least: the smallest number allowed; None for no bound. A number may have at most 62 bits.
    """
    if type(value) is int and -_MOST_NUMBER < value < _MOST_NUMBER and (least is None or value >= least):
        return value  # the fast path
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be a whole number, got {value!r}", hint=hint)
    number = int(value)
    if abs(number) >= _MOST_NUMBER:
        raise ConfigError(f"{name} is too large: {number}")
    if least is not None and number < least:
        rule = {0: "not be negative", 1: "be positive"}.get(least, f"be at least {least}")
        raise ConfigError(f"{name} must {rule}, got {number}")
    return number


def check_share(name: str, value: object, *, may_be_one: bool = True) -> float:
    """Return a share above 0, up to 1. Raises ConfigError for any other value, nan and a bool included."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (0 < value <= 1 if may_be_one else 0 < value < 1):  # type: ignore[operator]
        rule = "lie above 0 and be at most 1" if may_be_one else "lie between 0 and 1"
        raise ConfigError(f"{name} must {rule}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_flag(name: str, value: object) -> bool:
    """Return a bool. Raises ConfigError for any other value: the text "no" is true in Python."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value
