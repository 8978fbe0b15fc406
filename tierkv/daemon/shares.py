"""Shares and limits of tenants (salts) in the warm tier; the store keeps the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from tierkv.daemon.size_class import SizeClass
from tierkv.daemon.values import Tenant
from tierkv.storage.cold_tenants import TenantSettings

__all__ = ["WarmShares"]


class WarmShares:
    """Gives tenants slots. Blocks of owners with more than their share are evicted first.

    An owner at its limit gets slots of its own blocks only. An owner without a share never takes a block within the
    share of another; an owner within its own share does, where nothing else can be evicted.
    all_tenants: returns all namespaces. tenant_of: returns the namespace of a slot.
    """

    def __init__(
        self,
        all_tenants: Callable[[], Iterable[Tenant]],
        tenant_of: Callable[[SizeClass, int], Tenant | None],
    ) -> None:
        self.settings: Mapping[str, TenantSettings] = {}
        self._all = all_tenants
        self._tenant_of = tenant_of

    def used_bytes(self, owner: str) -> int:
        """Return how many bytes of slots an owner's blocks have, those that are being filled included."""
        return sum(
            (each.warm_blocks + each.num_awaited) * each.size_class.stride_bytes
            for each in self._all()
            if each.owner == owner
        )

    def take(self, tenant: Tenant, count: int, *, num_taken: int = 0) -> list[int]:
        """Return up to `count` slots for a namespace, each pinned once. num_taken: beside those taken just before."""
        size_class = tenant.size_class
        settings = self.settings.get(tenant.owner)
        if settings is not None and settings.warm_limit is not None:
            count = self._room(tenant, count, settings.warm_limit - num_taken * size_class.stride_bytes)
        if count <= 0:
            return []
        if not any(each.warm_share for each in self.settings.values()):
            return size_class.take(count)
        more_bytes = (count + num_taken) * size_class.stride_bytes
        slots = size_class.take(count, lambda: self._above_share(size_class, {tenant.owner: more_bytes}))
        within_share = settings is not None and self.used_bytes(tenant.owner) + more_bytes <= settings.warm_share
        if len(slots) < count and within_share:
            slots += size_class.take(count - len(slots))
        return slots

    def trim(self, size_classes: Iterable[SizeClass]) -> int:
        """Evict a few blocks ahead of need, and what is beyond a limit. Return how many blocks were evicted."""
        evicted = 0
        for owner, settings in self.settings.items():
            if settings.warm_limit is not None and (excess := self.used_bytes(owner) - settings.warm_limit) > 0:
                evicted += self._evict_own(owner, excess, self._classes_of(owner))[1]
        has_shares = any(each.warm_share for each in self.settings.values())
        for size_class in size_classes:
            evicted += size_class.trim(self._chooser(size_class) if has_shares else None)
        return evicted

    def may_lose(self, size_class: SizeClass, slots: Sequence[int]) -> bool:
        """Return whether the blocks in these slots can go, without an owner falling below its share."""
        is_chosen = self._above_share(size_class, {})
        return all(map(is_chosen, slots))

    def _chooser(self, size_class: SizeClass) -> Callable[[], Callable[[int], bool]]:
        return lambda: self._above_share(size_class, {})

    def _above_share(self, size_class: SizeClass, incoming: Mapping[str, int]) -> Callable[[int], bool]:
        """Return a function that says whether a slot's block may go, if all that it chose before have gone.

        incoming: bytes that owners will get, which count as theirs already.
        """
        above = {
            owner: self.used_bytes(owner) + incoming.get(owner, 0) - each.warm_share
            for owner, each in self.settings.items()
            if each.warm_share
        }
        stride = size_class.stride_bytes

        def is_chosen(slot: int) -> bool:
            tenant = self._tenant_of(size_class, slot)
            if tenant is None or tenant.owner not in above:
                return True
            if above[tenant.owner] < stride:
                return False
            above[tenant.owner] -= stride
            return True

        return is_chosen

    def _room(self, tenant: Tenant, count: int, limit: int) -> int:
        """Evict blocks of an owner so that `count` more stay within its limit. Return how many more do."""
        stride = tenant.size_class.stride_bytes
        excess = self.used_bytes(tenant.owner) + count * stride - limit
        if excess > 0:
            others = [each for each in self._classes_of(tenant.owner) if each is not tenant.size_class]
            excess = self._evict_own(tenant.owner, excess, [tenant.size_class, *others])[0]
        return count + -excess // stride if excess > 0 else count

    def _evict_own(self, owner: str, excess: int, size_classes: Iterable[SizeClass]) -> tuple[int, int]:
        """Evict blocks of an owner. Return how many bytes of the excess stay, and how many blocks were evicted."""
        evicted = 0
        for size_class in size_classes:
            if excess <= 0:
                break

            def is_own(slot: int, size_class: SizeClass = size_class) -> bool:
                tenant = self._tenant_of(size_class, slot)
                return tenant is not None and tenant.owner == owner

            count = size_class.evict_some(-(-excess // size_class.stride_bytes), partial(_same, is_own))
            excess -= count * size_class.stride_bytes
            evicted += count
        return excess, evicted

    def _classes_of(self, owner: str) -> list[SizeClass]:
        return list({each.size_class: None for each in self._all() if each.owner == owner})


def _same(is_chosen: Callable[[int], bool]) -> Callable[[int], bool]:
    return is_chosen
