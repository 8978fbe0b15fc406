"""What `tierkv daemon status` says of the core: its tables, and how much of each limit is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tierkv.daemon.core import Core
from tierkv.daemon.messages import LimitStatus, ShareStatus, TenantStatus
from tierkv.storage.cold_tenants import DEFAULT_TENANT, TenantSettings

__all__ = ["limit_status", "share_statuses", "tenant_statuses", "usage_of"]

_SHOWN_DIGITS = 8  # of the id of a tenant without a name


def tenant_statuses(core: Core) -> list[TenantStatus]:
    """Return what each namespace has in the warm tier."""
    return [
        TenantStatus(
            namespace=tenant.digest.hex(),
            name=tenant.name,
            block_bytes=tenant.layout.block_bytes,
            warm_blocks=tenant.warm_blocks,
            pinned_bytes=tenant.pinned_bytes,
            clients=tenant.clients,
            owner=tenant.owner,
        )
        for tenant in core.tenants.by_digest.values()
    ]


def share_statuses(core: Core, cold_bytes: Mapping[str | None, int]) -> list[ShareStatus]:
    """Return what each tenant has and may have; none without settings, clients and blocks.

    cold_bytes: of each tenant in the store; None: of lost descriptions.
    """
    shares = core.tenants.shares
    owners = {each.owner for each in core.tenants.by_digest.values() if each.clients or each.warm_blocks}
    owners |= {each for each, num_bytes in cold_bytes.items() if each is not None and num_bytes}
    found: list[ShareStatus] = []
    for owner in sorted(owners | shares.settings.keys()):
        settings = shares.settings.get(owner) or TenantSettings(name=owner[:_SHOWN_DIGITS] or DEFAULT_TENANT)
        found.append(
            ShareStatus(
                owner=owner,
                name=settings.name,
                warm_bytes=shares.used_bytes(owner),
                warm_share=settings.warm_share,
                warm_limit=-1 if settings.warm_limit is None else settings.warm_limit,
                cold_bytes=cold_bytes.get(owner, 0),
                cold_share=settings.cold_share,
                cold_limit=-1 if settings.cold_limit is None else settings.cold_limit,
            )
        )
    return found


def usage_of(core: Core) -> list[LimitStatus]:
    """Return how much is used of each limit that the core checks."""
    limits, clients, tenants = core.limits, core.connections, core.tenants.by_digest.values()
    sizes = [each.num_slots for each in core.slab.classes.values()]
    largest_size = max(sizes, default=0)
    pinned = Counter[str]()
    for tenant in tenants:
        pinned[tenant.owner] += tenant.pinned_bytes
    return [
        limit_status(
            "leases",
            limits.leases,
            (each.num_leases for each in clients),
            max(1, int(largest_size * limits.lease_share_of_client)),
        ),
        limit_status(
            "reservations",
            sum(max(1, int(size * limits.reservation_share)) for size in sizes),
            (len(each.reservations) for each in clients),
            max(1, int(largest_size * limits.reservation_share_of_client)),
        ),
        limit_status(
            "cursors",
            limits.cursors_of_client * limits.connections,
            (len(each.cursors) for each in clients),
            limits.cursors_of_client,
        ),
        limit_status(
            "cursor_bytes", limits.cursor_bytes, (each.cursor_bytes for each in clients), limits.cursor_bytes_of_client
        ),
        limit_status(
            "claimed_blocks",
            limits.claimed_blocks,
            (each.num_claimed for each in clients),
            limits.claimed_blocks_of_client,
        ),
        limit_status("namespaces", limits.namespaces, (1 for _ in tenants)),
        limit_status("description_bytes", limits.description_bytes, (len(each.description) for each in tenants)),
        limit_status("block_sizes", limits.block_sizes, (1 for _ in sizes)),
        limit_status("slots", limits.slots, sizes, limits.slots_of_block_size),
        limit_status("pinned_bytes", core.pins.quota_of_all_bytes, pinned.values(), core.pins.quota_bytes),
    ]


def limit_status(
    name: str, limit: int, held: Iterable[int], limit_of_one: int = 0, *, used: int | None = None
) -> LimitStatus:
    """Return the status of one limit. held: what each holder has. limit_of_one: 0 for none.

    used: the sum, if other holders have more.
    """
    each = list(held)
    largest = max(each, default=0) if limit_of_one else 0
    used = sum(each) if used is None else used
    return LimitStatus(name=name, used=used, limit=limit, largest=largest, limit_of_one=limit_of_one)
