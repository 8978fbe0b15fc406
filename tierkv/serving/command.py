"""What `tierkv serve` needs of this room, in one import that fails where the extra `serve` is not installed."""

from __future__ import annotations

from tierkv.serving.app import make_app
from tierkv.serving.limits import ServeLimits
from tierkv.serving.server import bind, serve
from tierkv.serving.service import Service

__all__ = ["ServeLimits", "Service", "bind", "make_app", "serve"]
