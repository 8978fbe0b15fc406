"""Daemons for these tests."""

from __future__ import annotations

from daemon_fixtures import short_path, start_daemon

__all__ = ["short_path", "start_daemon"]
