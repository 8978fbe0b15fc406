"""Tenants of a store: the name of each, its share and its limit of the cold and the warm tier.

A tenant is all namespaces of one salt. It is known by the hex sha256 of its salt, or by "" without a salt. The settings
are rows of the store, so they hold for every process that uses it: a writer reads them in each write transaction.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

import msgspec

from tierkv.errors import CapacityError, ConfigError, CorruptBlockError
from tierkv.storage.cold_descriptions import tenant_of_row
from tierkv.storage.cold_rows import Databases, NamespaceRow, add_checksum, checked_value
from tierkv.storage.lmdb_env import ReadTransaction, WriteTransaction
from tierkv.values.block import BlockHash
from tierkv.values.units import format_bytes

__all__ = [
    "DEFAULT_TENANT",
    "MAX_TENANTS",
    "TENANT_PREFIX",
    "TenantSettings",
    "TenantUsage",
    "check_tenants",
    "load_tenants",
    "pack_tenant",
    "unpack_tenant",
    "write_tenants",
]

TENANT_PREFIX = b"tenant"
DEFAULT_TENANT = "default"
"""Name of the tenant without a salt; no other tenant may have it."""

MAX_TENANTS = 256
_MAX_NAME = 64
_MAX_BYTES = 1 << 62
_SALT_DIGEST_LENGTH = 64


class TenantSettings(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What one tenant may have. Bytes of the cold tier include padding, those of the warm tier are slots.

    cold_share, warm_share: other tenants' blocks never evict the tenant below these, as long as others have more than
    theirs. cold_limit, warm_limit: the tenant never has more, and replaces its own blocks at it; None is no limit.
    """

    name: str
    cold_share: int = 0
    cold_limit: int | None = None
    warm_share: int = 0
    warm_limit: int | None = None

    def check(self, tenant: str) -> None:
        """Raise ConfigError for settings that no store keeps. tenant: hex digest of the salt, or ""."""
        if len(tenant) not in (0, _SALT_DIGEST_LENGTH) or tenant.strip("0123456789abcdef"):
            raise ConfigError("a tenant is known by the hex sha256 of its salt, or by an empty text")
        name = self.name
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or name != name.strip():
            raise ConfigError(f"{name!a} is no name of a tenant: it has 1 to {_MAX_NAME} printable characters")
        if (name == DEFAULT_TENANT) is not (tenant == ""):
            raise ConfigError(f"{DEFAULT_TENANT} is the name of the tenant without a salt, and of no other")
        for tier, share, limit in (
            ("cold", self.cold_share, self.cold_limit),
            ("warm", self.warm_share, self.warm_limit),
        ):
            for number in (share, 0 if limit is None else limit):
                if isinstance(number, bool) or not 0 <= number <= _MAX_BYTES:
                    raise ConfigError(f"{number!r} is no size of a {tier} share or limit")
            if limit is not None and share > limit:
                raise ConfigError(
                    f"{name} has a {tier} share of {format_bytes(share)}, more than its limit of {format_bytes(limit)}"
                )


class TenantUsage:
    """How many bytes each tenant with settings has in the store, within one write transaction.

    Other tenants, and namespaces whose description is lost, are one: None, without a share and a limit.
    """

    def __init__(self, settings: Mapping[str, TenantSettings], rows: Mapping[BlockHash, NamespaceRow]) -> None:
        self.settings = settings
        self._tenants: dict[BlockHash, str] = {}
        self._live: Counter[str] = Counter()
        for digest, row in rows.items() if settings else ():
            self.note(digest, row)

    def tenant_of(self, namespace: BlockHash) -> str | None:
        """Return the tenant of a namespace; None if it has no settings."""
        return self._tenants.get(namespace)

    def note(self, namespace: BlockHash, row: NamespaceRow) -> None:
        """Note the tenant of a namespace, with what it has now."""
        if namespace in self._tenants or not self.settings:
            return
        tenant = tenant_of_row(row, namespace)
        if tenant is not None and tenant in self.settings:
            self._tenants[namespace] = tenant
            self._live[tenant] += row.value_bytes

    def count(self, namespace: BlockHash, value_bytes: int) -> None:
        """Add bytes of a namespace that has been noted, or subtract them."""
        tenant = self._tenants.get(namespace)
        if tenant is not None:
            self._live[tenant] += value_bytes

    def live_bytes(self, tenant: str | None) -> int:
        """Return how much a tenant with settings has; 0 for None."""
        return 0 if tenant is None else self._live[tenant]

    def room(self, tenant: str | None) -> int:
        """Return how many more bytes a tenant may have."""
        limit = None if tenant is None else self.settings[tenant].cold_limit
        return _MAX_BYTES if limit is None or tenant is None else limit - self._live[tenant]

    def is_within_share(self, tenant: str | None, more_bytes: int) -> bool:
        """Return whether a tenant would have at most its share with so many bytes more."""
        return tenant is not None and self._live[tenant] + more_bytes <= self.settings[tenant].cold_share

    def keeps_share(self, tenant: str | None, without: int) -> bool:
        """Return whether a tenant has at least its share after it has lost so many bytes."""
        return tenant is None or self._live[tenant] - without >= self.settings[tenant].cold_share


