"""Eight processes on a slab far too small, killed and started again, and the daemon too: every block is its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from child_process import ENVIRONMENT, command
from daemon_process import Start
from test_life_and_death import eventually

WORKER = Path(__file__).with_name("hammer_worker.py")
SECONDS = float(os.environ.get("TIERKV_HAMMER_S", "6"))
KINDS = ["raw"] * 6 + ["cache"] * 2


def start_client(kind: str, socket: Path, seconds: float, seed: int) -> subprocess.Popen[str]:
    line = command(WORKER, kind, socket, seconds, seed)
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    """Return how many blocks a client read, all of them as they should be; 0 for one that was killed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), err
    return int(out.split()[1]) if process.returncode == 0 else 0


def test_clients_hammer_the_daemon_and_leave_nothing_behind(start_daemon: Start) -> None:
    daemon = start_daemon(slots=48)
    dice = random.Random(0)
    end = time.monotonic() + SECONDS
    clients = [start_client(kind, daemon.socket, SECONDS, seed) for seed, kind in enumerate(KINDS)]
    ended: list[subprocess.Popen[str]] = []
    is_restarted = False
    first_bytes = 0
    while time.monotonic() < end or not first_bytes:
        time.sleep(0.3)
        victim = dice.randrange(len(clients))
        clients[victim].kill()
        ended.append(clients[victim])
        left = max(end - time.monotonic(), 0.1)
        clients[victim] = start_client(KINDS[victim], daemon.socket, left, dice.randrange(1 << 30))
        if not is_restarted and left < SECONDS / 2:
            is_restarted = True
            daemon.kill()
            daemon.start()
        elif is_restarted and not first_bytes:
            first_bytes = daemon.status().rss_bytes
    num_read = sum(finish(process) for process in (*ended, *clients))
    assert num_read > 100, "they must have found each other's blocks"
    eventually(lambda: daemon.status().clients == 1)
    status = daemon.status()
    assert (status.leased_slots, status.reserved_slots, status.claims) == (0, 0, 0)
    assert status.counters.get("refused_messages", 0) == 0, daemon.log
    assert status.counters["evicted_blocks"] > 0
    assert status.rss_bytes < first_bytes + (16 << 20), "the daemon's memory grows"
