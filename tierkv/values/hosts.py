"""Names under which a server on this machine may be asked."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["is_local_host"]


def is_local_host(host: str) -> bool:
    """Return whether a Host header names this machine, or an address: no name that can be registered.

    A page of another site could make its own name lead to this machine, and so read answers of its servers.

    >>> is_local_host("localhost:9464"), is_local_host("[::1]:80"), is_local_host("metrics.example:9464")
    (True, True, False)
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