def load_tenants(txn: ReadTransaction, databases: Databases) -> dict[str, TenantSettings]:
    """Return the settings of all tenants that have any. A damaged row is left out."""
    found: dict[str, TenantSettings] = {}
    with txn.cursor(db=databases.meta) as cursor:
        more = cursor.set_range(TENANT_PREFIX)
        while more and (key := bytes(cursor.key())).startswith(TENANT_PREFIX):
            with contextlib.suppress(CorruptBlockError, UnicodeDecodeError):
                tenant = key[len(TENANT_PREFIX) :].decode("ascii")
                found[tenant] = unpack_tenant(tenant, cursor.value())
            more = cursor.next()
    return found


def write_tenants(
    txn: WriteTransaction,
    databases: Databases,
    changes: Mapping[str, TenantSettings | None],
    quota_bytes: int,
    *,
    may_exceed: bool,
) -> None:
    """Store the settings of tenants, and remove those of tenants with None. Raises as `check_tenants` does.

    Cold shares beyond the quota, which may have been lowered, are refused only where the change makes them larger, and
    not with `may_exceed`.
    """
    old = load_tenants(txn, databases)
    new = {tenant: each for tenant, each in {**old, **changes}.items() if each is not None}
    is_larger = sum(each.cold_share for each in new.values()) > sum(each.cold_share for each in old.values())
    check_tenants(new, quota_bytes if is_larger and not may_exceed else None)
    for tenant, each in changes.items():
        key = TENANT_PREFIX + tenant.encode()
        if each is None:
            txn.delete(key, db=databases.meta)
        else:
            txn.put(key, pack_tenant(each), db=databases.meta)


def check_tenants(settings: Mapping[str, TenantSettings], quota_bytes: int | None) -> None:
    """Raise ConfigError for settings that do not agree, CapacityError if all cold shares exceed the quota, if given."""
    for tenant, each in settings.items():
        each.check(tenant)
    twice = [name for name, count in Counter(each.name for each in settings.values()).items() if count > 1]
    if twice:
        raise ConfigError(f"two tenants have the name {twice[0]}")
    if len(settings) > MAX_TENANTS:
        raise ConfigError(f"a store keeps settings of {MAX_TENANTS} tenants at most")
    total = sum(each.cold_share for each in settings.values())
    if quota_bytes is not None and total > quota_bytes:
        raise CapacityError(
            f"the cold shares of all tenants are {format_bytes(total)}, the quota is {format_bytes(quota_bytes)}",
            hint="tierkv quota SIZE sets another",
        )


def pack_tenant(settings: TenantSettings) -> bytes:
    """Return the settings of a tenant as they are stored."""
    return add_checksum(msgspec.msgpack.encode(settings))


def unpack_tenant(tenant: str, packed: bytes | memoryview) -> TenantSettings:
    """Return the settings of a tenant. Raises CorruptBlockError."""
    try:
        settings = msgspec.msgpack.decode(checked_value(packed), type=TenantSettings)
        settings.check(tenant)
    except (msgspec.MsgspecError, ConfigError, RecursionError) as exc:
        raise CorruptBlockError(f"the settings of a tenant are damaged: {exc}") from exc
    return settings
