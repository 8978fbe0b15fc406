"""What each tenant has of the tiers, and may have, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from tierkv.daemon.messages import ShareStatus

__all__ = ["tenant_lines"]

_FIGURES = {
    "tenant_bytes": "Bytes of a tenant's blocks in a tier.",
    "tenant_share_bytes": "Bytes that other tenants do not take from it.",
    "tenant_limit_bytes": "Bytes that it never exceeds; absent without a limit.",
}


def tenant_lines(shares: list[ShareStatus]) -> Iterator[str]:
    """Yield the lines of all tenants. A tenant is shown by its name, or by the first digits of its id."""
    for figure, text in _FIGURES.items():
        yield f"# HELP tierkv_daemon_{figure} {text}"
        yield f"# TYPE tierkv_daemon_{figure} gauge"
        for each in shares:
            for tier, size, share, limit in (
                ("warm", each.warm_bytes, each.warm_share, each.warm_limit),
                ("cold", each.cold_bytes, each.cold_share, each.cold_limit),
            ):
                value = {"tenant_bytes": size, "tenant_share_bytes": share, "tenant_limit_bytes": limit}[figure]
                if value >= 0:
                    yield f'tierkv_daemon_{figure}{{tenant="{_escaped(each.name)}",tier="{tier}"}} {value}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
