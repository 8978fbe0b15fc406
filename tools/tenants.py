"""The tenants of a store by name, and `tierkv tenant list | set | remove`: their shares and limits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from tierkv.errors import ConfigError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_reader import StoredNamespace
from tierkv.storage.cold_tenants import DEFAULT_TENANT, TenantSettings
from tierkv.tools.options import AsJson, parse_optional_size, spread
from tierkv.tools.stores import StoreOptions, open_existing
from tierkv.tools.terminal import close_table, open_console, print_json, visible
from tierkv.values.units import format_bytes

__all__ = ["TenantNames", "group", "id_of_salt", "tier_row", "tier_table"]

_SHOWN_DIGITS = 8
_LEAST_DIGITS = 4  # of an id that a user types
_UNKNOWN = "unknown"


def id_of_salt(salt: str) -> str:
    """Return the id of the tenant with a salt: the hex sha256 of it, or "" without a salt."""
    return hashlib.sha256(salt.encode(errors="surrogatepass")).hexdigest() if salt else ""


@dataclass(frozen=True, slots=True)
class TenantNames:
    """Names of tenants. settings: by id. ids: of all tenants that have a namespace."""

    settings: Mapping[str, TenantSettings]
    ids: frozenset[str]

    @classmethod
    def of(cls, store: ColdStore, others: Iterable[str] = ()) -> TenantNames:
        """Return the names of a store's tenants. others: ids of further ones, as a daemon has them in memory."""
        settings = store.tenants()
        found = {each.tenant for each in store.namespaces() if each.tenant is not None}
        return cls(settings, frozenset({*found, *others, *settings}))

    def name_of(self, tenant: str | None) -> str:
        """Return the name of a tenant; the first digits of its id where it has none."""
        if tenant is None:
            return _UNKNOWN
        known = self.settings.get(tenant)
        return known.name if known else tenant[:_SHOWN_DIGITS] or DEFAULT_TENANT

    def find(self, text: str) -> str:
        """Return the id of the tenant with this name, these leading digits of its id, or this salt.

        Raises ConfigError that lists the tenants where none or several fit.
        """
        by_name = {each.name: tenant for tenant, each in self.settings.items()}
        if text in by_name:
            return by_name[text]
        if text == DEFAULT_TENANT:
            return ""
        fitting = [each for each in self.ids if len(text) >= _LEAST_DIGITS and each.startswith(text.lower())]
        fitting = fitting or [each for each in self.ids if each and each == id_of_salt(text)]
        if len(fitting) == 1:
            return fitting[0]
        listed = ", ".join(sorted(map(self.name_of, self.ids)))
        which = f"{len(fitting)} tenants begin with {text}" if fitting else f"there is no tenant {text}"
        raise ConfigError(f"{which}; there are: {listed or 'none'}")


@spread()
def list_tenants(where: StoreOptions, as_json: AsJson = False) -> None:
    """List the tenants of a store: what each has, and may have."""
    with open_existing(where.path) as store:
        names = TenantNames.of(store)
        namespaces = store.namespaces()
    rows = [_row(names, tenant, namespaces) for tenant in sorted(names.ids, key=names.name_of)]
    rows = [row for row in rows if row["blocks"] or row["id"] in names.settings]  # the others have left the store
    if any(each.tenant is None and each.blocks for each in namespaces):
        rows.append(_row(names, None, namespaces))
    if as_json:
        print_json({"tenants": rows})
        return
    table = tier_table("blocks")
    for row in rows:
        cold = tier_row(row["name"], "cold", row["bytes_live"], row["cold_share"], row["cold_limit"])
        table.add_row(*cold, f"{row['blocks']:,}")
        if row["warm_share"] or row["warm_limit"] is not None:
            table.add_row(*tier_row("", "warm", None, row["warm_share"], row["warm_limit"]))
    open_console().print(table)


