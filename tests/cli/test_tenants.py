"""`tierkv tenant`, and the commands that take a tenant or a namespace by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cold_blocks import NAMESPACE, chain_of
from one_command import Command
from test_cli import tierkv

from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import padded_bytes

__all__ = ["tierkv"]  # fixtures

A, B = (replace(NAMESPACE, salt=salt, name=f"model of {salt}") for salt in ("alpha", "beta"))
SIZE = padded_bytes(chain_of(1)[0].stored_bytes)


def fill(path: Path, blocks: int = 4) -> Path:
    """Make a store with blocks of three tenants."""
    with ColdStore(path, min_free_bytes=0) as store:
        for each in (NAMESPACE, A, B):
            store.open_namespace(each)
            store.put(chain_of(blocks, namespace=each))
    return path


def blocks_of(path: Path) -> list[int]:
    with ColdStore(path, read_only=True) as store:
        return [len(list(store.iter_entries(each.digest))) for each in (NAMESPACE, A, B)]


def test_a_tenant_is_named_limited_and_listed(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    result = tierkv("tenant", "set", "alpha", "--store", path, "--cold-limit", "1G")
    assert result.code == 2 and "--salt" in result.err
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path, "--cold-share", "1M", "--cold-limit", "1G")
    tierkv("tenant", "set", "research", "--store", path, "--warm-limit", "2G")
    tierkv("tenant", "set", "default", "--store", path, "--cold-limit", "3G")
    rows = tierkv("tenant", "list", "--store", path, "--json").json()["tenants"]
    research = next(row for row in rows if row["name"] == "research")
    assert (research["cold_share"], research["cold_limit"], research["warm_limit"]) == (1 << 20, 1 << 30, 2 << 30)
    assert (research["blocks"], research["bytes_live"], research["warm_share"]) == (4, 4 * SIZE, 0)
    assert {row["name"] for row in rows} == {"research", "default", B_ID[:8]}
    shown = tierkv("tenant", "list", "--store", path).out
    assert "research" in shown and "1.0 GiB" in shown and "alpha" not in shown
    tierkv("tenant", "set", "research", "--store", path, "--cold-limit", "none")
    assert tierkv("tenant", "remove", "research", "--store", path).code == 0
    assert tierkv("tenant", "remove", "research", "--store", path).code == 2
    assert blocks_of(path) == [4, 4, 4]


def test_a_tenant_without_blocks_and_settings_is_no_row(tierkv: Command, tmp_path: Path) -> None:
    def names() -> set[str]:
        return {row["name"] for row in tierkv("tenant", "list", "--store", path, "--json").json()["tenants"]}

    path = fill(tmp_path / "s")
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path)
    tierkv("evict", "--tenant", "research", "--store", path)
    assert names() == {"default", "research", B_ID[:8]}
    tierkv("tenant", "remove", "research", "--store", path)
    assert names() == {"default", B_ID[:8]}


def test_a_limit_below_what_a_tenant_has_asks_for_evict(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    options = ("tenant", "set", "research", "--salt", "alpha", "--store", path, "--cold-limit", 2 * SIZE)
    result = tierkv(*options)
    assert result.code == 2 and "--evict" in result.err
    assert blocks_of(path) == [4, 4, 4]
    assert "evicted 2 blocks" in tierkv(*options, "--evict").out
    assert blocks_of(path) == [4, 2, 4]


def test_a_name_of_another_tenant_is_refused(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path)
    assert "another tenant has the name" in tierkv("tenant", "set", "research", "--salt", "beta", "--store", path).err
    assert tierkv("tenant", "set", "x", "--salt", "a", "--id", "b", "--store", path).code == 2
    assert tierkv("tenant", "set", "second", "--id", B_ID[:6], "--store", path).code == 0


def test_evict_takes_a_tenant_by_name_by_id_and_by_salt(tierkv: Command, tmp_path: Path) -> None:
    for tenant in ("research", A_ID[:6], "alpha"):
        path = fill(tmp_path / tenant)
        tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path)
        result = tierkv("evict", "--tenant", tenant, "--store", path, "--json").json()
        assert result["blocks_evicted"] == 4 and blocks_of(path) == [4, 0, 4]
    path = fill(tmp_path / "default")
    tierkv("evict", "--tenant", "default", "--store", path)
    assert blocks_of(path) == [0, 4, 4]
    result = tierkv("evict", "--tenant", "nobody", "--store", path)
    assert result.code == 2 and "there is no tenant" in result.err


def test_evict_takes_a_namespace_by_its_name_and_together_with_a_tenant_both_must_fit(
    tierkv: Command, tmp_path: Path
) -> None:
    path = fill(tmp_path / "s")
    result = tierkv("evict", "--tenant", "beta", "--namespace", "model of alpha", "--store", path, "--json").json()
    assert result["blocks_evicted"] == 0
    assert tierkv("evict", "--namespace", "model of alpha", "--store", path, "--json").json()["blocks_evicted"] == 4
    assert blocks_of(path) == [4, 0, 4]
    assert tierkv("evict", "--tenant", "beta", "--older-than", "1h", "--store", path, "--json").json()["stayed"] == {}
    assert blocks_of(path) == [4, 0, 4]
    tierkv("evict", "--tenant", "beta", "--to", 2 * SIZE, "--store", path)
    assert blocks_of(path) == [2, 0, 0]


def test_a_size_beside_a_prompt_does_not_empty_the_namespace(tierkv: Command, tmp_path: Path) -> None:
    path = fill(tmp_path / "s")
    tierkv("evict", "--namespace", "model of alpha", "--prompt", "Be kind.", "--to", "1G", "--store", path)
    assert blocks_of(path) == [4, 4, 4]


def test_warm_names_the_limit_that_leaves_no_room(tierkv: Command, tmp_path: Path) -> None:
    prompts, path = tmp_path / "p.txt", tmp_path / "s"
    prompts.write_text("Be kind. " * 150)
    warm = ("warm", prompts, "--block-size", 256, "--salt", "alpha", "--store", path)
    assert tierkv(*warm).code == 0
    tierkv("tenant", "set", "research", "--salt", "alpha", "--store", path, "--cold-limit", "3M", "--evict")
    limited = tierkv(*warm)
    assert limited.code == 2 and "found no room" in limited.err
    assert "(tenant research has a limit of 3.0 MiB: tierkv tenant set research --cold-limit SIZE)" in limited.err
    tierkv("tenant", "set", "research", "--store", path, "--cold-limit", "none")
    tierkv("quota", "3M", "--evict", "--store", path)
    full = tierkv(*warm)
    assert full.code == 2 and "quota" in full.err and "research" not in full.err


def test_warm_pins_for_a_time(tierkv: Command, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("Be kind. " * 60)
    assert tierkv("warm", prompts, "--pin", "--pin-for", "1h").code == 2
    assert tierkv("warm", prompts, "--pin-for", "soon").code == 2
    tierkv("warm", prompts, "--pin-for", "1h")
    with ColdStore(Path(tierkv("inspect", "--json").json()["store"]), read_only=True) as store:
        ends = store.pin_ends()
        assert ends.keys() == {block_hash for block_hash, entry in store.iter_entries() if entry.pinned}
        assert len(ends) > 0


A_ID, B_ID = (store_id for store_id in (A.identity()["salt"], B.identity()["salt"]))
