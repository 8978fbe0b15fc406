"""The commands as in a container: no HOME, another uid, everything read-only but one volume of 512 MiB."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a volume and becomes another user")

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("container_worker.py")
USER = 61004
SIZE = "512m"
TIMEOUT_S = 900
READY = "the container is made"


def script(data: Path, holds: Path) -> str:
    """Return what root does in a mount namespace of its own before it becomes the user."""
    trees = sorted({Path(each).resolve() for each in (sys.base_prefix, sys.prefix, ROOT)})
    closed = {each for tree in trees for each in tree.parents if not each.stat().st_mode & 0o001}
    lines = ["set -e"]
    for each in sorted(closed):
        if closed.isdisjoint(each.parents):  # only root enters it, as /root: another stands in its place
            lines += _opened(each, [tree for tree in trees if tree.is_relative_to(each)], holds)
    lines += [
        f"mount --bind {q(ROOT)} {q(ROOT)}; mount -o remount,bind,ro {q(ROOT)}",
        f"mount -t tmpfs -o size={SIZE},mode=700,uid={USER},gid={USER} tmpfs {q(data)}",
        "mount -o remount,bind,ro /dev/shm || true",
        "mount -o remount,bind,ro /",
        f"for each in {q(ROOT)} /tmp; do if touch $each/written 2>/dev/null; then exit 9; fi; done",
        f"cd {q(data)}",
        f"echo {READY}",
    ]
    environment = f"OMP_NUM_THREADS=1 PATH=/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={q(ROOT)}"
    environment += f" TIERKV_STORE={q(data / 'store')}"
    become = f"setpriv --reuid {USER} --regid {USER} --clear-groups env -i {environment}"
    return "\n".join([*lines, f"exec {become} {q(sys.executable)} {q(WORKER)}"])


def _opened(closed: Path, trees: list[Path], holds: Path) -> Iterator[str]:
    """Yield the lines that put a directory which everyone enters in another's place, with these trees in it."""
    for tree in trees:
        hold = q(holds / tree.as_posix().replace("/", "_"))
        yield f"mkdir {hold}; mount --bind {q(tree)} {hold}"
    yield f"mount -t tmpfs -o mode=755 tmpfs {q(closed)}"
    for tree in trees:
        hold = q(holds / tree.as_posix().replace("/", "_"))
        yield f"mkdir -p {q(tree)}; mount --bind {hold} {q(tree)}"


def q(path: object) -> str:
    return shlex.quote(str(path))


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, dict[str, Any]]]:
    """Run all commands once; yield what each of them said."""
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("unshare and setpriv are not installed")
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    probe = subprocess.run(mount, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no volume can be mounted: {probe.stderr.strip()}")
    with tempfile.TemporaryDirectory(prefix="tkc") as folder:
        os.chmod(folder, 0o755)
        data, holds = Path(folder) / "data", Path(folder) / "holds"
        data.mkdir(), holds.mkdir()
        line = ["unshare", "--mount", "sh", "-c", script(data, holds)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S)
        if READY not in done.stdout:
            pytest.skip(f"no such container can be made here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1])
        assert not list(data.iterdir()), "the volume was mounted over it"


def test_every_command_works(said: dict[str, dict[str, Any]]) -> None:
    environment = said["environment"]
    assert environment["uid"] == USER and not {"HOME", "USER", "XDG_CACHE_HOME", "TMPDIR"} & {*environment["names"]}
    failed = {name: each for name, each in said.items() if each.get("code")}
    assert failed == {}
    assert not [name for name, each in said.items() if "Traceback" in each.get("err", "")]


def test_the_second_warm_computes_nothing_and_run_finds_the_prompt(said: dict[str, dict[str, Any]]) -> None:
    first, second, answered = (json.loads(said[name]["out"]) for name in ("warm", "warm again", "run"))
    assert first["blocks_computed"] == second["blocks_reused"] > 0 == second["blocks_computed"]
    assert (
        answered["cached_tokens"]["cold"] > 300 and answered["prompt_tokens"] - answered["cached_tokens"]["cold"] < 64
    )


def test_a_miss_is_explained_and_a_tenant_is_limited(said: dict[str, dict[str, Any]]) -> None:
    explained = json.loads(said["explain"]["out"])
    assert explained["before"].endswith("user\nHel") and explained["prompt"].startswith("p")
    assert said["limit"]["out"] == "research: cold share 0, limit 20.0 MiB; warm share 0, limit none\n"


def test_a_backup_is_restored_whole(said: dict[str, dict[str, Any]]) -> None:
    blocks = json.loads(said["stats"]["out"])["blocks"]
    assert json.loads(said["load"]["out"])["blocks_stored"] == blocks > 0
    assert json.loads(said["evict"]["out"])["blocks_evicted"] == blocks


def test_the_server_answers_and_the_daemon_shares(said: dict[str, dict[str, Any]]) -> None:
    assert json.loads(said["serve"]["out"])["usage"]["completion_tokens"] == 2
    assert json.loads(said["run by daemon"]["out"])["cached_tokens"]["cold"] > 300
    status = json.loads(said["status"]["out"])
    assert {each["name"] for each in status["shares"]} == {"default", "research"}


def test_nothing_is_left_but_what_was_asked_for(said: dict[str, dict[str, Any]]) -> None:
    left = {name for name in said["files"]["left"] if not name.startswith(("d.sock", "torchinductor_"))}
    assert left == {"backup.tkv", "moved", "prompts.txt", "restored"}, "the old store is gone with its model"
