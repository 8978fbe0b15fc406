"""A daemon for a group: members read what is right, write nothing, and are refused truthfully. Needs root."""

from __future__ import annotations

import json
import os
import socket as socket_module
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT, command
from stored_blocks import NAMESPACE, TOKENS

from tierkv.daemon import members
from tierkv.daemon.core import Core
from tierkv.daemon.host import check_reachable
from tierkv.daemon.members import groups_of_peer
from tierkv.daemon.requests import _HANDLERS
from tierkv.errors import DaemonError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")

WORKER = Path(__file__).with_name("team_worker.py")
OWNER, MEMBER, OUTSIDER = 61001, 61002, 61003
OWN_GROUP, GROUP, OTHER_GROUP = 61001, 61500, 61600
COUNT = len(TOKENS) // NAMESPACE.layout.block_size
TIMEOUT_S = 120

Act = Callable[..., dict[str, Any]]


def run(uid: int, gids: list[int], role: str, **options: object) -> dict[str, Any]:
    line = command(WORKER, uid, json.dumps(gids), role, json.dumps(options))
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/")
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def start_team(short_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that starts a daemon of OWNER, and returns its socket."""
    short_path.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(group: int | None = GROUP, mode: int = 0o750) -> Path:
        for name in ("run", "store"):
            (short_path / name).mkdir(mode=0o700)
            os.chown(short_path / name, OWNER, GROUP if name == "run" else OWN_GROUP)
        (short_path / "run").chmod(mode)
        options = {"socket": str(short_path / "run" / "d.sock"), "store": str(short_path / "store"), "group": group}
        line = command(WORKER, OWNER, json.dumps([OWN_GROUP, GROUP]), "serve", json.dumps(options))
        process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, cwd="/")
        started.append(process)
        assert process.stdout
        said = process.stdout.readline()
        assert said == "up\n", said
        return short_path / "run" / "d.sock"

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_a_member_reads_what_the_owner_wrote_and_writes_nothing(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    state = os.stat(socket)
    assert (stat.S_IMODE(state.st_mode), state.st_uid, state.st_gid) == (0o660, OWNER, GROUP)
    before = run(MEMBER, [MEMBER, GROUP], "store", socket=str(socket), daemon_user=OWNER)
    assert before == {"saved": 0, "loaded": 0, "failed": 0, "skips": {"read_only": COUNT}}
    assert run(OWNER, [OWN_GROUP], "store", socket=str(socket))["loaded"] == COUNT
    after = run(MEMBER, [MEMBER, GROUP], "store", socket=str(socket), daemon_user=OWNER)
    assert (after["saved"], after["loaded"], after["failed"]) == (0, COUNT, 0)


def test_a_members_cache_computes_with_what_the_owner_stored(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    assert run(OWNER, [OWN_GROUP], "cache", socket=str(socket))["cached"] == 0
    said = run(MEMBER, [MEMBER, GROUP], "cache", socket=str(socket), daemon_user=OWNER)
    assert said == {"cached": 40, "skips": {}}
    assert run(MEMBER, [MEMBER, GROUP], "cache", socket=str(socket), daemon_user=OWNER) == said


def test_a_member_by_its_first_group_alone_is_one(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    assert run(MEMBER, [GROUP], "greet", socket=str(socket), daemon_user=OWNER)["is_member"]


def test_no_descriptor_of_a_member_changes_the_memory(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    said = run(MEMBER, [MEMBER, GROUP], "write", socket=str(socket), daemon_user=OWNER)
    assert len(said) == 9 and "done" not in said.values(), said


def test_a_member_may_ask_for_nothing_that_changes_or_names_something(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    said = run(MEMBER, [MEMBER, GROUP], "ask", socket=str(socket), daemon_user=OWNER)
    assert said.pop("claim") == "0"
    assert len(said) == 10
    for name, why in said.items():
        assert f"{name} is for the daemon's user, {OWNER}; its group may only read" in why
    assert run(OWNER, [OWN_GROUP], "greet", socket=str(socket))["is_member"] is False, "the daemon still serves"


def test_every_request_that_members_may_send_is_named() -> None:
    allowed = {kind.__name__ for kind in _HANDLERS if kind in members._FOR_MEMBERS}
    assert allowed == {
        *("Hello", "Match", "Fetch", "Release", "Wait", "EndClaim", "Prefetch", "Flush", "Status"),
        *("EvictionsSince", "EvictionDone"),
    }


def test_the_groups_of_a_peer_are_those_of_the_process_that_connected() -> None:
    for count in (0, 1, 300, 5000):
        child = os.fork()
        if child == 0:
            os.setgroups(range(70_000, 70_000 + count))
            os.setgid(69_999)
            ends = socket_module.socketpair()
            os._exit(0 if groups_of_peer(ends[0]) == {69_999, *range(70_000, 70_000 + count)} else 1)
        assert os.waitpid(child, 0)[1] == 0, count


def test_an_outsider_is_refused_by_the_socket_and_by_the_daemon(start_team: Callable[..., Path]) -> None:
    socket = start_team(mode=0o755)
    said = run(OUTSIDER, [OTHER_GROUP], "greet", socket=str(socket), daemon_user=OWNER)
    assert f"belongs to user {OWNER}, and lets only that user and its group {GROUP} in" in said["error"]
    os.chmod(socket, 0o666)
    said = run(OUTSIDER, [OTHER_GROUP], "greet", socket=str(socket), daemon_user=OWNER)
    assert f"the daemon belongs to user {OWNER}, and user {OUTSIDER} is not in its group {GROUP}" in said["error"]
    assert run(MEMBER, [MEMBER, GROUP], "greet", socket=str(socket), daemon_user=OWNER)["is_member"]


def test_without_a_group_no_other_user_is_let_in(start_team: Callable[..., Path]) -> None:
    socket = start_team(group=None, mode=0o755)
    assert stat.S_IMODE(os.stat(socket).st_mode) == 0o600
    said = run(MEMBER, [MEMBER, GROUP], "greet", socket=str(socket), daemon_user=OWNER)
    assert f"belongs to user {OWNER}, and lets only that user in" in said["error"]
    os.chmod(socket, 0o666)
    said = run(MEMBER, [MEMBER, GROUP], "greet", socket=str(socket), daemon_user=OWNER)
    assert f"the daemon belongs to user {OWNER}, and lets no other user in, such as {MEMBER}" in said["error"]


def test_a_daemon_of_another_user_is_not_used_unless_that_user_is_named(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    for daemon_user in (None, OUTSIDER):
        said = run(MEMBER, [MEMBER, GROUP], "greet", socket=str(socket), daemon_user=daemon_user)
        assert f"belongs to user {OWNER}, and it decides what is computed with" in said["error"]
        assert f"TIERKV_DAEMON_USER={OWNER}" in said["error"]


def test_the_name_that_a_member_gives_a_namespace_is_not_shown(start_team: Callable[..., Path]) -> None:
    socket = start_team()
    said = run(MEMBER, [MEMBER, GROUP], "greet", socket=str(socket), daemon_user=OWNER, name="a lie")
    assert said["name"] == ""
    assert run(OWNER, [OWN_GROUP], "greet", socket=str(socket), name="true")["name"] == "true"


def test_the_owners_description_replaces_a_members_and_no_members_replaces_the_owners() -> None:
    core = Core(1 << 20, clock=lambda: 0.0)
    steps = ((True, "a lie", ""), (False, "the truth", "the truth"), (True, "a lie", "the truth"))
    for is_member, text, shown in steps:
        tenant = core.open_tenant(
            core.connect(), b"n" * 16, text.encode(), layout=NAMESPACE.layout, name=text, is_member=is_member
        )
        assert tenant.name == shown and (not shown or tenant.description == b"the truth")
        core.tenants.check()


def test_a_directory_that_the_group_cannot_pass_is_refused(short_path: Path) -> None:
    short_path.chmod(0o700)
    with pytest.raises(DaemonError, match="may not pass through"):
        check_reachable(short_path, GROUP)
    os.chown(short_path, OWNER, GROUP)
    short_path.chmod(0o710)
    check_reachable(short_path, GROUP)
    with pytest.raises(DaemonError):
        check_reachable(short_path, OTHER_GROUP)