@spread()
def set_tenant(
    name: Annotated[str, typer.Argument(help="The tenant's name; default is the one without a salt.")],
    where: StoreOptions,
    salt: Annotated[
        str | None, typer.Option(help="The tenant's salt, for a new name. Only its sha256 is stored.")
    ] = None,
    tenant_id: Annotated[
        str | None, typer.Option("--id", help="Leading digits of its id, as tenant list shows it, instead of the salt.")
    ] = None,
    cold_share: Annotated[
        str | None, typer.Option(help="Bytes on disk that other tenants do not take from it, as 20G or 0.")
    ] = None,
    cold_limit: Annotated[
        str | None, typer.Option(help="Bytes on disk that it never exceeds, as 40G, or none.")
    ] = None,
    warm_share: Annotated[str | None, typer.Option(help="As --cold-share, of a daemon's warm tier.")] = None,
    warm_limit: Annotated[str | None, typer.Option(help="As --cold-limit, of a daemon's warm tier.")] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Evict what exceeds a new limit on disk.")] = False,
    as_json: AsJson = False,
) -> None:
    """Name a tenant, and set its share and its limit of each tier, for every process that uses the store.

    Options that are left out stay as they are.
    """
    with open_existing(where.path, read_only=False) as store:
        tenant = _tenant_named(TenantNames.of(store), name, salt, tenant_id)
        old = store.tenants().get(tenant, TenantSettings(name=name))
        settings = TenantSettings(
            name=name,
            cold_share=_changed(cold_share, old.cold_share) or 0,
            cold_limit=_changed(cold_limit, old.cold_limit),
            warm_share=_changed(warm_share, old.warm_share) or 0,
            warm_limit=_changed(warm_limit, old.warm_limit),
        )
        report = store.set_tenants({tenant: settings}, evict=evict)
        store.flush()
    if as_json:
        print_json({**_settings(settings), "id": tenant, "blocks_evicted": report.blocks})
        return
    print(
        visible(
            f"{name}: cold share {_shown(settings.cold_share)}, limit {_shown(settings.cold_limit)}; "
            f"warm share {_shown(settings.warm_share)}, limit {_shown(settings.warm_limit)}"
        )
        + (f"; evicted {report.blocks:,} blocks" if report.blocks else "")
    )


@spread()
def remove_tenant(
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    where: StoreOptions,
) -> None:
    """Forget a tenant's name, shares and limits. Its blocks stay; tierkv evict --tenant removes those."""
    with open_existing(where.path, read_only=False) as store:
        found = [tenant for tenant, each in store.tenants().items() if each.name == name]
        if not found:
            raise ConfigError(f"no tenant has the name {name}")
        store.set_tenants({found[0]: None})
        store.flush()
    print(visible(f"{name} has no share and no limit any more"))


def _tenant_named(names: TenantNames, name: str, salt: str | None, tenant_id: str | None) -> str:
    """Return the id that a name has or gets. Raises ConfigError where that is not clear."""
    if salt is not None and tenant_id is not None:
        raise ConfigError("name the tenant by --salt or by --id, not by both")
    by_name = {each.name: tenant for tenant, each in names.settings.items()}
    if salt is not None:
        tenant = id_of_salt(salt)
    elif tenant_id is not None:
        tenant = names.find(tenant_id)
    elif name in by_name or name == DEFAULT_TENANT:
        return by_name.get(name, "")
    else:
        raise ConfigError(f"no tenant has the name {name} yet", hint="say whose it is with --salt or --id")
    if by_name.get(name, tenant) != tenant:
        raise ConfigError(f"another tenant has the name {name}")
    return tenant


def _changed(text: str | None, old: int | None) -> int | None:
    return old if text is None else None if text.strip().lower() == "none" else parse_optional_size(text)


def _row(names: TenantNames, tenant: str | None, namespaces: Iterable[StoredNamespace]) -> dict[str, Any]:
    own = [each for each in namespaces if each.tenant == tenant]
    settings = names.settings.get(tenant) if tenant is not None else None
    return {
        **_settings(settings or TenantSettings(name=names.name_of(tenant))),
        "id": tenant,
        "namespaces": len(own),
        "blocks": sum(each.blocks for each in own),
        "bytes_live": sum(each.value_bytes for each in own),
    }


def _settings(settings: TenantSettings) -> dict[str, Any]:
    return {each: getattr(settings, each) for each in settings.__struct_fields__}


def tier_table(*more: str) -> Table:
    """Return an empty table of what tenants have of each tier, and may have; for rows of `tier_row`.

    more: further columns.
    """
    return close_table("tenant", "tier", "used", "share", "limit", *more, folded=("tenant",))


def tier_row(name: str, tier: str, used: int | None, share: int, limit: int | None) -> tuple[str, ...]:
    """Return the cells of a tenant's row. used: bytes, None where they are not known. limit: None for none."""
    return visible(name), tier, "" if used is None else format_bytes(used), _shown(share), _shown(limit)


def _shown(size: int | None) -> str:
    return "none" if size is None else format_bytes(size) if size else "0"


group: typer.Typer = typer.Typer(help="Name the tenants of a store; their shares and limits.", add_completion=False)


@group.callback(invoke_without_command=True)
def _print_help(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for _name, _action in (("list", list_tenants), ("set", set_tenant), ("remove", remove_tenant)):
    group.command(_name)(_action)
